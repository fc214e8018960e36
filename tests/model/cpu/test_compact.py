"""Models whose weights stay as stored, against what mlx computes with them."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from lockstep.model import checkpoint
from lockstep.model.cpu import blocks, compact, fit_for_cpu, lay_out_for_cpu
from lockstep.model.cpu.compact import CompactLinear, cpu_compact_layers
from lockstep.model.graph import parameters
from lockstep.model.loader import load, open_model
from lockstep.model.precision import cpu_compact, cpu_float32, dequantized
from model import scenario, tiny
from model.cpu.given_cores import cores_given
from model.memory_wire import Wire

AFFINE = [("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES = [*AFFINE, ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = [nn.Linear(64, 64), nn.Linear(64, 33, bias=False)]
        self.mixture = SwitchGLU(64, 96, 6)
        self.odd = SwitchLinear(64, 24, 6)
        self.heads = MultiLinear(64, 32, 3)
        self.norm = nn.RMSNorm(64)

    def __call__(self, tokens):
        h = self.norm(self.layers[0](self.embedding(tokens)))
        experts = mx.stack([tokens % 6, (tokens + 1) % 6], axis=-1)
        return [
            self.layers[1](h),
            self.mixture(h, experts),
            self.odd(h[:, None, None], experts),
            self.heads(mx.broadcast_to(h, (1, 3, *h.shape))),
            self.embedding.as_linear(h),
        ]


KINDS = {"SkylakeX": "AVX-512", "Zen": "AVX2", "": "others"}


def same(ours, theirs):
    return ours.dtype == mx.float32 and mx.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def with_kernels(kernels, monkeypatch):
    for module in ("", ".tiles", ".layout", ".experts", ".rows"):
        monkeypatch.setattr(f"lockstep.model.cpu{module}.kernels", lambda: kernels)


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("rows", [(1,), (2, 5), (40,)])
@pytest.mark.parametrize("cores", [1, 3])
def test_quantized_layers_multiply_the_same_in_float32(mode, group_size, bits, rows, cores, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    layer, table = nn.QuantizedLinear(96, 70, **settings), nn.QuantizedEmbedding(70, 96, **settings)
    layer.bias = mx.random.normal((70,))
    for module in (layer, table):
        cpu_compact(module)
    x, tokens = mx.random.normal((*rows, 96)), mx.random.randint(0, 70, rows)
    # mlx would look up a table without affine scales in bfloat16.
    rows_of_table = dequantized(table, table.weight, table.scales, table.get("biases"))[tokens]
    wanted = layer(x), table.as_linear(x), rows_of_table
    for module in (layer, table):
        cpu_compact_layers(module)
    with cores_given(cores, "compact.WORTH_A_CORE", 1000):
        ours = layer(x), table.as_linear(x), table(tokens)
    assert isinstance(layer, CompactLinear)
    for got, want in zip(ours, wanted, strict=True):
        assert got.shape == want.shape
        assert same(got, want)


@pytest.mark.parametrize("mode", ["half", "affine", "mxfp4"])
@pytest.mark.parametrize("kernels", KINDS, ids=KINDS.values())
@pytest.mark.parametrize("tokens", [[3], [*range(40)]], ids=["one", "many"])
@pytest.mark.parametrize("cores", [1, 3])
def test_a_compact_model_computes_what_it_does_in_float32(mode, kernels, tokens, cores, monkeypatch):
    with_kernels(kernels, monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK", 3000)
    models = []
    for form in (False, True):
        mx.random.seed(1)
        model = Mixed()
        model.set_dtype(mx.bfloat16)
        if mode != "half":
            nn.quantize(model, group_size=32, bits=4, mode=mode)
        if form:
            fit_for_cpu(model, compact=True)
            lay_out_for_cpu(model, set())
        else:
            cpu_float32(model)
        models.append(model)
    wanted = models[0](mx.array(tokens))
    monkeypatch.setattr("lockstep.model.cpu.compact_experts.WORTH_A_CORE", 1000)
    with cores_given(cores, "compact.WORTH_A_CORE", 1000):
        ours = models[1](mx.array(tokens))
    for got, want in zip(ours, wanted, strict=True):
        assert got.shape == want.shape
        assert same(got, want)
    held = [sum(p.nbytes for _, p in tree_flatten(model.parameters())) for model in models]
    assert held[1] < (0.65 if mode == "half" else 0.25) * held[0]


@pytest.mark.parametrize(("bits", "mode", "few"), [(4, "affine", 0), (6, "affine", 15), (8, "mxfp8", 2)])
def test_few_rows_are_multiplied_as_they_are_and_more_in_float32(bits, mode, few, monkeypatch):
    converted = []
    real = compact.by_blocks
    monkeypatch.setattr(compact, "by_blocks", lambda *given: converted.append(1) or real(*given))
    layer = nn.QuantizedLinear(64, 32, group_size=32, bits=bits, mode=mode)
    cpu_compact_layers(layer)
    if few:
        layer(mx.ones((few, 64)))
    assert not converted
    layer(mx.ones((few + 1, 64)))
    assert converted


def save(name, folder, bits, **changes):
    """A random checkpoint in bfloat16, or quantized as far as its shapes allow."""
    tiny.save(name, folder, **changes)
    model, config, _ = open_model(folder)
    model.set_dtype(mx.bfloat16)
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=lambda _, m: can_be_quantized(m))
        config["quantization"] = {"group_size": 32, "bits": bits}
    weights = dict(parameters(model))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


def can_be_quantized(module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


ARCHITECTURES = ["llama", "gpt_oss", "deepseek_v3", "qwen3_next"]
TIED_BY_HAND = ["seed_oss", "llama4_text"]
"""They multiply by the table of their embeddings themselves."""


@pytest.mark.parametrize("name", ARCHITECTURES + TIED_BY_HAND)
@pytest.mark.parametrize("bits", [16, 4])
def test_architectures_give_the_same_logits_compact(name, bits, tmp_path):
    changes = {"tie_word_embeddings": True} if name in TIED_BY_HAND else {}
    save(name, tmp_path, bits, **changes)
    found = checkpoint.inspect(tmp_path)
    dense, compact = (load(found, (0, 0), 0, 1, compact=compact) for compact in (False, True))
    logits = [scenario.single([loaded.shard]) for loaded in (dense, compact)]
    assert scenario.difference(logits[1], logits[0]) < 1e-4
    assert compact.weight_bytes < 0.7 * dense.weight_bytes


@pytest.mark.parametrize("bits", [16, 4])
def test_stages_give_the_logits_of_the_whole_model_compact(bits, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    save("llama", tmp_path, bits)
    found = checkpoint.inspect(tmp_path)
    whole = load(found, (0, 6), 0, 1).shard
    between = Wire()
    stages = [
        load(found, (0, 2), 1, 2, Wire().to(between), compact=True).shard,
        load(found, (2, 6), 0, 2, between.to(Wire()), compact=True).shard,
    ]
    for run in (scenario.single, scenario.joined):
        assert scenario.difference(run(stages), run([whole])) < 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "jamba", "recurrent_gemma", "cohere"])
@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_held_compact_is_known_before(name, bits, tmp_path):
    save(name, tmp_path, bits)
    found = checkpoint.inspect(tmp_path)
    planned = checkpoint.costs(found, "compact").total_bytes
    real = load(found, (0, 0), 0, 1, compact=True).weight_bytes
    assert real <= planned <= 1.1 * real
