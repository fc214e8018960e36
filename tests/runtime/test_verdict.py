from lockstep.runtime.ledger import Mark
from lockstep.runtime.progress import COMPUTING, IDLE, JOINING, LOADING, STARTING, Snapshot
from lockstep.runtime.verdict import LOADING_SILENCE_S, Report, Seen, patience_s, silent, stalled

NOW_S = 1000.0
FLOOR_S = 10.0


def seen(rank, started=20, done=19, quiet_s=0.5, since_s=12.0, phase=COMPUTING, deadline_s=10.0):
    """What rank 0 knows of a rank that has been in its phase for `since_s`, and was heard `quiet_s` ago."""
    snapshot = Snapshot(phase, NOW_S - since_s, deadline_s, Mark(started), done)
    layers = f"layers {20 - 10 * rank}-{29 - 10 * rank}"
    return Seen(Report(rank, f"mini{rank}", layers, snapshot), NOW_S - quiet_s)


def test_a_rank_that_reports_nothing_while_a_step_is_late_is_named_with_its_host_step_and_layers():
    reason = stalled(NOW_S, seen(0, quiet_s=0), [seen(1), seen(2, quiet_s=11)])
    assert reason == (
        "rank 2 (host mini2) stopped answering in step 20 while computing layers 0-9; "
        "ranks 0 and 1 were waiting for it"
    )


def test_a_rank_that_lives_but_has_not_begun_the_step_is_named():
    reason = stalled(NOW_S, seen(0, quiet_s=0), [seen(1, started=19), seen(2, started=23, done=22)])
    assert reason.startswith("rank 1 (host mini1) has been stuck for 12 s in step 20")


def test_of_ranks_in_the_same_place_the_first_stage_is_named():
    reason = stalled(NOW_S, seen(0, quiet_s=0), [seen(1), seen(2, done=22, started=23)])
    assert reason.startswith("rank 1 ")


def test_of_ranks_that_began_the_same_step_the_one_that_has_finished_fewer_is_named():
    reason = stalled(NOW_S, seen(0, quiet_s=0), [seen(1, done=18), seen(2, done=19)])
    assert reason.startswith("rank 1 (host mini1) has been stuck")


def test_rank_0_is_named_when_it_has_not_begun_what_the_others_have():
    reason = stalled(NOW_S, seen(0, started=19, quiet_s=0), [seen(1, started=20, done=20)])
    assert reason.startswith("rank 0 (host mini0) has been stuck")


def test_rank_0_alone_is_to_blame_when_it_stops_looking_for_work():
    stopped = seen(0, phase=IDLE, deadline_s=10, quiet_s=0)
    reason = stalled(NOW_S, stopped, [seen(1, phase=IDLE, quiet_s=4.5)])
    assert reason == "rank 0 (host mini0) has been stuck for 12 s while waiting for work"


def test_a_rank_alone_has_nobody_who_waits_for_it():
    reason = stalled(NOW_S, seen(0, quiet_s=0), [])
    assert reason == "rank 0 (host mini0) has been stuck for 12 s in step 20 while computing layers 20-29"


def test_a_late_step_is_no_reason_before_its_deadline():
    assert stalled(NOW_S, seen(0, since_s=9, quiet_s=0), [seen(1, quiet_s=9)]) is None


def test_a_phase_without_a_deadline_may_last_for_ever():
    idle = seen(0, phase=IDLE, deadline_s=0.0, since_s=1e6, quiet_s=0)
    assert stalled(NOW_S, idle, [seen(1, phase=IDLE)]) is None


def test_an_idle_rank_may_be_silent_for_longer_than_a_computing_one():
    me = seen(0, phase=IDLE, deadline_s=0.0, quiet_s=0)
    assert silent(NOW_S, me, [seen(1, phase=IDLE, quiet_s=12)], FLOOR_S) is None
    assert "while waiting for work" in silent(NOW_S, me, [seen(1, phase=IDLE, quiet_s=16)], FLOOR_S)
    assert silent(NOW_S, me, [seen(1, phase=COMPUTING, quiet_s=12)], FLOOR_S)


def test_ranks_that_are_still_joining_are_given_time():
    me = seen(0, phase=JOINING, deadline_s=60, quiet_s=0)
    assert silent(NOW_S, me, [seen(1, phase=JOINING, quiet_s=25)], FLOOR_S) is None
    assert silent(NOW_S, me, [seen(1, phase=JOINING, quiet_s=31)], FLOOR_S)


def test_a_rank_alone_may_be_silent_as_long_as_a_step_or_its_start_may_take():
    assert patience_s(Snapshot(COMPUTING, deadline_s=60.0), FLOOR_S) == 60
    assert patience_s(Snapshot(COMPUTING, deadline_s=1.0), FLOOR_S) == FLOOR_S
    assert patience_s(Snapshot(STARTING, deadline_s=60.0), FLOOR_S) == 60
    assert patience_s(Snapshot(LOADING, deadline_s=1800.0), FLOOR_S) == LOADING_SILENCE_S
