from __future__ import annotations

from lockstep.engine.wire import ClusterStatus, RankStatus
from lockstep.observe.inference_log import RequestRecord
from lockstep.observe.metrics import Metrics


def test_requests_and_cluster_are_told_in_prometheus_format():
    rank = RankStatus(rank=1, host="mini", pid=1, weight_bytes=1000)
    status = ClusterStatus(model="m", ranks=[rank], waiting=2, running=3, kv_tokens=40)
    metrics = Metrics(lambda: (True, 1, status))
    record = RequestRecord("a", "POST", "/v1/completions", route="/v1/completions", status=200)
    record.prompt_tokens, record.completion_tokens, record.ttft_s = 5, 7, 0.3
    metrics.observe(record)
    text = metrics.text().decode()
    for line in [
        'lockstep_requests_total{route="/v1/completions",status="200"} 1.0',
        "lockstep_generated_tokens_total 7.0",
        "lockstep_time_to_first_token_seconds_sum 0.3",
        "lockstep_engine_ready 1.0",
        "lockstep_engine_restarts_total 1.0",
        "lockstep_requests_waiting 2.0",
        'lockstep_rank_weight_bytes{host="mini",rank="1"} 1000.0',
    ]:
        assert line in text.splitlines(), line


def test_there_is_something_to_tell_before_the_engine_has_come():
    assert "lockstep_engine_ready 0.0" in Metrics(lambda: (False, 0, None)).text().decode()
