from lockstep.launch.restarts import Reach, Restarts


def test_the_first_restart_is_at_once():
    assert Restarts(3).wait_s(100.0, lived_s=60.0) == 0.0


def test_more_than_the_limit_within_the_window_gives_up_and_later_ones_are_free_again():
    restarts = Restarts(3, window_s=600.0)
    assert [restarts.wait_s(at, lived_s=60.0) for at in (0.0, 100.0, 200.0)] == [0.0, 0.0, 0.0]
    assert restarts.wait_s(300.0, lived_s=60.0) is None
    assert restarts.wait_s(601.0, lived_s=60.0) == 0.0


def test_who_ends_soon_after_every_start_is_started_less_and_less_often():
    restarts = Restarts(100)
    waits = [restarts.wait_s(float(at), lived_s=5.0) for at in range(9)]
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert restarts.wait_s(9.0, lived_s=60.0) == 0.0


def test_no_restarts_means_none():
    assert Restarts(0).wait_s(0.0, lived_s=60.0) is None


def test_a_host_is_left_out_when_it_is_out_of_reach_twice_in_a_row():
    reach = Reach(times=2)
    assert not reach.lost("mini2")
    assert not reach.lost(None)
    assert not reach.lost("mini2")
    assert not reach.lost("mini1")
    assert not reach.lost("mini2")
    assert reach.lost("mini2")
