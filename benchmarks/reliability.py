"""What a failure costs: time to detection, time to the first token after it, and whether the text is right.

    python benchmarks/reliability.py              the table, with a tiny model
    python benchmarks/reliability.py --soak 50    and 50 random faults under 8 clients, with the default model
    python benchmarks/reliability.py --soak 50 --keep-table    only those; the table stays as it is

Writes docs/reliability.md. Network faults need root and network namespaces; they are left out elsewhere.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cluster import Cluster, Stream, tiny_checkpoint  # noqa: E402
from lockstep.launch.restarts import SHORT_LIFE_S  # noqa: E402
from lockstep.runtime import beats, faults  # noqa: E402
from namespaces import Link, unavailable  # noqa: E402

PROMPT = "the quick brown"
STEP_TIMEOUT_S = 3.0
SHAPES = (("ring", 2), ("mpi", 2), ("ring", 3), ("mpi", 3), ("ring", 1))
INJECTED = {
    "exception": "raise",
    "exit 0": "exit0",
    "out of memory": "oom",
    "main thread frozen": "freeze",
    "wrong step": "wrong-step",
}
FAULT_STEP = 500
"""More steps than one stream takes, so that none is struck twice: what is left of one is done before."""
SILENCE_S = 0.5
"""Between two pieces of text, only if something is wrong."""
SPARE_CPU_S = 0.5
"""A front process that has used less has hardly begun to load."""
SIGNALS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


@dataclass(frozen=True)
class Row:
    """One fault and what became of it. Times in seconds from the fault; None: it did not happen."""

    fault: str
    shape: str
    victim: str
    detected_s: float | None
    first_token_s: float | None
    same_text: bool
    reason: str

    def cells(self) -> list[str]:
        seconds = ["-" if s is None else f"{s:.1f}" for s in (self.detected_s, self.first_token_s)]
        return [self.fault, self.shape, self.victim, *seconds, "yes" if self.same_text else "NO", self.reason]


@contextmanager
def serving(folder: Path, backend: str, ranks: int, model: Path, **env: str) -> Iterator[Cluster]:
    arguments = ("-n", str(ranks), "--backend", backend, "--model", str(model), "--restarts", "1000")
    env = {"LOCKSTEP_STEP_TIMEOUT": str(STEP_TIMEOUT_S)} | env
    with Cluster(folder, *arguments, env=env) as cluster:
        yield cluster.wait_ready()


def named(backend: str, ranks: int) -> str:
    return f"{ranks} ranks, {backend}" if ranks > 1 else "1 rank"


def wait_for_spare(cluster: Cluster) -> None:
    """Until the spare front process is there and has loaded."""
    deadline_s = time.monotonic() + 60
    while (spare := cluster.spare_front()) is None or spare.cpu_times().user < SPARE_CPU_S:
        assert time.monotonic() < deadline_s, "no spare front process"
        time.sleep(0.2)
    busy_s = -1.0
    while (now_s := sum(spare.cpu_times()[:2])) > busy_s:
        busy_s = now_s
        time.sleep(0.5)


def wait_for_text(stream: Stream, pieces: int) -> None:
    deadline_s = time.monotonic() + 60
    while len(stream.arrived_s) < pieces and not stream.error and time.monotonic() < deadline_s:
        time.sleep(0.005)


def watch_recovery(
    cluster: Cluster, stream: Stream, struck_s: float
) -> tuple[float | None, float | None, str]:
    """Seconds to detection and to the next text, and the reason that is given."""
    detected_s: float | None = None
    while stream.is_alive() and detected_s is None:
        if not cluster.status()["ready"]:
            detected_s = time.monotonic() - struck_s
        time.sleep(0.02)
    stream.join(120)
    return detected_s, stream.gap_after_s(struck_s), cluster.status()["reason"]


def by_signal(cluster: Cluster, shape: str, name: str, victim: int, expected: str) -> Row:
    pid = cluster.pid(victim)
    stream = cluster.stream(PROMPT)
    wait_for_text(stream, 20)
    struck_s = time.monotonic()
    os.kill(pid, SIGNALS[name])
    detected_s, first_s, reason = watch_recovery(cluster, stream, struck_s)
    same = not stream.error and stream.text == expected
    return Row(name, shape, f"rank {victim}", detected_s, first_s, same, reason)


def by_injection(folder: Path, shape: tuple[str, int], model: Path, expected: str) -> Iterator[Row]:
    """Every fault in every rank, each in another start of the ranks; none sends rank 0 a step.

    Each start is given time to become old, because a pause follows several short ones.
    """
    backend, ranks = shape
    names = INJECTED if ranks == 2 else ("exception", "exit 0", "out of memory")
    planned = [(name, rank) for name in names for rank in range(name == "wrong step", ranks)]
    wanted = ";".join(
        f"rank={rank},step={FAULT_STEP},action={INJECTED[name]},attempt={attempt}"
        for attempt, (name, rank) in enumerate(planned)
    )
    with serving(folder, backend, ranks, model, LOCKSTEP_FAULT=wanted) as cluster:
        for attempt, (name, rank) in enumerate(planned):
            time.sleep(SHORT_LIFE_S)
            stream, struck_s = struck_stream(cluster, attempt)
            detected_s, first_s, reason = watch_recovery(cluster, stream, struck_s)
            same = not stream.error and stream.text == expected
            cluster.wait_status(lambda s, done=attempt: s["ready"] and s["restarts"] > done)
            yield Row(name, named(backend, ranks), f"rank {rank}", detected_s, first_s, same, reason)


def struck_stream(cluster: Cluster, attempt: int) -> tuple[Stream, float]:
    """The stream that the fault of this start of the ranks strikes, and when."""
    while True:
        stream = cluster.stream(PROMPT)
        wait_for_text(stream, 1)
        while stream.is_alive() and time.monotonic() - stream.arrived_s[-1] < SILENCE_S:
            time.sleep(0.005)
        if stream.is_alive() or cluster.status()["restarts"] > attempt:
            return stream, max(t for t in stream.arrived_s if t <= time.monotonic() - SILENCE_S)
        stream.join()


def front_lost(cluster: Cluster, shape: str, name: str, expected: str) -> Row:
    wait_for_spare(cluster)
    engine = [rank["pid"] for rank in cluster.status()["ranks"]]
    front = cluster.front().pid
    stream = cluster.stream(PROMPT)
    wait_for_text(stream, 20)
    struck_s = time.monotonic()
    os.kill(front, SIGNALS[name])
    while psutil.pid_exists(front) or not cluster.answers():
        time.sleep(0.02)
    back_s = time.monotonic() - struck_s
    again = cluster.stream(PROMPT)
    again.join(60)
    status = cluster.wait_status(lambda s: s["ranks"] and s["running"] == 0)
    same = again.text == expected and [rank["pid"] for rank in status["ranks"]] == engine
    return Row(name, shape, "front process", None, back_s, same, "serves again on the same engine")


def over_a_link(folder: Path, model: Path, name: str, break_it: Callable[[Link], None]) -> Row:
    """Two ranks in two network namespaces; the link between them fails."""
    with Link() as link:
        ring = link.serve(folder, model, STEP_TIMEOUT_S)
        with ring as cluster:
            cluster.wait_ready()
            undisturbed = cluster.stream(PROMPT)
            undisturbed.join(90)
            stream = cluster.stream(PROMPT)
            wait_for_text(stream, 20)
            struck_s = time.monotonic()
            break_it(link)
            detected_s, first_s, reason = watch_recovery(cluster, stream, struck_s)
            same = not stream.error and bool(stream.text) and stream.text == undisturbed.text
            return Row(name, "2 ranks, ring", "link", detected_s, first_s, same, reason)


def table(folder: Path, shapes: tuple[tuple[str, int], ...]) -> list[Row]:
    model = tiny_checkpoint(folder)
    rows: list[Row] = []
    for backend, ranks in shapes:
        shape = named(backend, ranks)
        with serving(folder, backend, ranks, model) as cluster:
            stream = cluster.stream(PROMPT)
            stream.join(60)
            expected = stream.text
            for name in SIGNALS:
                for victim in range(ranks):
                    rows.append(show(by_signal(cluster, shape, name, victim, expected)))
                rows.append(show(front_lost(cluster, shape, name, expected)))
        rows += map(show, by_injection(folder, (backend, ranks), model, expected))
    return rows


def network(folder: Path) -> list[Row]:
    model = tiny_checkpoint(folder)
    return [
        show(over_a_link(folder, model, "link down for 8 s", lambda link: link.down(8))),
        show(over_a_link(folder, model, "all packets dropped for 10 s", lambda link: link.drop(10))),
    ]


def soak(folder: Path, faults: int, model: Path | None, seed: int) -> str:
    """Random faults under 8 streaming clients; returns the paragraph about it."""
    chance = random.Random(seed)
    arguments = ["-n", "2", "--restarts", "1000", *(["--model", str(model)] if model else [])]
    prompts = [f"{number} little ducks went out" for number in range(8)]
    tokens = 400 if model else 60
    recoveries: list[float] = []
    lost = wrong = streams = 0
    with Cluster(folder, *arguments, env={"LOCKSTEP_STEP_TIMEOUT": str(STEP_TIMEOUT_S)}) as cluster:
        cluster.wait_ready()
        undisturbed = {}
        for prompt in prompts:
            stream = cluster.stream(prompt, tokens)
            stream.join(120)
            undisturbed[prompt] = stream.text
        while len(recoveries) < faults:
            clients = [cluster.stream(prompt, tokens) for prompt in prompts]
            wait_for_text(clients[0], chance.randrange(1, 30))
            pid = cluster.pid(chance.randrange(2))
            struck_s = time.monotonic()
            os.kill(pid, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            cluster.wait_status(lambda s: not s["ready"])
            cluster.wait_status(lambda s: s["ready"])
            recoveries.append(time.monotonic() - struck_s)
            for client in clients:
                client.join(180)
                streams += 1
                lost += bool(client.error) or client.is_alive()
                wrong += client.text != undisturbed[client.prompt]
            sys.stderr.write(f"fault {len(recoveries)}: {recoveries[-1]:.1f} s, lost {lost}, wrong {wrong}\n")
        cluster.stop()
        left = len(cluster.left())
    return (
        f"{faults} random faults (kill -9 or SIGSTOP of a random rank) under 8 streaming clients, "
        f"{'a tiny model' if model else 'the default model'}, 2 ranks over ring: {streams} streams, "
        f"{lost} lost, {wrong} with another text than undisturbed, {left} processes left at the end. "
        f"Ready again after {statistics.median(recoveries):.1f} s (median), {max(recoveries):.1f} s at most. "
        f"(`--soak {faults}`)"
    )


def kept_table(out: Path) -> str:
    """The rows of the table that was written last, whatever the text above it was then."""
    columns = HEAD[HEAD.index("| fault |") :]
    return out.read_text().partition(columns)[2].partition("\n\n")[0]


def show(row: Row) -> Row:
    sys.stderr.write(" | ".join(row.cells()) + "\n")
    return row


HEAD = f"""# Reliability

Every rank has a watchdog that looks at progress. When a deadline passes, or a rank ends, all ranks end, the
one to blame is named in the log and in `/cluster/status`, and `lockstep serve` starts the ranks again (at
most `--restarts` times in 10 minutes). The front process keeps unfinished requests and submits them again.
The front process, and a rank that is alone, show the supervisor once a second that they are alive.

| deadline | option of `serve` | environment, for every command | default |
|---|---|---|---|
| all ranks have met | `--join-timeout` | `LOCKSTEP_JOIN_TIMEOUT` | 60 s |
| the model is found (or downloaded), then loaded | `--load-timeout` | `LOCKSTEP_LOAD_TIMEOUT` | 1800 s |
| a step: 20 times the p99 of its kind, at least | `--step-timeout` | `LOCKSTEP_STEP_TIMEOUT` | 10 s |
| running requests, when told to stop | `--drain-timeout` | | 30 s |
| an engine is back | `--recovery-timeout` | | 120 s |
| the front process, and a rank alone, begin to show that they are alive | `--join-timeout` | | 60 s |
| they go on with it; a rank alone also as long as its step may take | | | {beats.SILENCE_S:g} s |

Each is in seconds, at most 1000000. A step of a size that has not been seen yet gets 6 times the shortest
deadline. A host that cannot be reached twice in a row is left out if the model fits on the others
(`--min-ranks`).

## What a failure costs

Made by `python benchmarks/reliability.py`. A tiny random model, one streaming client, `--step-timeout`
{STEP_TIMEOUT_S:g}. Seconds are counted from the fault: until `/ready` says 503, and until the client has
the next text; failures that a rank makes itself are looked at after 0.5 s of silence. "Same text": the
interrupted stream, to its end, equals an undisturbed one. A wrong step is found with the next report of its
rank, within a second: tokens shown before that cannot be taken back.

| fault | ranks | victim | detected (s) | next text (s) | same text | reason in `/cluster/status` |
|---|---|---|---|---|---|---|
"""


TAIL = f"""
## Faults on purpose

```
{faults.__doc__}```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=int, default=0, help="random faults under 8 clients")
    parser.add_argument("--soak-tiny", action="store_true", help="with the tiny model")
    parser.add_argument("--keep-table", action="store_true", help="only the soak")
    parser.add_argument("--quick", action="store_true", help="2 ranks over ring only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notes = []
        if options.keep_table:
            body = kept_table(options.out)
        else:
            rows = table(folder, SHAPES[:1] if options.quick else SHAPES)
            why_not = unavailable()
            rows += [] if why_not else network(folder)
            notes += [f"Network faults were not tried: {why_not}."] if why_not else []
            body = "\n".join("| " + " | ".join(row.cells()) + " |" for row in rows)
        if options.soak:
            model = tiny_checkpoint(folder) if options.soak_tiny else None
            notes.append(soak(folder, options.soak, model, options.seed))
    options.out.write_text(HEAD + body + "\n" + "".join(f"\n{note}\n" for note in notes) + TAIL)


if __name__ == "__main__":
    main()
