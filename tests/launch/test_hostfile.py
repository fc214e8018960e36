"""mlx's hostfile: both forms, our additions, and the line that each error names."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import UsageError
from lockstep.launch import positions
from lockstep.launch.hostfile import Host, Hostfile, layer_counts
from lockstep.launch.hostfile_reader import load_hostfile


@pytest.fixture
def load(tmp_path):
    def read(text: str) -> Hostfile:
        path = tmp_path / "hosts.json"
        path.write_text(text)
        return load_hostfile(path, timeout_s=2)

    return read


def test_both_forms_are_read(load):
    hosts = '[{"ssh": "a", "ips": ["10.0.0.1", "10.0.1.1"], "rdma": [null, ["en1", "en2"]]},\n'
    hosts += '{"ssh": "me@b", "ips": ["10.0.0.2"], "rdma": ["en3", null], "memory_gb": 16}]'
    expected = (
        Host("a", ("10.0.0.1", "10.0.1.1"), (None, ("en1", "en2"))),
        Host("me@b", ("10.0.0.2",), ("en3", None), 16.0),
    )
    assert load(hosts) == Hostfile(expected)
    full = f'{{"backend": "jaccl", "envs": ["A=1", "B=x=y"], "hosts": {hosts}}}'
    assert load(full) == Hostfile(expected, "jaccl", {"A": "1", "B": "x=y"})


def test_a_name_becomes_an_address(load):
    assert load('[{"ssh": "localhost"}]').hosts == (Host("localhost", ("127.0.0.1",)),)
    assert load('[{"ssh": "x", "ips": ["localhost"]}]').hosts == (Host("x", ("127.0.0.1",)),)


def test_slots_are_ranks_on_one_host(load):
    hosts = load('[{"ssh": "a", "ips": ["10.0.0.1"], "slots": 2}, {"ssh": "b", "ips": ["10.0.0.2"]}]').hosts
    assert [host.ssh for host in hosts] == ["a", "a", "b"]


def layered(*layers: object) -> str:
    hosts = [{"ssh": f"h{i}", "ips": [f"10.0.0.{i}"], "layers": n} for i, n in enumerate(layers)]
    return json.dumps([{k: v for k, v in host.items() if v is not None} for host in hosts]).replace(
        "},", "},\n"
    )


def test_layers_give_the_split_in_rank_order(load):
    assert layer_counts(load(layered(3, 5, 2)).hosts) == (3, 5, 2)
    assert layer_counts(load(layered([7, 10], [2, 7], [0, 2])).hosts) == (3, 5, 2)
    assert layer_counts(load(layered(None, None)).hosts) is None
    with pytest.raises(UsageError, match="the last host holds layer 0"):
        layer_counts(load(layered([0, 2], [2, 7])).hosts)


HOST = '{"ssh": "a", "ips": ["10.0.0.1"]}'


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "not valid JSON"),
        ("[\n{]", 2, "not valid JSON"),
        ("[]", 1, "expected a list of hosts, found []"),
        ('"a"', 1, "expected a list of hosts"),
        ('{"backend": "ring"}', 1, 'no "hosts" list'),
        (f'{{"hosts":\n[{HOST}],\n"backend": "tcp"}}', 3, "unknown backend 'tcp': use one of ring"),
        (f'{{"hosts": [{HOST}],\n"envs": ["A"]}}', 2, 'must be a list of "NAME=value", found \'A\''),
        (f'{{"hosts": [{HOST}],\n"env": []}}', 2, 'unknown key "env"'),
        (f"[{HOST},\n7]", 2, "expected a host such as"),
        ('[\n{"ips": []}]', 2, '"ssh" must be a name that ssh understands (not empty), found None'),
        ('[{\n"ssh": ""}]', 2, '"ssh" must be a name that ssh understands (not empty), found \'\''),
        ('[{"ssh": "-oProxyCommand=x"}]', 1, '"ssh" must be a name without spaces'),
        ('[{"ssh": "local\\u0000host"}]', 1, "a name without control characters, found 'local\\x00host'"),
        ('[{"ssh": "a", "ips": ["\\u0000"]}]', 1, '"ips" must be a list of addresses'),
        ('[{"ssh": "a", "slots": 257}]', 1, '"slots" must be a count above 0, at most 256, found 257'),
        (f'{{"hosts": [{HOST}],\n"envs": ["A=\\u0000"]}}', 2, 'must be a list of "NAME=value"'),
        ('[{"ssh": "a",\n"ips": "10.0.0.1"}]', 2, '"ips" must be a list of addresses'),
        ('[{"ssh": "a",\n"ips": [""]}]', 2, '"ips" must be a list of addresses'),
        ('[{"ssh": "a",\n"layer": 3}]', 2, 'unknown key "layer": expected ssh, ips, rdma'),
        ('[{"ssh": "a", "memory_gb":\n-1}]', 2, '"memory_gb" must be a number above 0, at most'),
        ('[{"ssh": "a", "memory_gb":\n1e999}]', 2, "a number above 0, at most 1000000, found inf"),
        ('[{"ssh": "a", "memory_gb":\n1e300}]', 2, "a number above 0, at most 1000000, found 1e+300"),
        ('[{"ssh": "a", "rdma": [1]}]', 1, '"rdma" must be a list of device names or null'),
        (f'[{HOST},\n{{"ssh": "b", "ips": ["10.0.0.2"], "rdma": [null]}}]', 2, "rdma has 1 entries"),
        (f'[{HOST},\n\n{{"ssh": "A"}}]', 3, "A is already the host of line 1"),
        (f'[{HOST},\n{{"ssh": "b",\n"ips": ["10.0.0.1"]}}]', 3, "10.0.0.1 is already the host of line 1"),
        (layered(0), 1, '"layers" must be a count above 0 or [first, last + 1], found 0'),
        (layered([3, 3]), 1, '"layers" must be a count above 0'),
        (layered(3, None), 2, "h1 has no layers, but others have"),
        (layered([4, 8], 4), 2, "layers must be counts on all hosts or spans on all hosts"),
        (layered([4, 8], [0, 5]), 1, "layer 4 is on two hosts"),
        (layered([0, 5], [0, 5]), 2, "layers 0 to 4 are on two hosts"),
        (layered([6, 8], [0, 4]), 1, "layers 4 to 5 are on no host"),
        (layered([6, 8], [1, 6]), 2, "layer 0 is on no host"),
        (f'[{HOST},\n{{"ssh": "no-such-host.invalid"}}]', 2, "cannot find the address of no-such"),
        ('[{"ssh": "a", "ips": [\n"::1"]}]', 1, "::1 is an IPv6 address, but mlx takes only IPv4: give its"),
        (f'[{HOST},\n{{"ssh": "me@fe80::1%en0"}}]', 2, "me@fe80::1%en0 is an IPv6 address"),
    ],
)  # fmt: skip
def test_an_error_names_the_line(load, text, line, reason):
    with pytest.raises(UsageError) as error:
        load(text)
    assert f"hosts.json line {line}: " in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, f'[{{"ssh": "a", "slots": {"9" * 5000}}}]'])
def test_json_that_python_does_not_take_is_an_error(load, text):
    with pytest.raises(UsageError, match="is not a hostfile"):
        load(text)


def test_a_missing_or_binary_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read the hostfile .*: No such file"):
        load_hostfile(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_hostfile(tmp_path / "binary.json")


def test_a_slow_resolver_is_given_up(load, monkeypatch):
    # The one thing that cannot be had for real here: a name server that never answers.
    monkeypatch.setattr("lockstep.launch.names._address", lambda name, timeout_s: time.sleep(10))
    began = time.monotonic()
    with pytest.raises(UsageError, match="cannot find the address of far within 2 s"):
        load('[{"ssh": "far"}]')
    assert time.monotonic() - began < 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values), st.lists(json_values), st.sampled_from([None, 1]))
def test_positions_find_every_member_and_entry(members, entries, indent):
    text = json.dumps(members, indent=indent)
    found = list(positions.members(text, 0))
    assert {key: value for key, value, _ in found} == members
    assert all(text.startswith(json.dumps(value, indent=indent)[:1], at) for _, value, at in found)
    text = " " + json.dumps(entries, indent=indent)
    assert [value for value, _ in positions.entries(text, positions.beginning(text))] == entries
