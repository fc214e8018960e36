"""Scheduler and executor together, on one rank, with small random models of three kinds of cache."""

from __future__ import annotations

import importlib
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from lockstep.engine.executor import Executor, Pending
from lockstep.engine.limits import Limits
from lockstep.engine.request import Finished, Request, Token
from lockstep.engine.sampler import Draw
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.step import Decode, Step
from lockstep.model.whole import Whole

VOCABULARY = 97
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, **HEADS, "num_hidden_layers": 3, "rms_norm_eps": 1e-5},
    "gemma3_text": {
        **SMALL,
        **HEADS,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "mamba2": {
        **SMALL,
        "num_hidden_layers": 3,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "ssm_state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": (0.0, 1e9),
        "time_step_rank": 8,
        "max_position_embeddings": 1000,
    },
}


class WholeModel(Whole):
    """A shard that is all of a small random model."""

    def __init__(self, kind: str) -> None:
        module = importlib.import_module(f"mlx_lm.models.{kind}")
        mx.random.seed(1)
        model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **MODELS[kind]}))
        model.update(
            tree_map(lambda w: mx.random.normal(w.shape) * 0.15 if w.ndim > 1 else w, model.parameters())
        )
        super().__init__(model)

    def greedy(self, prompt: list[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        cache, tokens, answer = self.make_cache(), prompt, []
        for _ in range(count):
            token = int(self.forward(mx.array([tokens]), cache)[0, -1].argmax())
            if token in stop:
                break
            answer.append(token)
            tokens = [token]
        return answer


class OneRank:
    """Rank 0's loop, without the loop's outside world."""

    def __init__(self, shard: WholeModel, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.executor = Executor(shard, self._draw)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Finished] = {}
        self._draws: dict[int, Draw] = {}
        self._flights: deque[tuple[Step, Pending]] = deque()

    def submit(self, request: Request) -> None:
        self.tokens[request.id] = []
        assert self.scheduler.submit(request) is None

    def cancel(self, name: str) -> None:
        if finished := self.scheduler.cancel(name):
            self.ends[name] = finished

    def turn(self) -> None:
        if step := self.scheduler.next_step():
            self._flights.append((step, self.executor.start(step)))
        elif self._flights:
            step, pending = self._flights.popleft()
            pending.wait()
            draw = self._draws.pop(step.index, None)
            for event in self.scheduler.complete(step, draw.read() if draw else []):
                if isinstance(event, Token):
                    self.tokens[event.id].append(event.token)
                elif isinstance(event, Finished):
                    self.ends[event.id] = event

    def _draw(self, step: Step, output: mx.array) -> Sequence[mx.array]:
        rows, positions = self.scheduler.rows(step), self.scheduler.positions(step)
        argmax = isinstance(step.forward, Decode) and step.forward.argmax
        self._draws[step.index] = Draw(output[:, -1]) if argmax else Draw.of(output[:, -1], rows, positions)
        return self._draws[step.index].arrays()


@pytest.mark.parametrize(
    ("kind", "lanes", "rows", "rush"),
    [*((kind, lanes, 4, 0.3) for kind in MODELS for lanes in (1, 2)), ("llama", 1, 12, 0.8)],
)
def test_answers_do_not_depend_on_batches_moves_chunks_and_reused_prefixes(
    kind: str, lanes: int, rows: int, rush: float
):
    shard, dice = WholeModel(kind), random.Random(7)
    limits = Limits(
        lanes=lanes,
        kv_tokens=4000,
        max_context=400,
        max_rows=rows,
        prefill_chunk=32,
        prompt_cache_tokens=600,
        trimmable=shard.trimmable,
        look_ahead=lanes == 1,
    )
    rank = OneRank(shard, limits)
    shared = [dice.randrange(VOCABULARY) for _ in range(60)]
    prompts: dict[str, list[int]] = {}
    most: dict[str, int] = {}
    stops: dict[str, list[int]] = {}
    while len(prompts) < 30 or not rank.scheduler.idle:
        if len(prompts) < 30 and dice.random() < rush:
            tail = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 30))]
            prompt = shared[: dice.choice([0, 30, 50])] + tail
            if rank.ends and dice.random() < 0.5:
                earlier = dice.choice(list(rank.ends))
                prompt = dice.choice([prompts[earlier], prompts[earlier] + rank.tokens[earlier] + [5, 6]])
            name = str(len(prompts))
            prompts[name], most[name] = prompt, dice.randint(1, 12)
            stops[name] = dice.sample(range(VOCABULARY), dice.choice([0, 0, 10]))
            rank.submit(Request(id=name, prompt=prompt, max_tokens=most[name], stop_tokens=stops[name]))
        if prompts and dice.random() < 0.02:
            rank.cancel(dice.choice(list(prompts)))
        rank.turn()
    for name, prompt in prompts.items():
        cancelled = rank.ends[name].reason == "cancelled"
        count = len(rank.tokens[name]) if cancelled else most[name]
        assert rank.tokens[name] == shard.greedy(prompt, count, stops[name]), f"request {name}"
    reasons = {end.reason for end in rank.ends.values()}
    assert {"stop", "length"} <= reasons
    assert sum(end.cached_tokens for end in rank.ends.values()) > 100, "prefixes were to be reused"
    assert len({tuple(tokens[:3]) for tokens in rank.tokens.values()}) > 5, "the model says one thing only"
