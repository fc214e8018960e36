"""Times of one model, and of a mixture of experts, on this core: as mlx-lm has them, after each of our
changes for CPUs, and with weights that stay as they are stored.

    cpu_steps.py MODEL SECONDS PROMPT ROWS...

Prints one JSON object: `blas`, and in `times_s`, by form and case, seconds of each round. Every round
measures every form once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lockstep.model.blas import kernels, prepare_blas

BLAS = prepare_blas(1).name

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from lockstep.model.cpu import fit_for_cpu, lay_out_for_cpu  # noqa: E402
from lockstep.model.cpu.experts import cpu_experts, lay_out_experts  # noqa: E402
from lockstep.model.cpu.functions import cpu_functions  # noqa: E402
from lockstep.model.cpu.layout import cpu_layout  # noqa: E402
from lockstep.model.cpu.norms import cpu_norms  # noqa: E402
from lockstep.model.cpu.pages import move_to_large_pages  # noqa: E402
from lockstep.model.cpu.rope import cpu_rope  # noqa: E402
from lockstep.model.cpu.rows import cpu_rows  # noqa: E402
from lockstep.model.cpu.siblings import cpu_siblings  # noqa: E402
from lockstep.model.cpu.tiles import cpu_tiles  # noqa: E402
from lockstep.model.graph import parameters  # noqa: E402


def large_pages(model: nn.Module) -> None:
    mx.eval(model.parameters())
    for weight in parameters(model).values():
        move_to_large_pages(weight)


def layout(model: nn.Module) -> None:
    for change in (cpu_tiles, cpu_experts, cpu_layout, lay_out_experts):
        change(model)


def stored(model: nn.Module, bits: int) -> None:
    model.set_dtype(mx.bfloat16)
    if bits < 16:
        nn.quantize(model, group_size=64, bits=bits)
    fit_for_cpu(model, compact=True)
    lay_out_for_cpu(model, parameters(model))


CHANGES = {
    "+ layout": layout,
    "+ rows": cpu_rows,
    "+ rope": cpu_rope,
    "+ norms": cpu_norms,
    "+ attention, SwiGLU": cpu_functions,
    "+ joint products": lambda model: cpu_siblings(model, parameters(model)),
    "+ large pages": large_pages,
}
STORED = {"stored as bfloat16": 16, "stored in 4 bits": 4}
WITH_EXPERTS = ("mlx-lm", "+ layout", *STORED)
"""The other changes are not for experts."""

CONTEXT, STEPS = 32, 4
HIDDEN, INNER, EXPERTS, ACTIVE = 2048, 768, 16, 4
"""Of the mixture: experts as those of Qwen3 30B A3B, which has 128."""

TOKENS = (1, 64)
"""That the mixture is given at a time."""


def main() -> None:
    path, budget_s, prompt, rows = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    forms = {form: make(Path(path), form) for form in ("mlx-lm", *CHANGES, *STORED)}
    times: dict[str, dict[str, list[float]]] = {form: {} for form in forms}
    deadline_s = time.monotonic() + budget_s
    while not times["mlx-lm"] or time.monotonic() < deadline_s:
        for form, model in forms.items():
            times[form].setdefault(f"prefill of {prompt}", []).append(prefill(model, prompt))
            for count in map(int, rows):
                times[form].setdefault(f"decode of {count}", []).append(decode(model, count))
            for count in TOKENS if form in WITH_EXPERTS else ():
                times[form].setdefault(f"experts, {count}", []).append(experts(model.mixture, count))
    print(json.dumps({"blas": f"{BLAS} for {kernels()}", "times_s": times}), flush=True)


def make(path: Path, form: str) -> Any:
    """The model in this form, with a mixture of experts if that is for them, too."""
    model, _ = load_model(path)
    if form in WITH_EXPERTS:
        model.mixture = SwitchGLU(HIDDEN, INNER, EXPERTS)
    if form in STORED:
        stored(model, STORED[form])
    elif form in CHANGES:
        for change in list(CHANGES.values())[: list(CHANGES).index(form) + 1]:
            change(model)
    mx.eval(model.parameters())
    return model


def prefill(model: Any, tokens: int) -> float:
    """Seconds for the cache of one prompt; the head is not computed."""
    cache = make_prompt_cache(model)
    began_s = time.perf_counter()
    model(mx.zeros((1, tokens), mx.int32), cache=cache)
    mx.eval([layer.state for layer in cache])
    return time.perf_counter() - began_s


def decode(model: Any, rows: int) -> float:
    """Seconds per step, the best of a few; rows of different lengths, as a server has them."""
    cache = [BatchKVCache(list(range(rows))) for _ in make_prompt_cache(model)]
    mx.eval(model(mx.zeros((rows, CONTEXT + rows), mx.int32), cache=cache))
    best_s = float("inf")
    for _ in range(STEPS):
        began_s = time.perf_counter()
        logits = model(mx.zeros((rows, 1), mx.int32), cache=cache)
        mx.eval(mx.argmax(logits[:, -1], axis=-1), [layer.state for layer in cache])
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


def experts(mixture: SwitchGLU, tokens: int) -> float:
    """Seconds for so many tokens, the best of a few; each with experts of its own."""
    x = mx.random.normal((1, tokens, HIDDEN))
    chosen = mx.argsort(mx.random.uniform(shape=(1, tokens, EXPERTS)))[..., :ACTIVE]
    mx.eval(x, chosen)
    best_s = float("inf")
    for _ in range(STEPS):
        began_s = time.perf_counter()
        mx.eval(mixture(x, chosen))
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


if __name__ == "__main__":
    main()
