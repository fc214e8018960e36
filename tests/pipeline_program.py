"""What one rank does in the tests of the pipeline: every checkpoint in a folder, as its stage of a chain.

Arguments: folder, backend. Prints one line of JSON: by checkpoint, the bytes of this rank's weights and,
on rank 0, how far the logits are from those of the whole model and how many bytes that one has.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from lockstep.model.checkpoint import inspect
from lockstep.model.loader import load
from lockstep.model.pipeline import Neighbours
from lockstep.model.whole import Whole
from lockstep.runtime import libmpi
from model import scenario

# Uneven on purpose, indexed by rank; all of the checkpoints have 6 layers.
SPANS = {1: [(0, 6)], 2: [(2, 6), (0, 2)], 3: [(5, 6), (1, 5), (0, 1)]}
SCENARIOS = (scenario.single, scenario.joined, scenario.padded)


def check(path: Path, group: mx.distributed.Group) -> dict[str, Any]:
    rank, size = group.rank(), group.size()
    neighbours = Neighbours(group, mx.new_stream(mx.cpu)) if size > 1 else None
    loaded = load(inspect(path), SPANS[size][rank], rank, size, neighbours)
    mine = [run([loaded.shard]) for run in SCENARIOS]
    result = {"weight_bytes": loaded.weight_bytes, "vocab_size": loaded.shard.vocab_size}
    if rank == 0:
        model, _ = load_model(path)
        whole = [run([Whole(model)]) for run in SCENARIOS]
        result["error"] = max(map(scenario.difference, mine, whole))
        result["active_bytes"] = mx.get_active_memory()
    return result


def main() -> None:
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    libmpi.prepare(os.environ)
    group = mx.distributed.init(backend=backend)
    print(json.dumps({path.name: check(path, group) for path in sorted(folder.iterdir())}))


def end_together(*error: Any) -> None:
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.excepthook = end_together
    main()
