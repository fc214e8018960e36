"""Every benchmark runs, quickly. The figures are for benchmarks/README.md; here their form is checked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.slow


def run(script: str, folder: Path, *arguments: str, name: str | None = None) -> dict:
    name = name or script
    argv = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--quick", "--output", str(folder)]
    done = subprocess.run([*argv, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["benchmark"] == name
    assert json.loads((folder / f"{name}.json").read_text()) == record
    assert {"machine", "versions", "commit", "command"} <= set(record)
    if importlib.util.find_spec("matplotlib"):
        assert (folder / f"{name}.svg").stat().st_size > 1000
        assert (folder / f"{name}.png").stat().st_size > 1000
    return record


def verdicts(record: dict) -> dict[str, str]:
    return {bar["what"]: bar["verdict"] for bar in record["bars"]}


@slow
@pytest.mark.timeout(300)
def test_scale_shows_the_schedule_on_sleeping_stages(tmp_path):
    points = [rounds[0] for rounds in run("scale", tmp_path)["points"]]
    assert [point["ranks"] for point in points] == [1, 2, 4]
    # Even on a busy machine, four stages at once are far from one after the other.
    assert points[2]["tokens_per_s"] > 2 * points[0]["tokens_per_s"]


@pytest.mark.timeout(300)
def test_overhead_measures_every_part_of_a_step(tmp_path):
    record = run("overhead", tmp_path)
    assert not [note for note in record["notes"] if "not there" in note], record["notes"]
    assert {"schedule", "publish", "build forward", "sample", "deliver"} <= set(record["parts"]["rank 0"])
    assert {"receive", "build forward"} <= set(record["parts"]["rank 1"])
    assert {"detokenize", "render JSON"} <= set(record["parts"]["front"])


@slow
@pytest.mark.timeout(300)
def test_cpu_measures_every_change_in_every_case(tmp_path):
    times = run("cpu", tmp_path)["times_s"]
    plain = ["prefill of 64", "decode of 1", "decode of 4"]
    with_experts = [*plain, "experts, 1", "experts, 64"]
    assert [list(cases) for cases in times.values()] == [with_experts] * 2 + [plain] * 6 + [with_experts] * 2


@slow
@pytest.mark.timeout(300)
def test_comm_measures_backends_and_their_limits(tmp_path):
    record = run("comm", tmp_path)
    kinds = {name.split(",")[0] for name in record["times_s"]}
    assert kinds == {"ring", "tcp", "zmq", "mpi", "mpi4py"}
    assert all(seconds > 0 for seconds in record["step_s"].values())


@slow
@pytest.mark.timeout(300)
def test_generate_measures_both_forms(tmp_path):
    assert len(run("generate", tmp_path)["rounds"]) == 5


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["four-bit", "llama-8b"])
def test_generate_measures_ranks_whose_memory_is_for_4_bits(tmp_path, case):
    record = run("generate", tmp_path, f"--{case}", name=f"generate-{case}")
    assert len(record["rounds"]) == 3


@slow
@pytest.mark.timeout(300)
def test_serve_measures_closed_and_open_loops(tmp_path):
    runs = run("serve", tmp_path)["runs"]
    assert [run["clients"] for run in runs] == [1, 4, 8, None, None]
    # The load generator must not take the cores of what it measures.
    assert all(run["client_cpu"] < 0.1 for run in runs)


@slow
@pytest.mark.timeout(300)
def test_compare_measures_ours_and_theirs_in_the_same_rounds(tmp_path):
    record = run("compare", tmp_path)
    assert all(len(rounds) == 1 for rounds in record["rounds"].values())
    assert verdicts(record)["1 rank over mlx_lm.server in one process"] != "not run"


@slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces need root on Linux"
)
@pytest.mark.skipif(shutil.which("tc") is None, reason="needs iproute2")
def test_network_measures_over_shaped_links(tmp_path):
    lines = run("network", tmp_path)["lines"]
    assert {line["network"]["name"] for line in lines} == {"1 GbE", "Wi-Fi"}
    wifi = [line["hop_s"] for line in lines if line["network"]["name"] == "Wi-Fi"]
    assert min(wifi) > 0.004


@pytest.mark.skipif(sys.platform == "linux" and os.geteuid() == 0, reason="root may")
def test_network_says_what_it_needs_in_one_line():
    argv = [sys.executable, str(ROOT / "benchmarks" / "network.py"), "--quick"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
