"""Reading mlx's JSON hostfile, so that each error names its line.

Both of mlx's forms are read: a list of hosts, or {"backend": ..., "envs": ["NAME=value"], "hosts": [...]}.
A host is {"ssh": name, "ips": [...], "rdma": [...]}; Lockstep adds `memory_gb` (what a rank may use),
`layers` (a count, or [first, last + 1]) and `slots` (ranks on that host, one per GPU; 1 if absent). Rank =
position.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError
from lockstep.launch import names, positions
from lockstep.launch.hostfile import MOST_RANKS, Host, Hostfile
from lockstep.runtime.environment import BACKENDS

KEYS = ("ssh", "ips", "rdma", "memory_gb", "layers", "slots")
MOST_GB = 1_000_000
MOST_LAYERS = 100_000
_VARIABLE = r"[A-Za-z_]\w*=[^\0\ud800-\udfff]*"
"""With what an environment can hold: nothing that ends a string, nor halves of characters."""


def load_hostfile(path: str | Path, timeout_s: float = 5.0) -> Hostfile:
    """Read and check a hostfile, and find the address of every name in it within `timeout_s`.

    Raises UsageError that names the file and the line at fault.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read the hostfile {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a hostfile: it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not a hostfile: it has numbers of thousands of digits or lists too deep in each other"
        ) from error
    return _Reader(path, text, document).read(timeout_s)


@dataclass(frozen=True)
class _Entry:
    """A host with the lines where it and its fields stand."""

    host: Host
    slots: int
    line: int
    lines: Mapping[str, int]

    def at(self, key: str) -> int:
        return self.lines.get(key, self.line)


@dataclass(frozen=True)
class _Reader:
    path: Path
    text: str
    document: Any

    def fail(self, line: int, reason: str) -> UsageError:
        return UsageError(f"{self.path} line {line}: {reason}")

    def read(self, timeout_s: float) -> Hostfile:
        start = positions.beginning(self.text)
        backend: str | None = None
        env: dict[str, str] = {}
        if isinstance(self.document, dict):
            top = {key: (value, at) for key, value, at in positions.members(self.text, start)}
            backend, env = self.settings(top)
            if "hosts" not in top:
                raise self.fail(positions.line_of(self.text, start), 'no "hosts" list')
            value, start = top["hosts"]
        else:
            value = self.document
        if not isinstance(value, list) or not value:
            raise self.fail(
                positions.line_of(self.text, start),
                f"expected a list of hosts, found {json.dumps(value)[:40]}",
            )
        found = [self.entry(value, at) for value, at in positions.entries(self.text, start)]
        self.check_unique(found)
        self.check_layers(found)
        self.check_rdma(found)
        found = self.with_addresses(found, timeout_s)
        return Hostfile(tuple(entry.host for entry in found for _ in range(entry.slots)), backend, env)

    def settings(self, top: Mapping[str, tuple[Any, int]]) -> tuple[str | None, dict[str, str]]:
        line = {key: positions.line_of(self.text, at) for key, (_, at) in top.items()}
        for key in top.keys() - {"backend", "envs", "hosts"}:
            raise self.fail(line[key], f'unknown key "{key}": expected backend, envs, hosts')
        backend = top["backend"][0] if "backend" in top else None
        if backend and backend not in BACKENDS:
            raise self.fail(line["backend"], f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
        env = top["envs"][0] if "envs" in top else []
        for item in env if isinstance(env, list) else [env]:
            if not isinstance(item, str) or not re.fullmatch(_VARIABLE, item):
                raise self.fail(line["envs"], f'envs must be a list of "NAME=value", found {item!r}')
        return backend or None, dict(item.split("=", 1) for item in env)

    def entry(self, value: Any, at: int) -> _Entry:
        line = positions.line_of(self.text, at)
        if not isinstance(value, dict):
            raise self.fail(
                line, f'expected a host such as {{"ssh": "mini1"}}, found {json.dumps(value)[:40]}'
            )
        members = positions.members(self.text, at)
        lines = {key: positions.line_of(self.text, position) for key, _, position in members}
        for key in value.keys() - set(KEYS):
            raise self.fail(lines[key], f'unknown key "{key}": expected {", ".join(KEYS)}')

        def need(key: str, ok: bool, expected: str) -> None:
            if not ok:
                raise self.fail(lines.get(key, line), f'"{key}" must be {expected}, found {value.get(key)!r}')

        ssh, ips, rdma = value.get("ssh"), value.get("ips", []), value.get("rdma", [])
        memory_gb, layers, slots = value.get("memory_gb"), value.get("layers"), value.get("slots", 1)
        need("ssh", isinstance(ssh, str) and ssh.strip() != "", "a name that ssh understands (not empty)")
        need("ssh", not re.search(r"\s|^-", str(ssh)), "a name without spaces that does not begin with -")
        need("ssh", str(ssh).isprintable(), "a name without control characters")
        need(
            "ips",
            _is_list(ips, str) and all(ip.strip() and ip.isprintable() for ip in ips),
            "a list of addresses",
        )
        need("rdma", _is_list(rdma, str, list, type(None)), "a list of device names or null")
        usable = memory_gb is None or (_is_number(memory_gb) and 0 < memory_gb <= MOST_GB)
        need("memory_gb", usable, f"a number above 0, at most {MOST_GB}")
        need("layers", layers is None or _is_layers(layers), "a count above 0 or [first, last + 1]")
        need(
            "slots", type(slots) is int and 0 < slots <= MOST_RANKS, f"a count above 0, at most {MOST_RANKS}"
        )
        need("slots", slots == 1 or layers is None, "1 for a host with layers")
        host = Host(
            str(ssh),
            tuple(ips),
            tuple(tuple(item) if isinstance(item, list) else item for item in rdma),
            None if memory_gb is None else float(memory_gb),
            tuple(layers) if isinstance(layers, list) else layers,
        )
        return _Entry(host, slots, line, lines)

    def check_unique(self, found: Sequence[_Entry]) -> None:
        seen: dict[str, tuple[_Entry, str]] = {}
        for entry in found:
            for key, name in (("ssh", entry.host.ssh), *(("ips", ip) for ip in entry.host.ips)):
                first, other = seen.setdefault(f"{key} {name.lower()}", (entry, key))
                if first is not entry:
                    raise self.fail(
                        entry.at(key),
                        f"{name} is already the host of line {first.at(other)}: "
                        'use "slots" for several ranks on one host',
                    )

    def check_layers(self, found: Sequence[_Entry]) -> None:
        given = [entry for entry in found if entry.host.layers is not None]
        if given and len(given) < len(found):
            missing = next(entry for entry in found if entry.host.layers is None)
            raise self.fail(
                missing.line,
                f"{missing.host.ssh} has no layers, but others have: give them to all or none",
            )
        spans = [(entry.host.layers, entry) for entry in given if isinstance(entry.host.layers, tuple)]
        if spans and len(spans) < len(given):
            entry = next(entry for entry in given if not isinstance(entry.host.layers, tuple))
            raise self.fail(entry.at("layers"), "layers must be counts on all hosts or spans on all hosts")
        end = 0
        for (first, last), entry in sorted(spans, key=lambda item: item[0]):
            if first > end:
                raise self.fail(entry.at("layers"), f"{_layers(end, first)} on no host")
            if first < end:
                raise self.fail(entry.at("layers"), f"{_layers(first, min(last, end))} on two hosts")
            end = last

    def check_rdma(self, found: Sequence[_Entry]) -> None:
        size = sum(entry.slots for entry in found)
        for entry in found:
            if entry.host.rdma and len(entry.host.rdma) != size:
                raise self.fail(
                    entry.at("rdma"), f"rdma has {len(entry.host.rdma)} entries, but there are {size} ranks"
                )

    def with_addresses(self, found: Sequence[_Entry], timeout_s: float) -> list[_Entry]:
        wanted = {name for entry in found for name in entry.host.ips or (entry.host.ssh,)}
        addresses = names.resolve(wanted, timeout_s)
        for entry in found:
            for name in entry.host.ips or (entry.host.ssh,):
                if name not in addresses:
                    raise self.fail(
                        entry.at("ips" if entry.host.ips else "ssh"),
                        f'{name} is an IPv6 address, but mlx takes only IPv4: give its IPv4 address in "ips"'
                        if names.is_ipv6(name)
                        else f"cannot find the address of {name} within {timeout_s:g} s: "
                        'check the name and that the machine is on, or give its "ips"',
                    )
        return [
            replace(entry, host=replace(entry.host, ips=tuple(addresses[n] for n in e)))
            for entry in found
            for e in [entry.host.ips or (entry.host.ssh,)]
        ]


def _layers(first: int, end: int) -> str:
    return f"layer {first} is" if end == first + 1 else f"layers {first} to {end - 1} are"


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_layers(value: Any) -> bool:
    if isinstance(value, list):
        return (
            len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] < value[1] <= MOST_LAYERS
        )
    return type(value) is int and 0 < value <= MOST_LAYERS
