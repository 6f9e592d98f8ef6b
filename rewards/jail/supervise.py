"""Starts the program, adds up what all of its processes use, and ends them: by a limit, at the caller's word, or when
the program's first process has ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from . import confine, syscalls

_TICK_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SPARE_PROCESSES = 256
"""How far the host's own threads may multiply while a program runs under a limit that counts them too."""


def supervise(config: Mapping[str, Any], *, is_init: bool) -> None:
    """Runs the program to its end and writes one JSON object to ``status_fd``. Never returns.

    ``{"code": exit code or minus the signal, "exceeded": limit or null, "cpu_s", "peak_memory_bytes"}``. The program is
    ended when the other side of ``control_fd`` is closed. ``is_init`` says that this is the first process of a process
    table of its own.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # so that the program cannot look into this process
    if not is_init:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    config = dict(config, limits=dict(config["limits"]))
    if config["shares_host"] and config["uid"] is None:
        config["limits"]["processes_of_user"] = _threads_of_user() + config["limits"]["processes"] + _SPARE_PROCESSES
    protected = (os.getpid(), os.getppid())
    child = os.fork()
    if child == 0:
        try:
            confine.become(config, protected=protected)
        except BaseException as error:
            os.write(config["status_fd"], json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(126)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    tree = _Tree(child, is_init=is_init)
    status = _watch(tree, config)
    tree.kill()
    status["cpu_s"] = max(status["cpu_s"], tree.cpu_s())
    os.write(config["status_fd"], json.dumps(status).encode())
    os._exit(0)


def _watch(tree: _Tree, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns when the program has ended or must."""
    limits = config["limits"]
    control = select.poll()
    control.register(config["control_fd"], select.POLLIN | select.POLLHUP)
    with contextlib.suppress(AttributeError, OSError):  # kernels before 5.3: an end is noticed at the next tick
        control.register(os.pidfd_open(tree.child), select.POLLIN)
    folders = [_Folder(path, frozenset(config["unwatched"])) for path in config["watched"]]
    status: dict[str, Any] = {"code": None, "exceeded": None, "cpu_s": 0.0, "peak_memory_bytes": 0}
    while True:
        ready = control.poll(_TICK_S * 1000)
        if (code := tree.reap()) is not None:
            status["code"] = code
            # The kernel's own limit of CPU time ends a process by this signal.
            status["exceeded"] = "cpu" if code == -signal.SIGXCPU else status["exceeded"]
            return status
        if any(fd == config["control_fd"] for fd, _ in ready):
            return status
        processes, memory = tree.size(limits)
        status["peak_memory_bytes"] = max(status["peak_memory_bytes"], memory)
        if processes > limits["processes"]:
            status["exceeded"] = "processes"
            return status
        status["cpu_s"] = tree.cpu_s()
        if memory > limits["memory_bytes"]:
            status["exceeded"] = "memory"
        elif limits["cpu_s"] is not None and status["cpu_s"] > limits["cpu_s"]:
            status["exceeded"] = "cpu"
        elif any(folder.is_over(limits["disk_bytes"], limits["files"]) for folder in folders):
            status["exceeded"] = "disk"
        if status["exceeded"]:
            return status


class _Tree:
    """The program's processes, those included that lost their parent: they become children of this process."""

    def __init__(self, child: int, *, is_init: bool) -> None:
        self.child = child
        self._is_init = is_init

    def pids(self) -> Iterator[int]:
        if self._is_init:
            yield from (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())
        else:
            yield from descendants(os.getpid())

    def reap(self) -> int | None:
        """Collects what has ended; the exit code (or minus the signal) of the first process once it has."""
        code = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.child:
                    code = os.waitstatus_to_exitcode(status)
        return code

    def size(self, limits: Mapping[str, Any]) -> tuple[int, int]:
        """(threads, resident bytes). Pages that processes share count once if counting them often makes too many."""
        threads, resident = 0, 0
        pids = []
        for pid in self.pids():
            pids.append(pid)
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
                threads += int(fields[17])
                resident += int(fields[21]) * _PAGE
            if threads > limits["processes"]:  # a bomb leaves little time, and needs no exact count
                return threads, 0
        return threads, resident if resident <= limits["memory_bytes"] else sum(map(_share, pids))

    def cpu_s(self) -> float:
        """Of those that have ended and those that run."""
        own = os.times()
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
        return own.children_user + own.children_system + ticks / _TICKS_PER_S

    def kill(self) -> None:
        """Ends every process and waits for them."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.kill(-1, signal.SIGKILL) if self._is_init else os.killpg(self.child, signal.SIGKILL)
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.005)


class _Folder:
    """A folder on disk, measured as often as that costs little, without what is mounted below it."""

    def __init__(self, path: str, mounts: frozenset[str]) -> None:
        self._path = path
        self._mounts = mounts
        self._due = 0.0

    def is_over(self, max_bytes: int, max_files: int) -> bool:
        began = time.monotonic()
        if began < self._due:
            return False
        over = self._measure(max_bytes, max_files)
        ended = time.monotonic()
        self._due = ended + max(0.25, 10 * (ended - began))
        return over

    def _measure(self, max_bytes: int, max_files: int) -> bool:
        used = found = 0
        open_folders = [self._path]
        while open_folders:
            with contextlib.suppress(OSError), os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    if entry.path in self._mounts:
                        continue
                    found += 1
                    with contextlib.suppress(OSError):
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            open_folders.append(entry.path)
                    if found > max_files or used > max_bytes:
                        return True
        return False


def _share(pid: int) -> int:
    """Resident bytes, where a page in n processes counts as 1/n."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Pss:"))
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE
    return 0


def descendants(pid: int) -> Iterator[int]:
    """A process's children, and theirs."""
    open_pids = [pid]
    while open_pids:
        children = _children(open_pids.pop())
        open_pids += children
        yield from children


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    return []


def _threads_of_user() -> int:
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
