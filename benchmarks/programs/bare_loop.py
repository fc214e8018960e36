"""The least that decoding can cost: mlx-lm's model, its plain caches, one loop. No server and no scheduler.

    bare_loop.py MODEL [pipeline|tensor]

Alone, or the same program on every rank, with mlx-lm's own distributed forms. For each line "ROWS PROMPT
TOKENS" on rank 0's stdin, rank 0 answers with one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from lockstep.model.blas import prepare_blas
from lockstep.runtime.environment import RankEnvironment

blas = prepare_blas(RankEnvironment.read(os.environ).local_size)

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model, sharded_load  # noqa: E402

path, form = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "alone"
group = mx.distributed.init()
if form == "alone":
    model, _ = load_model(Path(path))
else:
    model, _ = sharded_load(path, **{f"{form}_group": group})
vocab = json.loads((Path(path) / "config.json").read_text())["vocab_size"]
rng = random.Random(0)


def generate(rows: int, prompt: int, tokens: int) -> dict[str, float]:
    """Greedy decoding of `rows` random prompts at once; the next step is built while one is computed."""
    ids = mx.array([[rng.randrange(300, vocab) for _ in range(prompt)] for _ in range(rows)])
    began_s = time.perf_counter()
    cache = make_prompt_cache(model)
    if prompt > 1:
        hidden = model.model(ids[:, :-1], cache)
        # In a pipeline the last stages have to finish their communication before the next pass.
        mx.eval(hidden, [layer.state for layer in cache])
    last = step(ids[:, -1:], cache)
    first_s = 0.0
    for number in range(tokens):
        following = step(last[:, None], cache) if number < tokens - 1 else last
        last.tolist()
        first_s = first_s or time.perf_counter() - began_s
        last = following
    return {"first_s": first_s, "wall_s": time.perf_counter() - began_s}


def step(ids: mx.array, cache: list[Any]) -> mx.array:
    drawn = mx.argmax(model(ids, cache)[:, -1], axis=-1)
    mx.async_eval(drawn)
    return drawn


def commands() -> Any:
    """Rank 0 reads them; the others hear of them in a collective, as in mlx-lm's server."""
    while True:
        line = sys.stdin.readline() if group.rank() == 0 else ""
        numbers = list(map(int, line.split())) or [0, 0, 0]
        if group.size() > 1:
            numbers = mx.distributed.all_sum(mx.array(numbers)).tolist()
        if not numbers[0]:
            return
        yield numbers


def say(value: dict[str, Any]) -> None:
    if group.rank() == 0:
        print(json.dumps(value), flush=True)


generate(1, 8, 2)
say({"blas": blas.name})
for numbers in commands():
    say(generate(*numbers))
