"""What each rank is given to compute, and in what form CPUs hold it."""

from __future__ import annotations

import mlx.core as mx
import msgspec
import pytest

from lockstep.errors import DoesNotFit
from lockstep.model import checkpoint
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.partition import WORKING_BYTES
from lockstep.model.quantized import Held
from lockstep.model.tensor import loader as tensor
from lockstep.runtime.division import by_layers, by_tensors, speeds
from lockstep.runtime.messages import Hello
from lockstep.runtime.options import ModelOptions
from lockstep.runtime.rank import World
from model import tiny
from model.two_ranks import TwoRanks
from runtime.test_agreement import FIRST, other

OPTIONS = ModelOptions(context=16)
TWO = World(0, 2, "ring", TwoRanks(), None, None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: array.astype(mx.bfloat16) for name, array in weights.items()},
    )
    return checkpoint.inspect(folder)


def needed(found: Checkpoint, held: Held) -> int:
    """Bytes that one rank needs for the whole model and 16 tokens."""
    costs = checkpoint.costs(found, held)
    cache = sum(costs.kv_bytes(layer, 16) for layer in range(costs.layers))
    return costs.total_bytes + max(cache, costs.largest_tensor_bytes) + WORKING_BYTES


def with_memory(hello: Hello, count: int) -> Hello:
    return msgspec.structs.replace(hello, memory_bytes=count)


def test_weights_become_float32_where_they_fit_and_stay_as_stored_where_only_that_does(
    found: Checkpoint,
) -> None:
    world = World(0, 1, "none", None, None, None)
    enough, least = needed(found, "float32"), needed(found, "compact")
    assert least < enough
    for memory, compact in ((enough, False), (enough - 1, True), (least, True)):
        divided = by_layers(world, found, [with_memory(FIRST, memory)], OPTIONS)
        assert divided.assignment.compact == compact == bool(divided.too_little)
    # That it would not fit as stored either is what counts then.
    with pytest.raises(DoesNotFit, match=f"needs {least / 1e9:.2f} GB for layers 0-5"):
        by_layers(world, found, [with_memory(FIRST, least - 1)], OPTIONS)


def test_one_rank_with_too_little_memory_decides_for_all(found: Checkpoint) -> None:
    half = ModelOptions(split="3,3", context=16)
    enough = with_memory(FIRST, needed(found, "float32"))
    little = with_memory(other(), WORKING_BYTES + (needed(found, "float32") - WORKING_BYTES) // 3)
    assert not by_layers(TWO, found, [enough, other()], half).assignment.compact
    assert by_layers(TWO, found, [enough, little], half).assignment.compact


def test_tensor_ranks_hold_as_stored_what_they_cannot_hold_in_float32(found: Checkpoint) -> None:
    dense, compact = (
        WORKING_BYTES + (needed(found, held) - WORKING_BYTES) * 3 // 4 for held in ("float32", "compact")
    )
    cut = tensor.check(found, [1.0, 1.0], TwoRanks())
    for memory, expected in ((dense, False), (compact, True)):
        ranks = [with_memory(hello, memory) for hello in (FIRST, other())]
        assignment = by_tensors(cut, found, ranks, OPTIONS).assignment
        assert (assignment.parallel, assignment.compact) == ("tensor", expected)
    with pytest.raises(DoesNotFit, match=r"rank 0 \(a\) needs"):
        by_tensors(cut, found, [with_memory(h, WORKING_BYTES) for h in (FIRST, other())], OPTIONS)


def test_for_graphics_cards_there_is_no_other_form(found: Checkpoint) -> None:
    card = msgspec.structs.replace(FIRST, float32=False, memory_bytes=WORKING_BYTES)
    with pytest.raises(DoesNotFit):
        by_layers(World(0, 1, "none", None, None, None), found, [card], OPTIONS)


def test_nearly_equal_machines_count_as_equal() -> None:
    assert speeds([FIRST, other(bytes_per_s=8e9)]) == [1.0, 1.0]


def test_ranks_that_share_a_host_and_a_device_are_equally_fast() -> None:
    disturbed = msgspec.structs.replace(FIRST, rank=1, bytes_per_s=2e9)
    assert speeds([FIRST, disturbed]) == [1.0, 1.0]


def test_a_faster_machine_counts_as_much_as_it_is_faster() -> None:
    assert speeds([FIRST, other(bytes_per_s=30e9)]) == [1.0, 3.0]
