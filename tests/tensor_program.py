"""What one rank does in the tests of tensor parallelism: every checkpoint, cut and whole, and the difference.

Arguments: folder of checkpoints, backend, weights per rank, dtype of sums or nothing, size up to which sums
are exchanged, "compact" for weights as stored. Prints one line of JSON, by checkpoint.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from lockstep.errors import UsageError
from lockstep.model.checkpoint import inspect
from lockstep.model.loader import open_model
from lockstep.model.tensor.loader import load
from lockstep.model.tensor.plan import plan

PROMPT = [[3, 5, 7, 11, 13, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 1, 9], [*range(40, 60)]]


def logits(forward: Any, cache: list[Any]) -> list[mx.array]:
    """Of a prompt in two chunks, the first without logits, and three tokens after it, for two rows."""
    steps = [PROMPT[0][:12], PROMPT[0][12:], [1], [2], [3]]
    rows = [PROMPT[1][:12], PROMPT[1][12:], [4], [5], [6]]
    results = []
    for tokens in zip(steps, rows, strict=True):
        output = forward(mx.array(tokens), cache)
        mx.eval(output, [c.state for c in cache])
        results.append(output)
    return results


def argmax_alone(shard: Any) -> bool:
    """Whether a pass in which only the largest logits are exchanged finds the right places."""
    prompt = mx.array(PROMPT)
    whole = shard.forward(prompt, shard.make_cache(), "logits")
    mx.eval(whole)  # In one evaluation, passes meet in an order that need not be the same on all ranks.
    best = shard.forward(prompt, shard.make_cache(), "argmax")
    return bool(best.shape == prompt.shape and (mx.argmax(whole, -1) == best).all())


def shared(shard: Any, rank: int) -> list[Any]:
    """The tokens that every rank has after rank 0 has drawn them: by argmax, and anyhow."""
    cache, tokens = shard.make_cache(), mx.array([row[-1:] for row in PROMPT])
    best = shard.forward(tokens, cache, "argmax")
    known = shard.broadcast(best if rank == 0 else None, best)
    mx.eval(known)
    logits = shard.forward(known, cache, "logits")
    drawn = shard.broadcast(mx.array([[11], [12]]) if rank == 0 else None, logits)
    mx.eval(drawn, [c.state for c in cache])
    return [known.tolist() == best.tolist(), drawn.tolist()]


def check(
    path: Path,
    weights: list[float],
    group: mx.distributed.Group,
    wire: str,
    exchanged_bytes: int,
    compact: bool,
) -> dict[str, Any]:
    try:
        loaded = load(
            inspect(path),
            weights,
            group,
            wire=getattr(mx, wire) if wire else None,
            exchanged_bytes=exchanged_bytes,
            compact=compact,
        )
    except UsageError as error:
        return {"refused": str(error)}
    shard = loaded.shard
    cache = shard.make_cache()
    mine = logits(shard.forward, cache)
    dot = io.StringIO()
    mx.export_to_dot(dot, shard.forward(mx.array([[1], [2]]), cache))
    whole, _ = load_model(path)
    expected = logits(lambda tokens, cache: whole(tokens, cache=cache), make_prompt_cache(whole))
    stored, _, _ = open_model(path)
    return {
        "error": max(
            float(mx.abs(a - b).max() / mx.abs(b).max()) for a, b in zip(mine, expected, strict=True)
        ),
        "all_reduces": dot.getvalue().count("AllReduce"),
        "all_gathers": dot.getvalue().count("AllGather"),
        "argmax": argmax_alone(shard),
        "shared": shared(shard, group.rank()),
        "layers": len(whole.layers),
        "read": loaded.bytes_read,
        "shard": plan(stored, weights).held_bytes(group.rank()),
        "kv_heads": [getattr(c, "keys", mx.zeros((1, 0))).shape[1] for c in cache],
    }


def main() -> None:
    folder, backend, weights, wire = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
    exchanged, compact = int(sys.argv[5]), sys.argv[6:] == ["compact"]
    group = mx.distributed.init(strict=True, backend=backend)
    assert group.size() == len(weights)
    paths = sorted(folder.iterdir())
    print(json.dumps({path.name: check(path, weights, group, wire, exchanged, compact) for path in paths}))


if __name__ == "__main__":
    main()
