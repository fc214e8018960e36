"""Starting, stopping and guarding the front process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import psutil
import pytest

from front_process import ScriptedEngine, front_process
from lockstep.engine.wire import ENVIRONMENT as LINK_ENVIRONMENT
from lockstep.server.front import main
from lockstep.server.settings import ENVIRONMENT, ServerSettings
from ranks import SOURCE, free_ports
from waiting import wait_until

BODY = {"prompt": "the fox", "seed": 3, "max_tokens": 40, "ignore_eos": True}


class Background(threading.Thread):
    """One request in a thread, and its response or the way it failed."""

    def __init__(self, url, **fields):
        super().__init__(daemon=True)
        self._url, self._body = url, BODY | fields
        self.response = self.failure = None
        self.start()

    def run(self):
        try:
            self.response = httpx2.post(self._url + "/v1/completions", json=self._body, timeout=30)
        except httpx2.TransportError as failure:
            self.failure = failure


@pytest.fixture
def slow_engine(link_config, tokenizer):
    engine = ScriptedEngine(link_config, tokenizer, "run-1", delay_s=0.1)
    yield engine
    engine.stop()


def test_one_line_says_where_the_server_is_when_it_is_ready(served):
    said = [line for line in served.front.stderr.read_text().splitlines() if served.url in line]
    assert said == [f"Lockstep serves org/tiny at {served.url}"]


def test_sigterm_lets_running_answers_finish_and_ends_with_0(folder, link_config, tmp_path, slow_engine):
    with front_process(folder, link_config, tmp_path) as front:
        front.wait_ready()
        answers = [Background(front.url, stream=stream) for stream in (False, True)]
        wait_until(lambda: len(slow_engine.running) == 2)
        assert front.end() == 0
        for answer in answers:
            answer.join(5)
            assert answer.response.status_code == 200
        assert answers[0].response.json()["usage"]["completion_tokens"] == 40
        assert answers[1].response.text.endswith("data: [DONE]\n\n")


def test_draining_has_an_end_and_says_so(folder, link_config, tmp_path, slow_engine):
    slow_engine.delay_s = 0.5
    with front_process(folder, link_config, tmp_path, drain_timeout_s=1.0) as front:
        front.wait_ready()
        stream, whole = Background(front.url, stream=True), Background(front.url)
        wait_until(lambda: len(slow_engine.running) == 2)
        began_s = time.monotonic()
        assert front.end() == 0
        assert time.monotonic() - began_s < 4
        stream.join(5)
        whole.join(5)
        assert "shutting down" in stream.response.text
        assert whole.response.status_code == 503


def test_a_second_signal_ends_at_once(folder, link_config, tmp_path, slow_engine):
    slow_engine.delay_s = 1.0
    with front_process(folder, link_config, tmp_path) as front:
        front.wait_ready()
        Background(front.url, stream=True)
        wait_until(lambda: slow_engine.running)
        front.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert front.process.poll() is None
        began_s = time.monotonic()
        assert front.end() == 0
        assert time.monotonic() - began_s < 2


def test_the_front_does_not_outlive_its_starter(folder, link_config, tmp_path):
    told = ServerSettings(model=str(folder), port=free_ports(1)[0])
    starter = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'lockstep.server.front'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {
        ENVIRONMENT: told.encode(),
        LINK_ENVIRONMENT: link_config.encode(),
        "PYTHONPATH": str(SOURCE),
    }
    with subprocess.Popen(
        [sys.executable, "-c", starter], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        front = psutil.Process(int(process.stdout.readline()))
        wait_until(lambda: _listens(told.port), 20)
        process.kill()
    wait_until(lambda: not front.is_running() or front.status() == psutil.STATUS_ZOMBIE)


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0 and _healthy(port)


def _healthy(port):
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (ServerSettings(host="0.0.0.0"), "--no-auth"),
        (ServerSettings(host="256.1.1.1", no_auth=True), "cannot listen on 256.1.1.1"),
        (ServerSettings(port=0, ssl_certfile="/no/such/file"), "certificate"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    monkeypatch, capsys, link_config, folder, settings, reason
):
    monkeypatch.setenv(ENVIRONMENT, settings.encode())
    monkeypatch.setenv(LINK_ENVIRONMENT, link_config.encode())
    assert main() == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_a_taken_port_is_named(monkeypatch, capsys, link_config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(ENVIRONMENT, ServerSettings(port=port).encode())
        monkeypatch.setenv(LINK_ENVIRONMENT, link_config.encode())
        assert main() == 2
    assert f"port {port}" in capsys.readouterr().err


def test_keys_limits_origins_and_encryption_guard_the_door(folder, link_config, tmp_path, slow_engine):
    slow_engine.delay_s = 0.0
    certificate, key = _certificate(tmp_path)
    guarded = {
        "api_keys": ["alpha", "beta"],
        "requests_per_minute": 2,
        "cors_origins": ["https://app.example.org"],
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(key),
        "log_format": "json",
        "max_prompt_tokens": 5,
    }
    with front_process(folder, link_config, tmp_path, **guarded) as front:
        front.wait_ready()
        assert front.url.startswith("https://")
        with httpx2.Client(base_url=front.url, verify=False) as http:
            for path in ("/v1/models", "/cluster/status", "/metrics", "/docs", "/nowhere"):
                stranger = http.get(path)
                assert stranger.status_code == 401, path
                assert stranger.json()["error"]["type"] == "authentication_error"
            alpha, beta = ({"authorization": f"Bearer {name}"} for name in ("alpha", "beta"))
            assert http.get("/v1/models", headers=alpha).status_code == 200
            long = http.post("/v1/completions", json=BODY | {"prompt": "the fox " * 9}, headers=beta)
            assert long.json()["error"]["code"] == "context_length_exceeded"
            statuses = [http.post("/v1/completions", json=BODY, headers=alpha).status_code for _ in range(3)]
            assert statuses == [200, 200, 429]
            assert http.post("/v1/completions", json=BODY, headers=beta).status_code == 200
            preflight = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
            # As OpenAI's client for web pages asks.
            names = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
            preflight["access-control-request-headers"] = names
            allowed = http.options("/v1/completions", headers=preflight)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == "https://app.example.org"
            assert allowed.headers["access-control-allow-headers"] == names
            answer = http.get("/health", headers={"origin": "https://app.example.org"})
            assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"
            other = http.options(
                "/v1/completions", headers=preflight | {"origin": "https://evil.example.org"}
            )
            assert "access-control-allow-origin" not in other.headers
        assert '"client": ' in front.stderr.read_text()
        assert "alpha" not in front.stderr.read_text()


def _certificate(folder):
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-days", "1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


def test_an_idle_front_rests(served):
    process = psutil.Process(served.front.process.pid)
    time.sleep(1)
    before, began_s = process.cpu_times(), time.monotonic()
    time.sleep(4)
    after = process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    assert used_s / (time.monotonic() - began_s) < 0.01
