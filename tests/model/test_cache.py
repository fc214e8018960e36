"""The folder for what can be made again."""

import pytest

from lockstep.errors import UsageError
from lockstep.model import cache, default_model


@pytest.mark.parametrize("place", ["/proc/nope", "file", "~no-such-user/cache"])
def test_a_cache_that_cannot_be_made_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCKSTEP_CACHE", place)
    with pytest.raises(UsageError, match="LOCKSTEP_CACHE"):
        default_model.folder()
    with pytest.raises(UsageError, match="LOCKSTEP_CACHE"):
        cache.write_atomically(cache.cache_folder() / "a", "text")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
