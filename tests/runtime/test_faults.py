import pytest

from lockstep.engine.step import Decode, Prefill, Step
from lockstep.errors import LockstepError, UsageError
from lockstep.runtime import faults


def test_there_is_no_fault_unless_it_is_asked_for():
    assert faults.read(1, {}) is None


def test_only_the_named_rank_fails_and_only_in_the_first_attempt():
    env = {"LOCKSTEP_FAULT": "rank=1,step=20,action=freeze"}
    assert faults.read(1, env) == faults.Fault("freeze", 20)
    assert faults.read(0, env) is None
    assert faults.read(1, env | {"LOCKSTEP_ATTEMPT": "1"}) is None
    always = {"LOCKSTEP_FAULT": "rank=1,step=20,action=freeze,attempt=all", "LOCKSTEP_ATTEMPT": "7"}
    assert faults.read(1, always) is not None


def test_of_several_faults_each_has_its_rank_and_attempt():
    env = {"LOCKSTEP_FAULT": "rank=0,action=raise,step=5; rank=1,action=exit0,attempt=1;"}
    assert faults.read(0, env) == faults.Fault("raise", 5)
    assert faults.read(1, env) is None
    assert faults.read(1, env | {"LOCKSTEP_ATTEMPT": "1"}) == faults.Fault("exit0")


@pytest.mark.parametrize(
    "text", ["freeze", "rank=1", "rank=0,action=raise;dance", "rank=x,action=raise", "rank=1,action=dance"]
)
def test_a_fault_that_there_is_not_is_refused(text):
    with pytest.raises(UsageError, match="LOCKSTEP_FAULT"):
        faults.read(1, {"LOCKSTEP_FAULT": text})


def test_it_strikes_in_its_step_and_not_before():
    fault = faults.Fault("raise", 3)
    assert fault.strike(Step(2, [])) == Step(2, [])
    with pytest.raises(faults.StepError):
        fault.strike(Step(3, []))


@pytest.mark.parametrize("forward", [Decode(0, [5, 6]), Prefill(1, [[7, 8], [9]])])
def test_a_wrong_step_has_the_form_of_the_right_one(forward):
    step = Step(4, [], forward)
    wrong = faults.Fault("wrong-step", 4).strike(step)
    assert wrong != step
    assert [type(wrong.forward), wrong.index] == [type(forward), 4]


def test_loading_fails_only_if_that_is_the_fault():
    faults.Fault("freeze").while_loading()
    with pytest.raises(LockstepError):
        faults.Fault("fail-load").while_loading()
