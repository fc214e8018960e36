"""`python -m MODULE ARGUMENTS...` of Lockstep with clocks around the parts of a step.

Nothing of this is in the product: methods are wrapped here, before the program starts. On SIGUSR1 the process
writes what it has measured since the last SIGUSR1 into $BENCH_PROFILE/PID.json, and starts anew. Times are
the calling thread's CPU time, each part without the parts inside it; `wall_s` is the clock on the wall.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.model import blas

PARTS = {
    "lockstep.server.front": [
        ("lockstep.engine.text", "TextStream.feed", "detokenize"),
        ("lockstep.server.link", "FrontLink._take", "take events"),
        ("lockstep.server.stream", "Answer._feed", "make pieces"),
        ("lockstep.server.render", "event", "render JSON"),
        ("lockstep.server.render", "TextForm.chunk", "render JSON"),
    ],
    "lockstep": [
        ("lockstep.runtime.serve", "FrontSource.poll", "poll the front"),
        ("lockstep.runtime.serve", "FrontSource.deliver", "deliver"),
        ("lockstep.engine.scheduler", "Scheduler.submit", "schedule"),
        ("lockstep.engine.scheduler", "Scheduler.next_step", "schedule"),
        ("lockstep.engine.scheduler", "Scheduler.complete", "schedule"),
        ("lockstep.runtime.channel", "Leader.publish", "publish"),
        ("lockstep.runtime.channel", "Follower.waiting", "receive"),
        ("lockstep.runtime.channel", "Follower.receive", "receive"),
        ("lockstep.engine.executor", "Executor.start", "execute"),
        ("lockstep.engine.executor", "Executor._edit", "edit caches"),
        ("lockstep.engine.executor", "Executor._forward", "build forward"),
        ("lockstep.engine.batch", "Batch.state", "collect caches"),
        ("lockstep.engine.executor", "Pending.__init__", "hand to device"),
        ("lockstep.engine.executor", "Pending.wait", "wait for device"),
        ("lockstep.runtime.leader", "LedSteps.finish", "sample"),
        ("lockstep.engine.sampler", "Draw.read", "sample"),
        ("lockstep.runtime.progress", "Progress.began", "tell the watchdog"),
        ("lockstep.runtime.progress", "Progress.finished", "tell the watchdog"),
        ("lockstep.runtime.leader", "LedSteps.done", "loop"),
        ("lockstep.runtime.follower", "FollowedSteps.done", "loop"),
    ],
}

cpu_s: dict[str, float] = defaultdict(float)
wall_s: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
inside: list[list[float]] = []


def clocked(function: Callable[..., Any], name: str, called: str) -> Callable[..., Any]:
    """`function`, timed; what nested timed calls take is theirs."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nested = [0.0, 0.0]
        inside.append(nested)
        began = time.thread_time(), time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.thread_time() - began[0], time.perf_counter() - began[1]
            inside.pop()
            cpu_s[name] += spent[0] - nested[0]
            wall_s[name] += spent[1] - nested[1]
            calls[called] += 1
            if inside:
                inside[-1][0] += spent[0]
                inside[-1][1] += spent[1]

    return wrapper


def install(parts: list[tuple[str, str, str]]) -> list[str]:
    """Wrap what is there; returns what is not (the product moves on, and the report says so)."""
    missing = []
    for module, path, name in parts:
        owner = importlib.import_module(module)
        *classes, function = path.split(".")
        try:
            for part in classes:
                owner = getattr(owner, part)
            setattr(owner, function, clocked(getattr(owner, function), name, path))
        except AttributeError:
            missing.append(f"{module}.{path}")
    return missing


def clock_s() -> float:
    """What one timed call costs in itself: two clocks read before it and after it, and the sums."""
    nothing, began = clocked(lambda: None, "nothing", "nothing"), time.thread_time()
    for _ in range(2000):
        nothing()
    spent = (time.thread_time() - began) / 2000
    for figures in (cpu_s, wall_s, calls):
        figures.clear()
    return spent


def after_blas(do: Callable[[], None]) -> None:
    """Call `do` when the BLAS has been chosen: before that, mlx must not be imported."""
    prepare = blas.prepare_blas

    def prepare_then(*args: int) -> blas.BlasChoice:
        choice = prepare(*args)
        do()
        return choice

    blas.prepare_blas = prepare_then


def threads_s() -> dict[str, float]:
    """CPU seconds of each thread so far, by name; the main thread is "main"."""
    spent: dict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        name = "main" if int(task.name) == os.getpid() else (task / "comm").read_text().strip()
        spent[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return dict(spent)


def main() -> None:
    module, *arguments = sys.argv[1:]
    missing: list[str] = []
    if module == "lockstep":
        after_blas(lambda: missing.extend(install(PARTS[module])))
    else:
        missing += install(PARTS.get(module, []))
    per_call_s = clock_s()
    since = {"threads": threads_s(), "at": time.perf_counter()}

    def write(*_: object) -> None:
        threads = {name: s - since["threads"].get(name, 0.0) for name, s in threads_s().items()}
        record = {
            "module": module,
            "rank": os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0",
            "cpu_s": dict(cpu_s),
            "wall_s": dict(wall_s),
            "calls": dict(calls),
            "threads_s": threads,
            "total_s": time.perf_counter() - since["at"],
            "clock_s": per_call_s,
            "missing": missing,
        }
        file = Path(os.environ["BENCH_PROFILE"]) / f"{os.getpid()}.json"
        file.with_suffix(".part").write_text(json.dumps(record))
        file.with_suffix(".part").rename(file)
        for figures in (cpu_s, wall_s, calls):
            figures.clear()
        since.update(threads=threads_s(), at=time.perf_counter())

    signal.signal(signal.SIGUSR1, write)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


main()
