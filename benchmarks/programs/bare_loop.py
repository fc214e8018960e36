"""The least that batched decoding can cost: mlx-lm's model, its plain caches, one loop. No server, no ranks.

For each line "ROWS PROMPT TOKENS" on stdin, answers with one line of JSON.
"""

import json
import random
import sys
import time

from lockstep.model.precision import prepare_blas

blas = prepare_blas(1)

from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

model, config = load_model(Path(sys.argv[1]))
rng = random.Random(0)


def generate(rows: int, prompt: int, tokens: int) -> dict[str, float]:
    """Greedy decoding of `rows` random prompts at once; the next step is built while one is computed."""
    ids = mx.array([[rng.randrange(300, config["vocab_size"]) for _ in range(prompt)] for _ in range(rows)])
    began_s = time.perf_counter()
    cache = make_prompt_cache(model)
    model.model(ids[:, :-1], cache)
    mx.eval([layer.state for layer in cache])
    prefilled_s = time.perf_counter()
    last = step(ids[:, -1:], cache)
    for _ in range(tokens - 1):
        following = step(last[:, None], cache)
        last.tolist()
        last = following
    last.tolist()
    ended_s = time.perf_counter()
    return {"wall_s": ended_s - began_s, "decode_s": ended_s - prefilled_s, "tokens": rows * tokens}


def step(ids: mx.array, cache: list) -> mx.array:
    drawn = mx.argmax(model(ids, cache)[:, -1], axis=-1)
    mx.async_eval(drawn)
    return drawn


generate(1, 8, 2)
print(json.dumps({"blas": blas.name}), flush=True)
for line in sys.stdin:
    print(json.dumps(generate(*map(int, line.split()))), flush=True)
