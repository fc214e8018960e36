"""The benchmarks are programs beside the package: their shared modules are importable from their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
