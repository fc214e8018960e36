"""One rank alone checks whether a model can be cut: it must never wait for the others."""

from typing import Any

import mlx.core as mx
import pytest

from lockstep.errors import UsageError
from lockstep.model import checkpoint
from lockstep.model.architectures import Support
from lockstep.model.tensor import loader
from model import tiny
from model.two_ranks import TwoRanks


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    def hang(*arguments: Any, **options: Any) -> None:
        pytest.fail("waits for a rank that is not there")

    for name in ("all_sum", "all_gather"):
        monkeypatch.setattr(mx.distributed, name, hang)


def check(name, folder):
    tiny.save(name, folder)
    group: Any = TwoRanks()
    return loader.check(checkpoint.inspect(folder), [1.0, 1.0], group, Support(name, None, None))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "cohere"])
def test_a_check_meets_nobody_and_reads_no_weights(name, tmp_path):
    cut = check(name, tmp_path)
    total = checkpoint.costs(checkpoint.inspect(tmp_path), held="stored").total_bytes
    assert cut.held_bytes(0) + cut.held_bytes(1) < 1.5 * total
    # The files themselves are as they were.
    assert all(mx.isfinite(a).all() for a in mx.load(str(tmp_path / "model.safetensors")).values())


def test_a_model_that_looks_at_its_activations_is_refused(tmp_path):
    with pytest.raises(UsageError, match="looks at its activations while it computes"):
        check("dbrx", tmp_path)
