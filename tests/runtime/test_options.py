"""What a person may ask of a run."""

from __future__ import annotations

import pytest

from lockstep.errors import UsageError
from lockstep.runtime.options import Deadlines


def test_deadlines_are_those_of_the_environment_or_their_defaults() -> None:
    assert Deadlines.read({"LOCKSTEP_JOIN_TIMEOUT": "7.5", "LOCKSTEP_STEP_TIMEOUT": ""}) == Deadlines(7.5)


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "1e300", "soon"])
def test_what_is_no_deadline_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="LOCKSTEP_.*_TIMEOUT.*seconds"):
        Deadlines.read({"LOCKSTEP_LOAD_TIMEOUT": value})
