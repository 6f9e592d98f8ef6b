"""Where a process of the run is, and what it is doing when it does not answer any more.

    where = await actor.__ray_call__.remote(announce)        # while it still answers
    print(stack_of(where))                                   # later, by any process of the same user on the same host

The stack is dumped by a signal handler of ``faulthandler``, which needs neither the interpreter's lock nor an event
loop, into memory that is read through ``/proc``. Linux only; elsewhere a process says nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DUMP_SIGNAL = signal.SIGUSR2
DUMP_S = 2.0
"""Seconds that a dump may take to appear."""
_NAME = "keel-stacks"
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
_MACHINERY = re.compile(r"/ray/|/asyncio/|/concurrent/|/threading\.py|/selectors\.py|/workers/default_worker\.py")
_STATES = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "D": "waits for a device", "Z": "has ended"}


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """One process: its host's name, its id there, and the descriptor of its own that stacks are dumped into."""

    host: str
    pid: int
    descriptor: int | None

    @property
    def is_here(self) -> bool:
        """Whether it is on this process's host."""
        return self.host == socket.gethostname()


def announce(_: Any = None) -> Whereabouts:
    """Of the calling process, which from now on dumps its stacks when it is asked."""
    descriptor = _DUMPS.get(os.getpid())
    if descriptor is None and hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(_NAME)
        faulthandler.register(DUMP_SIGNAL, file=descriptor, all_threads=True)
        _DUMPS[os.getpid()] = descriptor
    return Whereabouts(socket.gethostname(), os.getpid(), descriptor)


_DUMPS: dict[int, int] = {}
"""The descriptor of this process, by its id: a fork has its own."""


def state_of(where: Whereabouts) -> str:
    """What the kernel says of a process on this host: ``runs``, ``sleeps``, or words for why it does neither."""
    try:
        stat = Path(f"/proc/{where.pid}/stat").read_text()
    except OSError:
        return "is gone"
    letter = stat.rpartition(")")[2].split()[0]
    return _STATES.get(letter, "runs" if letter == "R" else "sleeps")


def stack_of(where: Whereabouts) -> str:
    """The state of a process on this host and its stacks, innermost call first; or the state alone."""
    state = state_of(where)
    if state in _STATES.values() or not _is_same(where):
        return state
    path = _dumps(where)
    try:
        before = path.stat().st_size
        os.kill(where.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + DUMP_S
        sizes = [before]
        while time.monotonic() < deadline:
            time.sleep(0.05)
            sizes.append(path.stat().st_size)
            if sizes[-1] > before and len(set(sizes[-3:])) == 1:
                break
        with open(path, "rb") as dumps:
            dumps.seek(before)
            text = dumps.read().decode(errors="replace").strip()
    except OSError as error:
        return f"{state}, and its stack cannot be read: {error.strerror}"
    return f"{state}\n{text}" if text else f"{state}, and does not dump its stack"


def innermost(stack: str, count: int = 3) -> str:
    """One line out of :func:`stack_of`: the innermost calls of the thread that is in the most of our own code."""
    state, _, dump = stack.partition("\n")
    threads = [_frames(thread) for thread in dump.split("\n\n")]
    busiest = max(threads, key=lambda frames: sum(not _MACHINERY.search(frame["file"]) for frame in frames))
    calls = [f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})" for frame in busiest]
    return f"{state}, in {', called by '.join(calls[:count])}" if calls else state


def end(where: Whereabouts) -> None:
    """Kills a process on this host, even one that is stopped; another one that got its id since is left alone."""
    if _is_same(where):
        with contextlib.suppress(ProcessLookupError):
            os.kill(where.pid, signal.SIGKILL)


def _dumps(where: Whereabouts) -> Path:
    return Path(f"/proc/{where.pid}/fd/{where.descriptor}")


def _is_same(where: Whereabouts) -> bool:
    """Whether the process is the one that announced itself: another one would die of the signal for a dump."""
    try:
        return _NAME in os.readlink(_dumps(where))
    except OSError:
        return False


def _frames(thread: str) -> list[dict[str, str]]:
    return [match.groupdict() for line in thread.splitlines() if (match := _FRAME.match(line))]
