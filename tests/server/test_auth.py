from __future__ import annotations

import pytest

from lockstep.errors import UsageError
from lockstep.server.auth import Keys, load_keys
from lockstep.server.settings import ServerSettings, is_loopback


def test_keys_come_from_the_command_and_from_a_file_with_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# our keys\nalpha  # Anna\n\n  beta\n")
    assert load_keys(ServerSettings(api_keys=["gamma"], api_key_file=str(file))) == ["gamma", "alpha", "beta"]


def test_a_key_file_without_keys_is_not_an_open_door(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="no API key"):
        load_keys(ServerSettings(api_key_file=str(file)))
    with pytest.raises(UsageError, match="cannot read"):
        load_keys(ServerSettings(api_key_file=str(tmp_path / "missing")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mini2.local"])
def test_nobody_listens_beyond_loopback_without_a_key(host):
    with pytest.raises(UsageError, match="--no-auth"):
        load_keys(ServerSettings(host=host))
    assert load_keys(ServerSettings(host=host, no_auth=True)) == []
    assert load_keys(ServerSettings(host=host, api_keys=["k"])) == ["k"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    assert load_keys(ServerSettings(host=host)) == []


def test_only_a_whole_key_with_its_scheme_opens():
    keys = Keys(["alpha", "beta"])
    alpha, beta = keys.owner("Bearer alpha"), keys.owner("bearer beta")
    assert alpha and beta and alpha != beta
    assert "alpha" not in alpha
    for header in ("", "alpha", "Bearer alph", "Bearer alphaa", "Basic alpha", "Bearer "):
        assert keys.owner(header) is None
