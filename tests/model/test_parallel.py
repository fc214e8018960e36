from hypothesis import given
from hypothesis import strategies as st

from lockstep.model.parallel import WORTH_IT, Traffic, choose

GIGABYTE = 10**9


def traffic(**changes):
    values = {
        "read_bytes": 8 * GIGABYTE,
        "all_reduces": 65,
        "latency_s": 50e-6,
        "bytes_per_s": [200e9, 200e9],
    }
    return Traffic(**{**values, **changes})


def test_a_fast_network_means_tensor_and_the_reason_has_the_numbers():
    parallel, reason = choose(traffic(), "jaccl")
    assert parallel == "tensor"
    assert "65 all_reduces of 50 us over jaccl are 3.2 ms per token" in reason
    assert "2 ranks make one request at most 1.72 times as fast" in reason


def test_a_slow_network_means_pipeline():
    parallel, reason = choose(traffic(latency_s=1e-3), "ring")
    assert parallel == "pipeline"
    assert "65.0 ms per token" in reason


def test_a_model_that_cannot_be_cut_is_pipelined_whatever_the_network():
    assert choose(traffic(), "jaccl", "3 heads for 4 ranks") == (
        "pipeline",
        "tensor parallelism is out: 3 heads for 4 ranks",
    )


def test_a_backend_that_cannot_send_means_tensor_whatever_it_is_worth():
    parallel, reason = choose(traffic(latency_s=1e-3), "nccl")
    assert parallel == "tensor"
    assert "mlx cannot send from rank to rank over nccl" in reason


def test_one_rank_has_nothing_to_choose():
    assert choose(traffic(bytes_per_s=[1e9]), "ring")[0] == "pipeline"


@given(st.lists(st.floats(1e9, 1e12), min_size=2, max_size=8), st.floats(0, 0.1))
def test_ranks_are_never_worth_more_than_their_speeds_add_up_to(speeds, latency_s):
    found = traffic(bytes_per_s=speeds, latency_s=latency_s)
    assert 0 < found.speedup <= sum(speeds) / max(speeds) + 1e-9
    assert (choose(found, "ring")[0] == "tensor") == (found.speedup >= WORTH_IT)
