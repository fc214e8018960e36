"""schemathesis makes up requests from the OpenAPI schema, good and bad; none may end in a 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from cluster import Cluster, tiny_checkpoint

OPERATIONS = {
    "/v1/chat/completions": 40,
    "/v1/completions": 40,
    "/v1/models": 1,
    "/v1/models/{model}": 10,
    "/health": 1,
    "/ready": 1,
    "/cluster/status": 1,
    "/metrics": 1,
}


@pytest.fixture(scope="module")
def real_url(tmp_path_factory):
    """Two real ranks behind the front process."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    arguments = ("-n", "2", "--model", str(model), "--context", "256")
    with Cluster(tmp_path_factory.mktemp("serve"), *arguments) as cluster:
        yield cluster.wait_ready().url
        assert cluster.status()["restarts"] == 0


@pytest.fixture(scope="module", params=["scripted", pytest.param("real", marks=pytest.mark.slow)])
def schema(request):
    scripted = request.param == "scripted"
    url = request.getfixturevalue("served").url if scripted else request.getfixturevalue("real_url")
    return schemathesis.openapi.from_url(url + "/openapi.json")


def test_the_schema_has_just_these_operations(schema):
    assert {result.ok().path for result in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/v1/chat/completions", GenerationMode.POSITIVE),
        ("/v1/chat/completions", GenerationMode.NEGATIVE),
        ("/v1/completions", GenerationMode.POSITIVE),
        ("/v1/completions", GenerationMode.NEGATIVE),
        ("/v1/models/{model}", GenerationMode.POSITIVE),
    ],
)
def test_no_request_ends_in_a_500(schema, path, mode):
    operation = schema[path]["GET" if path == "/v1/models/{model}" else "POST"]

    @settings(
        max_examples=OPERATIONS[path],
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call(timeout=20)
        checks = [not_a_server_error]
        if "event-stream" not in response.headers.get("content-type", ["?"])[0]:
            checks += [response_schema_conformance, content_type_conformance]
        case.validate_response(response, checks=checks)

    check()


@pytest.mark.parametrize("path", [path for path in OPERATIONS if OPERATIONS[path] == 1])
def test_what_takes_nothing_answers_as_its_schema_says(schema, path):
    case = schema[path]["GET"].Case()
    case.call_and_validate(checks=[not_a_server_error, response_schema_conformance, content_type_conformance])
