"""Serves a page that follows runs while they go on: ``python -m rl.report runs/NAME --serve``.

    GET /                       the page, with the curves so far
    GET /run/0/news?...         what came since: curves, alarms, timeline, summaries of trajectories
    GET /run/0/samples/120      the trajectories of a step

It reads and never writes, serves no files by their path, and listens on loopback unless told otherwise. A page of
another site cannot read it: on loopback, requests under any other host name are refused, and no answer allows sharing.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from rl.errors import DataError, UserError
from rl.report.block import compressed
from rl.report.page import render
from rl.report.run_data import live_data, news
from rl.report.run_files import RunFiles
from rl.report.samples import Budget, StepSamples

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8190
READING_S = 0.5
"""Seconds of one answer that go into reading trajectories; the page asks again for the rest."""

_SEEN = ("epoch", "metrics", "supervised", "alarms", "spans", "samples")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d+)?")
_RUN = re.compile(r"/run/(\d{1,4})/(?:news|samples/(\d{1,9}))")


class _Followed:
    """A run, read again at every question."""

    def __init__(self, path: Path, budget: Budget) -> None:
        self.files = RunFiles(path)
        self.budget = budget
        self.epoch = 0  # grows when what a page was told no longer holds
        self._samples = StepSamples({}, budget)
        self._lock = threading.Lock()

    def page_data(self) -> tuple[Any, int]:
        with self._lock:
            self._refresh()
            return live_data(self.files, self.budget), self.epoch

    def news(self, seen: Mapping[str, int]) -> dict[str, Any]:
        with self._lock:
            self._refresh()
            if seen["epoch"] != self.epoch:
                return {"reset": True}
            index, last = self._summaries(seen["samples"])
            more = any(step > last for step in self._samples.files)
            return news(self.files, seen) | {"reset": False, "index": index, "samples": last, "more": more}

    def entries(self, step: int) -> list[dict[str, Any]] | None:
        with self._lock:
            self._samples.files = self.files.samples
            return self._samples.entries(step) if step in self._samples.files else None

    def _refresh(self) -> None:
        if not self.files.refresh():
            self.epoch += 1
            self._samples = StepSamples({}, self.budget)
        self._samples.files = self.files.samples

    def _summaries(self, after: int) -> tuple[list[dict[str, Any]], int]:
        """Those of the next steps that can be read in a moment, and the last of these steps."""
        index, last, began = [], after, time.monotonic()
        for step in (step for step in self._samples.files if step > after):
            shown = self._samples.summaries(step)
            index += [one | {"block": str(step), "place": place} for place, one in enumerate(shown)]
            last = step
            if time.monotonic() - began > READING_S:
                break
        return index, last


class ReportServer(ThreadingHTTPServer):
    """Answers until :meth:`shutdown`; ``url`` is where. Raises UserError when it cannot listen there."""

    daemon_threads = True

    def __init__(self, runs: Sequence[str | Path], *, host: str = LOOPBACK, port: int = DEFAULT_PORT) -> None:
        budget = Budget()
        self.runs = [_Followed(Path(run), budget) for run in runs]
        self.is_loopback = _is_loopback(host)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OverflowError as error:
            raise DataError(f"--port {port} is not a port; give a number from 0 to 65535") from error
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "it is taken; choose another --port" if taken else error.strerror
            raise DataError(f"cannot listen on {host} port {port}: {reason}") from error

    @property
    def url(self) -> str:
        host = "localhost" if self.is_loopback else str(self.server_address[0])
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a browser that left before its answer came
            super().handle_error(request, client_address)

    def page(self) -> str:
        told = [run.page_data() for run in self.runs]
        return render([data for data, _ in told], live=True, epochs=[epoch for _, epoch in told])


def serve(runs: Sequence[str], *, host: str, port: int) -> None:
    """Serves until interrupted."""
    with ReportServer(runs, host=host, port=port) as server:
        if not server.is_loopback:
            print(f"keel: whoever reaches {host} can read these runs", file=sys.stderr)
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that an idle connection is kept

    def do_GET(self) -> None:
        if not self._is_asked_by_name():
            self._refuse(HTTPStatus.FORBIDDEN, "this host name is not served; open the address that was printed")
            return
        path, _, query = self.path.partition("?")
        try:
            if path == "/":
                self._answer(self.server.page().encode(), "text/html; charset=utf-8")
            elif (match := _RUN.fullmatch(path)) and int(match[1]) < len(self.server.runs):
                self._answer_about(self.server.runs[int(match[1])], match[2], query)
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        except UserError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _answer_about(self, run: _Followed, step: str | None, query: str) -> None:
        if step is not None:
            entries = run.entries(int(step))
            if entries is None:
                self._refuse(HTTPStatus.NOT_FOUND, "this step has no trajectories")
            else:
                self._answer(compressed(entries), "application/json", encoding="gzip")
            return
        asked = parse_qs(query)
        try:
            seen = {name: int(asked[name][0]) for name in _SEEN}
        except (KeyError, ValueError):
            self._refuse(HTTPStatus.BAD_REQUEST, f"give whole numbers for {', '.join(_SEEN)}")
            return
        self._answer(compressed(run.news(seen)), "application/json", encoding="gzip")

    def _is_asked_by_name(self) -> bool:
        """On loopback, whether the browser meant this machine: a name of others may resolve to it too."""
        named = _HOST.fullmatch(self.headers.get("Host", ""))
        return not self.server.is_loopback or (named is not None and _is_loopback(named[1].strip("[]")))

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        body = json.dumps({"error": sentence}).encode()
        self._answer(body, "application/json", status=status)

    def _answer(
        self, body: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK, encoding: str | None = None
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (headers | ({"Content-Encoding": encoding} if encoding else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "keel"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page asks every few seconds."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
