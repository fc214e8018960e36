"""Checkpoints: folders and Hub models, what is wrong with broken ones, and who downloads what."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fake_hub
import tiny

from lockstep.errors import UsageError
from lockstep.model import checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A tiny llama of 6 layers in 3 files: embedding and 0-1, 2-3, and 4-5 with norm and head."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny.save("llama", folder)
    weights = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    groups = {0: {}, 1: {}, 2: {}}
    for name, array in weights.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
        groups[(0 if "embed" in name else 2) if layer is None else layer // 2][name] = array
    files = {i: f"model-0000{i + 1}-of-00003.safetensors" for i in groups}
    for i, group in groups.items():
        mx.save_safetensors(str(folder / files[i]), group, {"format": "mlx"})
    weight_map = {name: files[i] for i, group in groups.items() for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def broken(sharded, tmp_path):
    """A copy of the model to break."""
    return shutil.copytree(sharded, tmp_path / "broken")


SECOND = "model-00002-of-00003.safetensors"


def test_a_local_folder_of_several_files_is_read_whole(sharded):
    seen = checkpoint.inspect(checkpoint.resolve(str(sharded)))
    whole = {name for file in sharded.glob("model*.safetensors") for name in mx.load(str(file))}
    assert seen.tensors.keys() == whole
    assert checkpoint.costs(seen, held="float32").layers == 6


def test_a_missing_file_is_named_with_a_tensor_it_should_hold(broken):
    (broken / SECOND).unlink()
    with pytest.raises(UsageError, match=rf"{SECOND} is missing .*model\.layers\.[23]\."):
        checkpoint.inspect(broken)


def test_a_truncated_file_is_named_with_the_tensor(broken):
    file = broken / SECOND
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=rf"{SECOND}: truncated: tensor model\.layers"):
        checkpoint.inspect(broken)


def test_a_tensor_that_only_the_index_knows_is_named(broken):
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.2.extra.weight"] = SECOND
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"{SECOND} lacks tensor model\.layers\.2\.extra\.weight"):
        checkpoint.inspect(broken)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "is missing"), ("{", "is not JSON"), ("3", "is not a JSON object")]
)
def test_a_broken_config_is_named(broken, content, reason):
    (broken / "config.json").unlink()
    if content is not None:
        (broken / "config.json").write_text(content)
    with pytest.raises(UsageError, match=rf"config\.json {reason}"):
        checkpoint.inspect(broken)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no model\*\.safetensors"):
        checkpoint.inspect(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", ".../x"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(UsageError, match="no such folder"):
        checkpoint.resolve(name)


def test_a_file_given_as_model_is_refused(sharded):
    with pytest.raises(UsageError, match="is a file"):
        checkpoint.resolve(str(sharded / "config.json"))


# What a rank does, in a process of its own: the Hub's client reads its settings when it is imported.
RANK = """
import json, sys
from lockstep.errors import UsageError
from lockstep.model import checkpoint
from lockstep.model.costs import parts
try:
    seen = checkpoint.inspect(checkpoint.resolve(sys.argv[1]))
except UsageError as error:
    sys.exit(str(error))
result = {"layers": checkpoint.costs(seen, held="float32").layers, "commit": seen.path.name,
          "title": checkpoint.title(seen.path)}
if len(sys.argv) > 2:
    first, end = map(int, sys.argv[2:])
    held = parts(seen.config, seen.tensors)
    try:
        own = [name for layer in range(first, end) for name in held[layer]]
        seen = seen.fetch(seen.tensors if (first, end) == (0, 6) else own)
    except UsageError as error:
        sys.exit(str(error))
    from mlx_lm.utils import load_model
    import mlx.core as mx
    from mlx.utils import tree_flatten
    with seen.opened() as folder:
        model, _ = load_model(folder, lazy=True)
    own = [p for layer in model.layers[first:end] for _, p in tree_flatten(layer.parameters())]
    mx.eval(own)
    result["sum"] = sum(float(mx.abs(p).sum()) for p in own)
    try:
        mx.eval(model.layers[0 if first else -1].parameters())
        result["others"] = "evaluated"
    except RuntimeError:
        result["others"] = "refused"
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def hub(sharded):
    with fake_hub.serve("org/tiny", sharded) as running:
        yield running


def test_planning_a_hub_model_downloads_no_weight_file_and_a_rank_only_its_own(hub, sharded, tmp_path):
    sizes = {file.name: file.stat().st_size for file in sharded.glob("model*.safetensors")}
    hub.sent.clear()
    planned = hub.run(tmp_path, RANK, "org/tiny@main")
    assert planned.returncode == 0, planned.stderr
    assert not planned.stderr
    assert json.loads(planned.stdout) == {
        "layers": 6,
        "commit": fake_hub.COMMIT,
        "title": "org/tiny",
    }
    headers = {file: hub.sent.pop(file) for file in sizes}
    assert all(0 < headers[file] <= 100_001 for file in sizes)

    loaded = hub.run(tmp_path, RANK, "org/tiny@main", 2, 4)
    assert loaded.returncode == 0, loaded.stderr
    assert [hub.sent[file] for file in sizes] == [
        size if file == SECOND else 0 for file, size in sizes.items()
    ]
    local = mx.load(str(sharded / SECOND))
    result = json.loads(loaded.stdout)
    assert result["sum"] == pytest.approx(sum(float(mx.abs(p).sum()) for p in local.values()))
    assert result["others"] == "refused"

    hub.sent.clear()
    again = hub.run(tmp_path, RANK, "org/tiny@main", offline=True)
    assert again.returncode == 0, again.stderr
    assert not hub.sent

    shutil.rmtree(tmp_path / "hf" / "hub" / "models--org--tiny" / "trees")  # the list of the Hub's client
    for span, reason in (((0, 6), "model-00001-of-00003.safetensors is missing"), ((0, 2), "offline mode")):
        lacking = hub.run(tmp_path, RANK, "org/tiny@main", *span, offline=True)
        assert lacking.returncode == 1
        assert re.search(rf"is not complete on this machine .*{reason}.*: check the network", lacking.stderr)
        assert "Traceback" not in lacking.stderr


def test_of_a_single_file_a_rank_downloads_its_own_tensors_and_later_only_what_it_lacks(tmp_path):
    tiny.save("llama", tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    sizes = {name: array.nbytes for name, array in mx.load(str(file)).items()}
    layers = [sum(size for name, size in sizes.items() if f"layers.{i}." in name) for i in range(6)]
    with fake_hub.serve("org/one", tmp_path / "llama") as hub:

        def fetched(*span, offline=False):
            hub.sent.clear()
            done = hub.run(tmp_path, RANK, "org/one", *span, offline=offline)
            assert done.returncode == 0, done.stderr
            assert not done.stderr
            return hub.sent[file.name], json.loads(done.stdout)

        header, _ = fetched()
        some, loaded = fetched(2, 4)
        assert some == sum(layers[2:4]) + 8, "their bytes, and how long the header is"
        assert loaded["others"] == "refused"
        assert fetched(2, 4, offline=True) == (0, loaded)
        (kept,) = {part.parent for part in (tmp_path / "lockstep").rglob("model-bytes-*")}
        (kept / ".parts-killed").mkdir()
        os.utime(kept / ".parts-killed", (0, 0))
        more, loaded = fetched(1, 5)
        assert more == layers[1] + layers[4] + 8
        weights = mx.load(str(file))
        own = [mx.abs(weights[name]).sum().item() for name in sizes if re.search(r"layers\.[1-4]\.", name)]
        assert loaded["sum"] == pytest.approx(sum(own))
        assert loaded["others"] == "refused"
        assert not list((tmp_path / "hf").rglob("model.safetensors"))
        assert not list((tmp_path / "lockstep").rglob(".parts-*"))


def test_a_model_in_a_single_file_that_was_downloaded_whole_needs_no_network(tmp_path):
    tiny.save("llama", tmp_path / "llama")
    whole = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1])"
    with fake_hub.serve("org/one", tmp_path / "llama") as hub:
        downloaded = hub.run(tmp_path, whole, "org/one")
    assert downloaded.returncode == 0, downloaded.stderr
    planned = hub.run(tmp_path, RANK, "org/one", 0, 6, offline=True)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["layers"] == 6


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("org/unknown", None, "the Hub has no model org/unknown"),
        ("org/tiny@v9", None, "org/tiny has no revision v9"),
        ("org/tiny", (403, "GatedRepo"), "org/tiny is gated: accept its terms"),
        ("org/tiny", (503, ""), "cannot be reached or fails"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_explained_in_one_line(hub, tmp_path, name, error, reason):
    hub.error = error
    try:
        refused = hub.run(tmp_path, RANK, name)
    finally:
        hub.error = None
    assert refused.returncode == 1
    assert reason in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_a_hub_that_cannot_be_reached_is_explained_in_one_line(tmp_path):
    nobody = fake_hub.FakeHub("org/tiny", tmp_path)
    nobody.endpoint = "http://127.0.0.1:9"
    refused = nobody.run(tmp_path, RANK, "org/tiny")
    assert refused.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "is missing"), ("{", "is not JSON"), ("{}", 'it has no "model"')]
)
def test_a_folder_without_a_tokenizer_that_can_be_read_is_refused(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=f"tokenizer.json .*{reason}.*: download or convert it again"):
        checkpoint.check_tokenizer(tmp_path)


def test_a_tokenizer_of_another_form_is_left_to_its_library(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    checkpoint.check_tokenizer(tmp_path)
