"""A Ray cluster of two nodes on this machine, started as a user starts one, with a token and a job server."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.rl.tiny_runs import environment

RAY = Path(sys.executable).parent / "ray"
CPUS = 2
"""Of each node."""


@dataclass(frozen=True, slots=True)
class TwoNodes:
    job_server: str
    env: dict[str, str]
    folders: tuple[Path, Path]
    """What each node keeps on disk; sent working directories too, in which a job's processes run."""

    def submit(self, working_dir: Path, *entrypoint: str, name: str, log: Path) -> subprocess.Popen[bytes]:
        """`ray job submit`, which follows the job's output into ``log`` until it ends."""
        command = [RAY, "job", "submit", "--address", self.job_server, "--submission-id", name, "--working-dir", "."]
        with log.open("wb") as out:
            return subprocess.Popen(
                [*command, "--", *entrypoint], cwd=working_dir, env=self.env, stdout=out, stderr=subprocess.STDOUT
            )

    def stop(self, name: str) -> subprocess.CompletedProcess[str]:
        """`ray job stop`, which waits for the job to end."""
        command = [RAY, "job", "stop", "--address", self.job_server, name]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=90)

    def processes(self, node: int) -> list[str]:
        """Commands of the processes that run in a working directory sent to one of the nodes."""
        return list(_inside(self.folders[node] / "session_latest"))


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Ends both nodes behind the block."""
    base = Path(tempfile.mkdtemp(prefix="keel", dir="/tmp"))  # the paths of sockets are at most 107 bytes long
    (base / "token").write_text(secrets.token_hex(32))
    folders = base / "a", base / "b"
    env = environment() | {
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(base / "token"),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    gcs, dashboard, client, *agents = _free_ports(5)
    head = ("--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for folder, agent, role in zip(folders, agents, (head, (f"--address=127.0.0.1:{gcs}",)), strict=True):
            nodes.append(_start(folder, env, *role, f"--dashboard-agent-listen-port={agent}"))
        yield TwoNodes(job_server=f"http://127.0.0.1:{dashboard}", env=env, folders=folders)
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            node.wait(timeout=60)
        shutil.rmtree(base, ignore_errors=True)


def _start(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    log = folder.with_suffix(".log")
    size = (f"--num-cpus={CPUS}", "--num-gpus=0", f"--object-store-memory={100 << 20}", "--disable-usage-stats")
    command = [RAY, "start", "--block", f"--temp-dir={folder}", *size, *arguments]
    with log.open("wb") as out:
        node = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return node


def _inside(folder: Path) -> Iterator[str]:
    place = folder.resolve()
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(place / "runtime_resources"):
                yield " ".join(process.cmdline())
        except (psutil.Error, OSError):
            continue


def _free_ports(number: int) -> list[int]:
    """Below those that the system gives away by itself, so that nothing else takes them in the meantime."""
    ports: set[int] = set()
    while len(ports) < number:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)
