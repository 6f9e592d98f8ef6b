"""Ends the processes that an engine started when the engine's own process is gone, however it went.

vLLM's processes outlive a parent that was killed with SIGKILL, and keep its GPU's memory. A process cannot act on its
own death, so a small one waits for it: it reads from a pipe that only the engine's process holds open. Its wards are
known by a mark in their environment, inherited by all that is started after :func:`end_with_this_process`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "KEEL_ENGINE"
_ROUNDS = 20
"""Looks at the process table: a ward may be starting another one while it is ended."""


def end_with_this_process() -> None:
    """Whatever this process starts from now on is killed when this process ends. Linux only; elsewhere nothing is."""
    if not Path("/proc/self/environ").exists():
        return
    mark = uuid.uuid4().hex
    reading, writing = os.pipe()  # not inheritable, so the children that come later do not hold it open
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).absolute()), mark],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # signals to this process's group are not for it
        env={name: value for name, value in os.environ.items() if name != MARK},
    )
    os.close(reading)
    os.environ[MARK] = mark
    _PIPES.append(writing)


_PIPES: list[int] = []
"""Writing ends, open for as long as this process lives."""


def wards(mark: str) -> Iterator[int]:
    """Ids of the processes of this user that carry the mark."""
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    yield int(directory.name)
            except OSError:  # another user's, or gone by now
                continue


def reap(mark: str) -> None:
    """Kills all wards, and those that they start meanwhile."""
    for _ in range(_ROUNDS):
        alive = list(wards(mark))
        for process in alive:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not alive:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the engine's process has ended
    reap(sys.argv[1])
