"""What can be known, and refused, before any rank is started."""

from __future__ import annotations

import mlx.core as mx
import pytest

from cluster import tiny_checkpoint
from lockstep.errors import UsageError
from lockstep.launch import planning
from lockstep.launch.hostfile import Host, Hostfile, local_hosts
from lockstep.model import checkpoint
from lockstep.runtime.options import ModelOptions

SMALL = Hostfile((Host("localhost", memory_gb=0.2001),))
"""Too small for any model beside what the runtime itself takes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def test_a_model_that_does_not_fit_is_refused_before_anything_starts(model):
    with pytest.raises(UsageError, match="the model does not fit: rank 0"):
        planning.check(SMALL, ModelOptions(model))


def test_what_fits_only_as_stored_is_proposed_so_and_not_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    found = checkpoint.inspect(folder)
    dense, compact = (checkpoint.costs(found, held).total_bytes for held in ("float32", "compact"))
    assert dense == compact  # There is nothing to gain with weights that are float32 as stored.
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves)
    for memory_gb, held in ((1.0, "float32"), (0.2001 + 0.75 * dense / 1e9, "compact")):
        hosts = Hostfile((Host("localhost", memory_gb=memory_gb),))
        planning.check(hosts, ModelOptions(str(folder), context=64))
        proposal = planning.propose(hosts, str(folder), "auto", 64)
        assert (proposal.held, proposal.problem) == (held, None)


def test_the_layers_of_the_hosts_are_checked_unless_a_split_is_given(model):
    hosts = Hostfile(tuple(Host(name, ("127.0.0.1",), layers=2) for name in ("localhost", "127.0.0.1")))
    with pytest.raises(UsageError, match="the split 2,2 adds up to 4 layers, but the model has 6"):
        planning.check(hosts, ModelOptions(model))
    planning.check(hosts, ModelOptions(model, split="3,3"))


def test_the_ranks_of_a_hostfile_are_as_many_as_asked_for(tmp_path):
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text('[{"ssh": "localhost", "slots": 2}]')
    for ranks in (None, 2):
        assert len(planning.hosts(ranks, hostfile).hosts) == 2
    with pytest.raises(UsageError, match=r"-n 3, but .*hosts.json has 2 ranks"):
        planning.hosts(3, hostfile)


def test_parts_of_every_layer_are_for_several_ranks(model):
    with pytest.raises(UsageError, match="--split 2 gives parts of every layer to ranks, but there is 1"):
        planning.check(Hostfile(local_hosts(1)), ModelOptions(model, parallel="tensor", split="2"))
    planning.check(Hostfile(local_hosts(1)), ModelOptions(model, parallel="tensor"))


def test_nccl_is_for_nvidia_cards_and_tensor_parallel(monkeypatch):
    here, there = (
        Hostfile(local_hosts(2)),
        Hostfile((Host("gpu1", ("10.0.0.1",)), Host("gpu2", ("10.0.0.2",)))),
    )
    monkeypatch.setattr(planning, "cuda_build", lambda: False)
    with pytest.raises(UsageError, match="use --parallel tensor or --backend ring"):
        planning.check_backend(there, "nccl", "pipeline")
    with pytest.raises(UsageError, match="nccl needs NVIDIA cards"):
        planning.check_backend(here, "nccl", "tensor")
    planning.check_backend(there, "nccl", "tensor")
    monkeypatch.setattr(planning, "cuda_build", lambda: True)
    planning.check_backend(here, "nccl", "tensor")


def test_the_memory_of_another_machine_must_be_told(model):
    hosts = Hostfile((*local_hosts(1), Host("other", ("10.0.0.2",))))
    with pytest.raises(UsageError, match="the memory of other is not known here: give its memory_gb"):
        planning.propose(hosts, model, "auto", None)


def test_a_machine_with_an_nvidia_card_is_judged_by_the_ranks_that_see_its_memory(model, monkeypatch):
    monkeypatch.setattr(planning, "cuda_build", lambda: True)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: pytest.fail("not the card's"))
    planning.check(Hostfile(local_hosts(2)), ModelOptions(model))
    with pytest.raises(UsageError, match="the memory of the GPU of localhost is not known here"):
        planning.propose(Hostfile(local_hosts(2)), model, "auto", None)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_cpu_is_planned_with_float32_and_a_card_with_what_the_checkpoint_has(model, monkeypatch, gpu):
    monkeypatch.setattr(planning, "cuda_build", lambda: gpu)
    monkeypatch.setattr(planning.sys, "platform", "linux")
    asked, real = [], planning.checkpoint.costs

    def costs(seen, held):
        asked.append(held)
        return real(seen, held)

    monkeypatch.setattr(planning.checkpoint, "costs", costs)
    planning.check(Hostfile(local_hosts(1)), ModelOptions(model))
    assert asked == ["stored" if gpu else "float32"]
