"""A rank's program for test_waits: the rank VICTIM stops for ever in PHASE, the others go on as usual."""

import os
import time

from lockstep.runtime.options import ModelOptions
from lockstep.runtime.place import Place

phase, victim = os.environ["PHASE"], int(os.environ["VICTIM"])
place = Place.take()


def never(*_: object, **__: object) -> None:
    os.write(1, f"stopped at {time.monotonic()}\n".encode())
    time.sleep(1000)


if place.env.rank == victim and phase == "start":
    never()

from lockstep.errors import LockstepError, complaint  # noqa: E402
from lockstep.runtime import opening, rank, selftest  # noqa: E402

if place.env.rank == victim:
    where = {
        "introduce": (rank, "_introduce"),
        "hello": (opening, "hello"),
        "assign": (opening, "agree"),
        "load": (opening, "_load"),
        "test": (selftest, "_probe"),
    }
    if phase in where:
        setattr(*where[phase], never)

os.write(1, f"began at {time.monotonic()}\n".encode())
try:
    options = ModelOptions(os.environ["MODEL"], self_test=True)
    opened = opening.open_session(place, options, lambda text: None)
except LockstepError as error:
    os.write(2, f"{complaint(str(error))}\n".encode())
    os._exit(error.exit_status)
if opened.world.follower is not None:
    opened.follow()
