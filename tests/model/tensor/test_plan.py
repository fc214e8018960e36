from collections import Counter

import pytest

from lockstep.errors import UsageError
from lockstep.model.loader import open_model
from lockstep.model.tensor.pieces import Piece
from lockstep.model.tensor.plan import plan
from tensor_models import make_all


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: folder / name for name in make_all(folder)}


def opened(folders, start):
    return open_model(next(folder for name, folder in folders.items() if name.startswith(start)))[0]


def owners(found, ranks):
    """For each parameter that is cut, how many ranks hold each row or column of it."""
    held = {}
    for rank in range(ranks):
        for name, piece in found.cuts(rank).items():
            if isinstance(piece, Piece):
                rows = [i for first, last in piece.ranges for i in range(first, last)]
                held.setdefault(
                    name, Counter(dict.fromkeys(range(found.sizes[name][0][piece.axis]), 0))
                ).update(rows)
    return held


@pytest.mark.parametrize("weights", [(1, 1), (3, 1)])
def test_every_row_and_column_of_a_cut_parameter_is_held_by_one_rank(folders, weights):
    for name, folder in folders.items():
        if "nothing_can_be_cut" in name:
            continue
        found = plan(open_model(folder)[0], weights)
        for parameter, count in owners(found, 2).items():
            shared = "1_key-value_head" in name and (".k_proj" in parameter or ".v_proj" in parameter)
            assert set(count.values()) == ({2} if shared else {1}), (name, parameter)


def test_biases_of_the_way_out_are_held_by_rank_0_alone(folders):
    found = plan(opened(folders, "llama_4-bit"), (1, 1))
    biases = {name for name in found.sizes if name.endswith(("o_proj.bias", "down_proj.bias"))}
    assert len(biases) == 4
    assert biases <= found.cuts(1).keys()
    assert not biases & found.cuts(0).keys()


def test_four_ranks_for_three_key_value_heads_are_refused_with_the_numbers(folders):
    with pytest.raises(
        UsageError, match="3 key/value heads with 3 query heads each cannot be cut for 4 ranks"
    ):
        plan(opened(folders, "llama_with_3"), (1, 1, 1, 1))


def test_a_cut_that_would_split_a_quantization_group_is_refused_with_what_works(folders):
    model = opened(folders, "llama_4-bit")
    assert plan(model, (1,) * 4).held_bytes(3)
    with pytest.raises(UsageError, match="groups of 32 are 6 pieces, too few for 8 ranks: use at most 6"):
        plan(model, (1,) * 8)


def test_a_model_without_anything_to_cut_is_refused_with_what_works(folders):
    with pytest.raises(UsageError, match="--parallel pipeline"):
        plan(opened(folders, "mamba2"), (1, 1))


def test_planning_reads_no_weights(folders, tmp_path):
    source = folders["llama_with_3_key-value_heads"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    file = tmp_path / "model.safetensors"
    file.write_bytes((source / "model.safetensors").read_bytes())
    model, _, _ = open_model(tmp_path)
    file.unlink()
    found = plan(model, (2, 1))
    assert found.held_bytes(0) > found.held_bytes(1)
