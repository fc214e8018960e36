import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from lockstep.model.loader import open_model
from lockstep.model.tensor.origins import Origin, Origins

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 11,
    "num_experts_per_tok": 2,
}
EXPERTS = "model.layers.0.block_sparse_moe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as it is published: one tensor per expert, which the model stacks."""
    from mlx_lm.models import mixtral

    folder = tmp_path_factory.mktemp("published")
    model = mixtral.Model(mixtral.ModelArgs.from_dict(CONFIG))
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        if "switch_mlp" in name:
            projection = names[name.split(".")[-2]]
            for i in range(CONFIG["num_local_experts"]):
                tensors[f"{EXPERTS}.experts.{i}.{projection}.weight"] = array[i]
        else:
            tensors[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def origins_of(folder):
    origins = Origins()
    model, _, _ = open_model(folder, origins.track)
    parameters = dict(tree_flatten(model.parameters()))
    return origins.of(parameters), parameters


def test_a_parameter_that_is_a_tensor_of_the_file_is_traced_to_it(folder):
    origins, parameters = origins_of(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert origins[name] == Origin((name,))
    assert set(origins) == set(parameters)


def test_stacked_experts_are_traced_to_every_expert_in_the_order_of_the_stack(folder):
    origins, parameters = origins_of(folder)
    name = f"{EXPERTS}.switch_mlp.down_proj.weight"
    expected = tuple(f"{EXPERTS}.experts.{i}.w2.weight" for i in range(11))
    assert origins[name] == Origin(expected, "stacked")
    files = mx.load(str(folder / "model.safetensors"))
    assert mx.array_equal(mx.stack([files[tensor] for tensor in expected]), parameters[name])


def test_a_parameter_that_is_computed_is_traced_to_what_it_is_made_of(folder):
    origins = Origins()
    model, _, _ = open_model(folder, origins.track)
    parameters = {
        name: array * 2 if "switch_mlp.up_proj" in name or "norm" in name else array
        for name, array in tree_flatten(model.parameters())
    }
    found = origins.of(parameters)
    experts = tuple(sorted(f"{EXPERTS}.experts.{i}.w3.weight" for i in range(11)))
    assert {name: origin.tensors for name, origin in found.items() if origin.how == "computed"} == {
        name: experts if "switch_mlp" in name else (name,)
        for name in parameters
        if "switch_mlp.up_proj" in name or "norm" in name
    }


def test_thousands_of_experts_are_told_apart(tmp_path):
    file = str(tmp_path / "model.safetensors")
    mx.save_safetensors(file, {f"expert.{i}": mx.full((2, 3), i) for i in range(2100)})
    tensors = mx.load(file)
    order = [f"expert.{i}" for i in (2000, 3, 1500)]

    class Model:
        def sanitize(self, weights):
            return {"stack": mx.stack([tensors[name] for name in order])}

    origins = Origins()
    model = origins.track(Model)()
    assert origins.of(model.sanitize(tensors))["stack"] == Origin(tuple(order), "stacked")


def test_operations_that_change_nothing_hide_no_tensor(tmp_path):
    file = str(tmp_path / "model.safetensors")
    mx.save_safetensors(file, {name: mx.ones((2, 3)) for name in ("a", "b", "c")})
    tensors = mx.load(file)
    origins = Origins()
    origins.track(type("Model", (), {}))().sanitize(tensors)
    doubled = tensors["b"] * 2
    found = origins.of(
        {
            "same": tensors["a"].astype(mx.float32),
            "again": tensors["a"][:],
            "doubled": doubled,
            "and again": doubled.reshape(2, 3),
            "constant": mx.zeros(2),
        }
    )
    assert found == {
        "same": Origin(("a",)),
        "again": Origin(("a",)),
        "doubled": Origin(("b",), "computed"),
        "and again": Origin(("b",), "computed"),
        "constant": Origin((), "computed"),
    }
