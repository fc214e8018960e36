"""Two ranks with a network between them: tokens/s against its latency and bandwidth, ours and mlx-lm's.

Each rank runs in a network namespace. Bandwidth is shaped with `tc tbf`; delay with `tc netem` where the
kernel has it, else by carrying the packets through TUN devices (programs/delay_link.py). Root on Linux only.
The limit: the stages' compute (one rank's time per token), plus bytes over bandwidth and hops times latency.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import models
from common.engine import Engine, Loop, Timing
from common.processes import BenchmarkError, Program, environment, free_port, pinned_python
from common.report import Report, parser, publish, ratio
from common.servers import PROGRAMS, start_ranks

SPACES = ("lockstep-bench-0", "lockstep-bench-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BATCH = 8
HOP = """
import socket, statistics, time
times = []
for _ in range(30):
    with socket.socket() as probe:
        began_s = time.perf_counter()
        probe.connect_ex(("{}", 9))
        times.append(time.perf_counter() - began_s)
print(statistics.median(times) / 2)
"""


@dataclass(frozen=True)
class Wire:
    """One kind of network. `delay_ms` is one way."""

    name: str
    mbit: int
    delay_ms: float = 0.0
    jitter_ms: float = 0.0


WIRES = (
    Wire("Thunderbolt-like", 20000),
    Wire("10 GbE", 10000),
    Wire("1 GbE", 1000),
    Wire("1 GbE + 1 ms", 1000, 1.0),
    Wire("1 GbE + 2 ms", 1000, 2.0),
    Wire("Wi-Fi", 300, 5.0, 1.0),
)


@dataclass
class Line:
    """One form over one wire. `hops_s` is the one-way time that was measured there."""

    wire: Wire
    form: str
    hop_s: float
    single: list[Timing] = field(default_factory=list)
    batch: list[Timing] = field(default_factory=list)


class Ranks(Program):
    """Rank 0's program, with the other ranks' beside it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], stdin: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        hostfile = Path(self._folder.name) / "hosts.json"
        hostfile.write_text(json.dumps([[f"{address}:{free_port()}"] for address in ADDRESSES]))
        common = {**environment(), **env, "MLX_HOSTFILE": str(hostfile), "LOCKSTEP_BACKEND": "ring"}
        common |= {"LOCKSTEP_WORLD_SIZE": "2", "LOCKSTEP_LOCAL_SIZE": "1"}
        self._other = Program(argv, common | {"MLX_RANK": "1"}, prefix=inside(1))
        super().__init__(argv, common | {"MLX_RANK": "0"}, stdin=stdin, prefix=inside(0))

    def tail(self, lines: int = 12) -> str:
        return super().tail(lines) + self._other.tail(lines)

    def pause(self) -> None:
        super().pause()
        self._other.pause()

    def resume(self) -> None:
        super().resume()
        self._other.resume()

    def stop(self) -> None:
        self._other.stop()
        super().stop()
        self._folder.cleanup()


def main() -> int:
    options = parser(__doc__, minutes=9)
    chosen = options.parse_args()
    if problem := why_not():
        print(f"network.py: {problem}", file=sys.stderr)
        return 2
    began_s = time.monotonic()
    shape = models.QUICK if chosen.quick else models.FULL
    wires = (WIRES[2], WIRES[-1]) if chosen.quick else WIRES
    forms = ("pipeline",) if chosen.quick else ("pipeline", "tensor")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        python = pinned_python(Path(folder))
        alone = measure_alone(models.folder(shape), python, Path(folder))
        for wire in wires:
            if time.monotonic() - began_s > 60 * chosen.minutes - 75:
                break
            with network(wire), ExitStack() as stack:
                hop_s = hop_time_s()
                contestants = start(models.folder(shape), python, Path(folder), forms, stack)
                lines += race(wire, hop_s, contestants, 1 if chosen.quick else 2)
    return publish(make_report(lines, alone, shape), chosen, began_s)


def why_not() -> str:
    """What is missing here, if anything."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing: install iproute2"
    made = subprocess.run(["ip", "netns", "add", "lockstep-try"], capture_output=True, text=True, timeout=20)
    if made.returncode:
        return f"network namespaces do not work here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "lockstep-try"], timeout=20)
    return ""


def inside(rank: int) -> list[str]:
    return ["ip", "netns", "exec", SPACES[rank]]


@contextmanager
def network(wire: Wire) -> Iterator[None]:
    """Two namespaces joined by this wire."""
    do(*(f"ip netns del {space}" for space in SPACES), check=False)
    with ExitStack() as stack:
        for space in SPACES:
            do(f"ip netns add {space}", f"ip -n {space} link set lo up")
            stack.callback(do, f"ip netns del {space}", check=False)
        delayed = wire.delay_ms > 0 and not has_netem()
        devices = ("lsdelay0", "lsdelay1") if delayed else ("lsveth0", "lsveth1")
        if delayed:
            places = [part for place in zip(SPACES, ADDRESSES, strict=True) for part in place]
            argv = [sys.executable, str(PROGRAMS / "delay_link.py"), str(wire.delay_ms), str(wire.jitter_ms)]
            relay = stack.enter_context(Program([*argv, *places], stdin=True))
            relay.listen(20)
        else:
            do(f"ip link add lsveth0 netns {SPACES[0]} type veth peer name lsveth1 netns {SPACES[1]}")
        for space, device, address in zip(SPACES, devices, ADDRESSES, strict=True):
            if not delayed:
                do(f"ip -n {space} addr add {address}/24 dev {device}", f"ip -n {space} link set {device} up")
            shape(space, device, wire, netem=wire.delay_ms > 0 and not delayed)
        yield


def shape(space: str, device: str, wire: Wire, netem: bool) -> None:
    burst = max(64_000, wire.mbit * 125)
    bandwidth = f"tbf rate {wire.mbit}mbit burst {burst} latency 100ms"
    if netem:
        delay = f"netem delay {wire.delay_ms}ms {wire.jitter_ms}ms"
        do(f"tc -n {space} qdisc add dev {device} root handle 1: {delay}")
        do(f"tc -n {space} qdisc add dev {device} parent 1: handle 2: {bandwidth}")
    else:
        do(f"tc -n {space} qdisc add dev {device} root {bandwidth}")


def has_netem() -> bool:
    """Whether the kernel can delay packets, tried on the first namespace's loopback."""
    tried = subprocess.run(
        ["tc", "-n", SPACES[0], "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
        capture_output=True,
        timeout=20,
    )
    if tried.returncode == 0:
        do(f"tc -n {SPACES[0]} qdisc del dev lo root")
    return tried.returncode == 0


def do(*commands: str, check: bool = True) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
        if check and done.returncode:
            raise BenchmarkError(f"{command}: {done.stderr.strip()}")


def hop_time_s() -> float:
    """One way, from how long a refused connection takes."""
    code = HOP.format(ADDRESSES[1])
    done = subprocess.run(
        [*inside(0), sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    return float(done.stdout)


def measure_alone(model: Path, python: Path, folder: Path) -> tuple[Timing, Timing]:
    """One rank without a network."""
    argv = start_ranks(python, "ring", 1, ["-m", "lockstep", "serve", "--model", str(model)])
    with Engine("1 rank", folder, lambda env: Program(argv, {**environment(), **env})) as engine:
        engine.wait_until_ready()
        engine.wake()
        return engine.generate(1, 16, 24), engine.generate(BATCH, 16, 24)


def start(model: Path, python: Path, folder: Path, forms: Sequence[str], stack: ExitStack) -> dict[str, Any]:
    """Ours and mlx-lm's own loop in each form, ready and quiet."""
    found: dict[str, Any] = {}
    for form in forms:
        serve = [str(python), "-m", "lockstep", "serve", "--model", str(model), "--parallel", form]
        loop = [str(python), str(PROGRAMS / "bare_loop.py"), str(model), form]
        found[f"lockstep, {form}"] = lambda serve=serve, form=form: Engine(
            f"lockstep, {form}", folder, lambda env: Ranks(serve, env)
        )
        found[f"mlx-lm loop, {form}"] = lambda loop=loop, form=form: Loop(
            f"mlx-lm loop, {form}", Ranks(loop, {}, stdin=True)
        )
    running = {}
    for key, begin in found.items():
        contestant = stack.enter_context(begin())
        contestant.wait_until_ready()
        contestant.quieten()
        running[key] = contestant
    return running


def race(wire: Wire, hop_s: float, contestants: Mapping[str, Any], rounds: int) -> list[Line]:
    lines = {key: Line(wire, key, hop_s) for key in contestants}
    for _ in range(rounds):
        for key, contestant in contestants.items():
            contestant.wake()
            lines[key].single.append(contestant.generate(1, 16, 16))
            lines[key].batch.append(contestant.generate(BATCH, 16, 16))
            contestant.quieten()
    return list(lines.values())


def limit_s(line: Line, alone_s: float, rows: int, shape: models.Shape) -> float:
    """The least time per token of one sequence: compute, hops and bytes that nothing can overlap."""
    size = 4 * shape.hidden * rows
    bytes_s = size * 8 / (line.wire.mbit * 1e6)
    if line.form.endswith("tensor"):
        exchanges = 2 * shape.layers
        return alone_s / 2 + exchanges * (line.hop_s + bytes_s)
    # There with the token in the next step, and back with the hidden state.
    return alone_s + 2 * line.hop_s + bytes_s


def make_report(lines: Sequence[Line], alone: tuple[Timing, Timing], shape: models.Shape) -> Report:
    columns = ["network", "one way", "form", "tokens/s", "limit", "of limit", f"batch of {BATCH}"]
    report = Report("network", f"2 ranks over a network, {shape.name}", columns)
    for line in lines:
        single = statistics.median(timing.decode_tokens_per_s for timing in line.single)
        batch = statistics.median(timing.decode_tokens_per_s for timing in line.batch)
        limit = 1 / limit_s(line, alone[0].token_s, 1, shape)
        row = [line.wire.name, f"{1e3 * line.hop_s:.2f} ms", line.form, f"{single:.1f}", f"{limit:.1f}"]
        report.rows.append([*row, f"{100 * single / limit:.0f}%", f"{batch:.1f}"])
    report.notes = [
        f"1 rank without a network: {alone[0].decode_tokens_per_s:.1f} tokens/s, batch "
        f"{alone[1].decode_tokens_per_s:.1f}. One way: half of what a refused connection takes. The limit is "
        "that of one request: 2 hops per token in a pipeline; 2 per layer and half of the compute in tensor "
        "parallel.",
        *(over_peer(lines, form) for form in ("pipeline", "tensor") if any(form in ln.form for ln in lines)),
    ]
    report.data["lines"] = [
        {
            "network": vars(line.wire),
            "form": line.form,
            "hop_s": line.hop_s,
            "tokens_per_s": [timing.decode_tokens_per_s for timing in line.single],
            "batch_tokens_per_s": [timing.decode_tokens_per_s for timing in line.batch],
            "limit_tokens_per_s": 1 / limit_s(line, alone[0].token_s, 1, shape),
        }
        for line in lines
    ]
    report.plot = lambda figure: draw(figure, lines, alone, shape)
    return report


def over_peer(lines: Sequence[Line], form: str) -> str:
    ours = [line for line in lines if line.form == f"lockstep, {form}"]
    theirs = [line for line in lines if line.form == f"mlx-lm loop, {form}"]
    parts = []
    for a, b in zip(ours, theirs, strict=True):
        single, batch = (
            ratio([t.decode_tokens_per_s for t in x], [t.decode_tokens_per_s for t in y])
            for x, y in ((a.single, b.single), (a.batch, b.batch))
        )
        parts.append(f"{a.wire.name} {single:.2f} x (batch {batch:.2f} x)")
    return f"Ours over mlx-lm's loop, {form}: {', '.join(parts)}."


def draw(figure: Any, lines: Sequence[Line], alone: tuple[Timing, Timing], shape: models.Shape) -> None:
    for axes, kind in zip(figure.subplots(1, 2), ("single", "batch"), strict=True):
        for form in dict.fromkeys(line.form for line in lines):
            own = sorted((line for line in lines if line.form == form), key=lambda line: line.hop_s)
            hops = [1e3 * line.hop_s for line in own]
            rates = [statistics.median(t.decode_tokens_per_s for t in getattr(line, kind)) for line in own]
            (drawn,) = axes.plot(hops, rates, "o-", label=form)
            if kind == "single" and form.startswith("lockstep"):
                limits = [1 / limit_s(line, alone[0].token_s, 1, shape) for line in own]
                axes.plot(hops, limits, ":", color=drawn.get_color(), label=f"limit, {form.split()[-1]}")
        axes.set_xlabel("one way, ms")
        axes.set_ylabel("tokens/s, " + ("1 request" if kind == "single" else f"batch of {BATCH}"))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
