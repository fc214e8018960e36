"""Run every benchmark, or those that are named, one after the other, and refresh README.md.

A benchmark that fails is told, and does not keep the others from running.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COMMANDS = {
    "comm": ["comm.py"],
    "generate": ["generate.py"],
    "generate-wide": ["generate.py", "--wide"],
    "generate-four-bit": ["generate.py", "--four-bit"],
    "generate-llama-8b": ["generate.py", "--llama-8b"],
    "serve": ["serve.py"],
    "compare": ["compare.py"],
    "compare-long": ["compare.py", "--long"],
    "scale": ["scale.py"],
    "network": ["network.py"],
    "overhead": ["overhead.py"],
    "cpu": ["cpu.py"],
}
SPARE_S = 240
"""Beyond a benchmark's own time budget, before it is ended."""


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("names", nargs="*", default=list(COMMANDS), help=", ".join(COMMANDS))
    options.add_argument("--quick", action="store_true")
    options.add_argument("--minutes", type=float, help="time budget of each")
    options.add_argument("--no-readme", action="store_true", help="only print")
    chosen = options.parse_args()
    if unknown := [name for name in chosen.names if name not in COMMANDS]:
        options.error(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(COMMANDS)}")
    failed = []
    for name in chosen.names:
        script, *arguments = COMMANDS[name]
        argv = [sys.executable, str(FOLDER / script), *arguments]
        argv += ["--quick"] if chosen.quick else []
        argv += ["--minutes", str(chosen.minutes)] if chosen.minutes else []
        argv += [] if chosen.no_readme else ["--write-readme"]
        began_s = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            status = subprocess.run(argv, timeout=60 * (chosen.minutes or 10) + SPARE_S).returncode
        except subprocess.TimeoutExpired:
            status = -1
        print(f"== {name}: status {status}, {time.monotonic() - began_s:.0f} s", flush=True)
        if status:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
