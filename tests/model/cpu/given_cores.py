from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def cores_given(count, worth_a_core, little):
    """As if this rank had so many, and it repaid so `little` to hand it to another."""
    cpu = "lockstep.model.cpu."
    with patch(f"{cpu}cores.cores", lambda: count), patch(cpu + worth_a_core, little):
        yield
