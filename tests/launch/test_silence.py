from types import SimpleNamespace

from lockstep.launch.silence import CONFIRM_S, Silence


class Running:
    """Its next beat is due at that time."""

    def __init__(self, due_s):
        self.beats = SimpleNamespace(due_s=due_s)


def test_the_next_look_is_when_the_first_beat_is_due():
    assert Silence().look_s([Running(30), Running(20)]) == 20
    assert Silence().look_s([]) == float("inf")


def test_a_process_is_silent_when_it_is_late_at_a_second_look_too():
    silence, late, well = Silence(), Running(20), Running(30)
    assert silence.find([late, well], 19) is None
    assert silence.find([late, well], 21) is None
    assert silence.look_s([late, well]) == 21 + CONFIRM_S
    assert silence.find([late, well], 21 + CONFIRM_S) is late


def test_beats_that_were_not_read_while_the_launcher_was_stopped_count():
    silence, stopped = Silence(), Running(20)
    assert silence.find([stopped], 1000) is None
    stopped.beats.due_s = 1020
    assert silence.look_s([stopped]) == 1020
    assert silence.find([stopped], 1000 + CONFIRM_S) is None
    assert silence.find([stopped], 1021) is None, "the earlier delay is forgotten"
