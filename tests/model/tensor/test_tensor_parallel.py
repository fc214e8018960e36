"""The same tiny models, cut and whole, on 2 and 3 ranks. One start of the ranks checks all of them."""

import json
from pathlib import Path

import pytest

from lockstep.model.tensor.collectives import most_exchanged
from ranks import run_ranks
from tensor_models import make_all

PROGRAM = str(Path(__file__).parent.parent.parent / "tensor_program.py")
RUNS = {
    "two over ring": ("ring", [1, 1], "", 0),
    "two over ring, compact": ("ring", [1, 1], "", 0),
    "two over ring that exchange": ("ring", [1, 1], "", most_exchanged("ring", 2)),
    "two to one over ring, of which one might compute in half precision": ("ring", [2, 1], "float32", 0),
    "three over mpi": ("mpi", [1, 1, 1], "", 0),
    "three over mpi that exchange": ("mpi", [1, 1, 1], "", 10_000),
}
SPANNING = "olmo2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_all(folder)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def results(request, folder):
    """For each rank, what it found for each checkpoint."""
    backend, weights, wire, exchanged = RUNS[request.param]
    arguments = [str(folder), backend, json.dumps(weights), wire, str(exchanged)]
    if "compact" in request.param:
        arguments.append("compact")
    ranks = run_ranks([PROGRAM, *arguments], len(weights), backend)
    assert [rank.status for rank in ranks] == [0] * len(weights), ranks[0].stderr[-2000:]
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks]


def cut(results):
    """The results of all ranks for all models that can be cut."""
    return [(name, found) for rank in results for name, found in rank.items() if "refused" not in found]


def test_every_rank_gets_the_logits_of_the_whole_model(results):
    assert len(cut(results)) == 19 * len(results)
    assert {name: found["error"] for name, found in cut(results) if found["error"] > 1e-4} == {}


def test_a_layer_has_two_all_reduces_and_one_where_it_is_parallel(results, request):
    for name, found in cut(results):
        per_layer = 1 if name.startswith(("cohere", "gpt_neox")) else 4 if name.startswith(SPANNING) else 2
        # A mixture with a shared expert that cannot sum by itself in another dtype sums twice.
        extra = 1 if name.startswith("deepseek") and "half precision" in request.node.name else 0
        sums = per_layer * found["layers"] + 1 + extra
        assert found["all_reduces"] + found["all_gathers"] == sums + 1, f"{name}: sums and logits"
        exchanges = "exchange" in request.node.name
        assert (found["all_gathers"] > 1) == exchanges, name
        if exchanges and "moe" not in name and "deepseek" not in name:  # These sum by themselves.
            assert found["all_reduces"] == 0, name


def test_all_ranks_have_the_tokens_that_rank_0_has_drawn(results):
    assert {
        name: found["shared"] for name, found in cut(results) if found["shared"] != [True, [[11], [12]]]
    } == {}


def test_a_rank_reads_its_slices_and_nothing_else(results):
    for name, found in cut(results):
        assert found["read"] <= 1.05 * found["shard"], name


def test_caches_hold_only_the_heads_of_the_rank(results):
    held = [rank["llama_with_3_key-value_heads"]["kv_heads"] for rank in results]
    assert held == ([[2, 2], [1, 1]] if len(results) == 2 else [[1, 1]] * 3)


def test_a_model_of_which_nothing_can_be_cut_is_refused_on_every_rank(results):
    for rank in results:
        assert "--parallel pipeline" in rank["mamba2_of_which_nothing_can_be_cut"]["refused"]


def test_the_largest_logit_alone_is_in_the_right_place(results):
    for rank in results:
        assert all(found["argmax"] for found in rank.values() if "argmax" in found)
        assert any("argmax" in found for found in rank.values())
