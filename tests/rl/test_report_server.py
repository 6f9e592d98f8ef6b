"""The served report: who gets an answer, and what is in it."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from rl.errors import DataError
from rl.report.server import ReportServer
from tests.rl.report_runs import ALARMS, spans, step_metrics, trajectory, write_lines, write_run


@contextlib.contextmanager
def serving(*runs, **options) -> Iterator[ReportServer]:
    with ReportServer([run.path for run in runs], port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=10, end=False)


@pytest.fixture(scope="module")
def server(run) -> Iterator[ReportServer]:
    with serving(run) as server:
        yield server


def get(server: ReportServer, path: str, host: str | None = None, method: str = "GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"localhost:{server.server_port}"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, gzip.decompress(body) if response.headers.get("Content-Encoding") == "gzip" else body


def news(server: ReportServer, number: int = 0, **seen: int):
    known = {"epoch": 0, "metrics": -1, "supervised": -1, "alarms": 0, "spans": 0, "samples": -1} | seen
    query = "&".join(f"{name}={value}" for name, value in known.items())
    response, body = get(server, f"/run/{number}/news?{query}")
    assert response.status == 200
    return json.loads(body)


def test_it_listens_on_loopback_alone(server: ReportServer):
    assert server.server_address[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        if not str(address).startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((str(address), server.server_port), timeout=2)


STRANGERS = ("evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1", "", "[::1", "a@b", "x@localhost")


@pytest.mark.parametrize("host", STRANGERS)
def test_other_host_names_are_refused(server: ReportServer, host):
    response, body = get(server, "/", host=host or " ")
    assert response.status == 403 and b"run-data" not in body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:80"])
def test_names_of_this_machine_are_answered(server: ReportServer, host):
    assert get(server, "/", host=host)[0].status == 200


def test_asked_for_more_hosts_any_name_is_answered(run):
    with serving(run, host="0.0.0.0") as server:
        assert get(server, "/", host="trainer.example")[0].status == 200
        assert not server.is_loopback


def test_the_other_loopback_is_one_too(run):
    with serving(run, host="::1") as server:
        connection = http.client.HTTPConnection("::1", server.server_port, timeout=30)
        connection.request("GET", "/nothing", headers={"Host": "evil.example"})
        assert connection.getresponse().status == 403


@pytest.mark.parametrize("path", ["/", "/run/0/samples/10", "/nothing"])
def test_no_answer_may_be_shared_framed_or_guessed(server: ReportServer, path):
    response, _ = get(server, path)
    headers = {name.lower(): value for name, value in response.headers.items()}
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin" and headers["cache-control"] == "no-store"
    assert not any(name.startswith("access-control") for name in headers)
    assert headers["server"].startswith("keel") and "Python" not in headers["server"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/run/0/samples/10", 200),
        ("/run/0/samples/11", 404),
        ("/run/1/samples/10", 404),
        ("/run/0/samples/../../recipe.yaml", 404),
        ("/run/0/samples/%2e%2e%2frecipe.yaml", 404),
        ("/recipe.yaml", 404),
        ("//etc/passwd", 404),
        ("/run/0/news", 400),
        ("/run/0/news?epoch=0&metrics=x&supervised=0&alarms=0&spans=0&samples=0", 400),
        ("/run/99999999999/news", 404),
    ],
)
def test_only_what_belongs_to_the_page_is_served(server: ReportServer, path, status):
    assert get(server, path)[0].status == status


def test_it_only_reads(server: ReportServer):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(server, "/", method=method)[0].status == 501


def test_the_page_asks_its_own_server_and_no_other(server: ReportServer):
    _, body = get(server, "/")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', body.decode())
    assert policy.endswith("; connect-src 'self'") and policy.startswith("default-src 'none'")


def test_news_are_what_came_since(tmp_path):
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "demo", steps=10, end=False)
    with serving(run) as server:
        first = news(server)
        assert first["metrics"]["steps"] == list(range(11)) and first["supervised"]["steps"] == list(range(1, 41))
        assert [one["step"] for one in first["index"]] == [5] * 4 + [10] * 4 and first["samples"] == 10
        seen = {"metrics": 10, "supervised": 40, "samples": 10}
        quiet = news(server, **seen)
        assert quiet["metrics"]["steps"] == [] and quiet["index"] == [] and not quiet["more"] and not quiet["reset"]
        run.log(step_metrics(rng, 11, 30))
        run.log_samples(11, [trajectory(rng, 11, 0)])
        write_lines(run.path / "timeline.jsonl", spans(rng, 1))
        write_lines(run.path / "alarms.jsonl", [ALARMS[0]])
        told = news(server, **seen)
        assert told["metrics"]["steps"] == [11] and [one["step"] for one in told["index"]] == [11]
        assert told["alarms"] == [ALARMS[0]] and len(told["spans"]["actor"]) == 11
        assert news(server, **seen, alarms=1, spans=11)["spans"]["actor"] == []
        (entry,) = json.loads(get(server, "/run/0/samples/11")[1])
        assert entry["id"] == "sums/77#0"


def test_a_run_that_goes_back_makes_the_page_start_anew(tmp_path):
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "demo", steps=10, end=False)
    with serving(run) as server:
        assert not news(server, metrics=10)["reset"]
        write_lines(run.metrics, [step_metrics(rng, 8, 30)])  # resumed from the checkpoint of step 7
        assert news(server, metrics=10) == {"reset": True}
        assert news(server, epoch=1)["metrics"]["steps"] == list(range(11))
        run.metrics.write_text(json.dumps({"step": 1, "reward/mean": 0.5}) + "\n")
        assert news(server, epoch=1)["reset"] and news(server, epoch=2)["metrics"]["steps"] == [1]


def test_a_run_without_a_step_is_served_until_it_has_one(tmp_path):
    (tmp_path / "demo").mkdir()
    with ReportServer([tmp_path / "demo"], port=0) as server:
        assert 'id="curves-empty"' in server.page()


def test_what_cannot_be_served_is_a_sentence(run, server):
    with pytest.raises(DataError, match=rf"^cannot listen on 127.0.0.1 port {server.server_port}: it is taken; choose"):
        ReportServer([run.path], port=server.server_port)
    with pytest.raises(DataError, match="is not a directory"):
        ReportServer([run.path / "none"], port=0)
    with pytest.raises(DataError, match=r"^cannot listen on 192.0.2.1 port 0: Cannot assign requested address$"):
        ReportServer([run.path], host="192.0.2.1", port=0)
    with pytest.raises(DataError, match="--port 70000 is not a port"):
        ReportServer([run.path], port=70000)


def test_the_command_serves_until_it_is_interrupted(run):
    command = [sys.executable, "-m", "rl.report", str(run.path), "--serve", "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout and process.stderr
    address = re.match(r"http://localhost:(\d+)/", process.stdout.readline())
    assert address
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
    connection.request("GET", "/", headers={"Host": "localhost"})
    assert b"run-data" in connection.getresponse().read()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 0 and process.stderr.read() == ""
