"""How programs are kept apart: what this machine allows, found by trying, and the command that starts one so."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from rewards.folder import Folder, relative_parts
from rewards.jail import landlock, seccomp
from rl.errors import UserError
from rl.plugin import describe

BOX = "/box"
"""The program's folder as the program sees it, where it has namespaces of its own."""

_STAGED = "/run/staged"
_MAX_ARGUMENT = 120_000  # the kernel takes 128 KiB
_FIRST_UID, _NUM_UIDS = 60_000, 5_000
_JAIL = Path(__file__).parent / "jail"
_START = "import sys; sys.path.append(sys.argv.pop(1)); from jail.launch import main; main()"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = ("alternatives", "group", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types")
_SETTINGS += ("nsswitch.conf", "passwd", "ssl/certs")
_KERNEL = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/sys/devices/system/cpu")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class SandboxError(UserError, RuntimeError):
    """The sandbox itself failed, or cannot be had in the form asked for; says nothing about the program."""


class Isolation(StrEnum):
    """How programs are kept apart, strongest first."""

    BUBBLEWRAP = "bubblewrap"
    """Namespaces made by bubblewrap: other files, processes and networks do not exist inside."""
    NAMESPACES = "namespaces"
    """The same, made by ourselves."""
    LANDLOCK = "landlock"
    """For containers that may not make namespaces. Files are out of reach by Landlock, and sockets by the filter, but
    process ids and file names can be seen, no program can use sockets to talk to itself, and none can leave its
    process group; before Linux 6.12 it may signal other processes of the same user, if it guesses their ids."""
    RLIMITS = "rlimits"
    """For kernels without Landlock. As above, but files are protected by their permissions alone."""

    @property
    def shares_host(self) -> bool:
        """Whether programs are in the host's namespaces."""
        return self in (Isolation.LANDLOCK, Isolation.RLIMITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use, all of its processes together. None is no limit."""

    wall_s: float | None = 10.0
    cpu_s: float | None = 10.0
    memory_bytes: int = 512 << 20
    """Resident memory of all processes, and private writable memory of each."""
    processes: int = 64
    """Threads count too."""
    output_bytes: int = 1 << 20
    """Of standard output and of standard error, each; for :meth:`Sandbox.run` alone."""
    disk_bytes: int = 64 << 20
    files: int = 10_000
    """In a :class:`Folder`; elsewhere memory bounds their number."""
    open_files: int = 256
    """Of one process."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"sandbox limit {name} must be above 0, not {value}")


class Pipes:
    """The supervisor's two descriptors: it reports through one, and ends when the other one is closed here."""

    def __init__(self) -> None:
        self._status, status = os.pipe()
        control, self._control = os.pipe()
        os.set_blocking(self._status, False)
        self.inner = (control, status)
        self.is_open = True
        self.asked_to_end = False
        self._open = {self._status, self._control, control, status}

    def close_inner(self) -> None:
        """Closes what the supervisor has its own copies of."""
        self._close(*self.inner)

    def close_control(self) -> None:
        self.is_open, self.asked_to_end = False, True
        self._close(self._control)

    def close(self) -> None:
        self.is_open = False
        self._close(*self._open)

    def report(self) -> dict[str, Any]:
        """What the supervisor wrote before it ended; nothing if it was killed."""
        with contextlib.suppress(BlockingIOError, json.JSONDecodeError):
            return json.loads(os.read(self._status, 1 << 16))
        return {}

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor in self._open:
                self._open.discard(descriptor)
                os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Everything that decides the command of one program."""

    isolation: Isolation
    limits: Limits
    readable: tuple[str, ...]
    folder: Folder
    in_memory: bool  # whether the program works on a copy of the folder in memory
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str

    def command(self, pipes: Pipes) -> list[str]:
        config = json.dumps(self._config(pipes), ensure_ascii=False)
        if len(config.encode()) > _MAX_ARGUMENT:
            raise ValueError("a sandboxed program's arguments are too long; pass what is long in files or stdin")
        start = [_interpreter(), "-I", "-S", "-c", _START, str(_JAIL.parent), config]
        return [*self._bubblewrap(), *start] if self.isolation is Isolation.BUBBLEWRAP else start

    def _config(self, pipes: Pipes) -> dict[str, Any]:
        isolation, folder = self.isolation, self.folder
        work, tmp = (str(folder.work), str(folder.tmp)) if isolation.shares_host else (BOX, "/tmp")
        places = {"HOME": work, "TMPDIR": tmp, "LANG": "C.UTF-8", "PATH": search_path(), "OMP_NUM_THREADS": "1"}
        control, status = pipes.inner
        return {
            "argv": list(self.argv),
            "env": places | _library_path() | dict(self.env),
            "cwd": os.path.join(work, *relative_parts(self.cwd)),
            "limits": {name: getattr(self.limits, name) for name in Limits.__slots__}
            | {"processes_of_user": self._processes_of_user()},
            "namespaces": self._namespaces() if isolation is Isolation.NAMESPACES else None,
            "shares_host": isolation.shares_host,
            "uid": folder.uid,
            "landlock": {"readable": [*self.readable, *_KERNEL], "writable": [work, tmp, *_DEVICES]}
            if isolation is Isolation.LANDLOCK
            else None,
            "copied": {"from": _STAGED, "to": BOX} if self.in_memory else None,
            "owned": [BOX, "/tmp", "/dev/shm"] if self.in_memory else [] if isolation.shares_host else ["/dev/shm"],
            "watched": [] if self.in_memory else [work, tmp],
            "unwatched": [] if isolation.shares_host else list(self.readable),
            "control_fd": control,
            "status_fd": status,
        }

    def _processes_of_user(self) -> int | None:
        """RLIMIT_NPROC counts by user: by one of its own, or by one that only its user namespace knows."""
        supervisor = 4
        if self.folder.uid is not None or (not self.isolation.shares_host and _counts_by_namespace()):
            return self.limits.processes + supervisor
        return None

    def _binds(self) -> dict[str, str]:
        """Writable paths outside, by path inside."""
        return {} if self.in_memory else {BOX: str(self.folder.work), "/tmp": str(self.folder.tmp)}

    def _scratch(self) -> tuple[str, ...]:
        return (BOX, "/tmp", "/dev/shm") if self.in_memory else ("/dev/shm",)

    def _namespaces(self) -> dict[str, Any]:
        return {
            "readable": self.readable,
            "writable": self._binds(),
            "scratch": dict.fromkeys(self._scratch(), self.limits.disk_bytes),
            "staged": {_STAGED: str(self.folder.work)} if self.in_memory else {},
        }

    def _bubblewrap(self) -> list[str]:
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--die-with-parent", "--as-pid-1", *([] if os.geteuid() == 0 else ["--unshare-user"])]
        command += ["--proc", "/proc", "--dev", "/dev"]
        for path in self._scratch():
            command += ["--size", str(self.limits.disk_bytes), "--tmpfs", path]
        for inside, outside in self._binds().items():
            command += ["--bind", outside, inside]
        above = {str(parent) for path in self.readable for parent in Path(path).parents} - {"/", "/tmp"}
        for path in sorted(above):  # which it would make for its own user alone
            command += ["--perms", "0755", "--dir", path]
        below = tuple(f"{inside}/" for inside in self._binds())  # where a link would outlast this program
        for path in self.readable:
            if os.path.islink(path) and not path.startswith(below):
                command += ["--symlink", os.readlink(path), path]
            else:
                command += ["--ro-bind-try", path, path]
        if self.in_memory:
            command += ["--ro-bind", str(self.folder.work), _STAGED]
        return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--"]


@cache
def strongest() -> Isolation:
    """The strongest isolation that works on this machine, found by running a program under each."""
    reasons = []
    for isolation in Isolation:
        try:
            user_of(isolation)
            return isolation
        except SandboxError as error:
            reasons.append(str(error))
    raise SandboxError("; ".join(reasons))


@cache
def user_of(isolation: Isolation) -> int | None:
    """Probes an isolation. Whether root can run programs as another user under it: that user, or None.

    Raises SandboxError when it does not work here.
    """
    if isolation is Isolation.BUBBLEWRAP and shutil.which("bwrap") is None:
        raise SandboxError("bubblewrap is not installed (the command bwrap)")
    if isolation.shares_host and not seccomp.is_supported():
        raise SandboxError(f"{isolation} needs x86_64 or aarch64, where the system call filter is known")
    if isolation is Isolation.LANDLOCK and landlock.version() == 0:
        raise SandboxError("this kernel has no Landlock, or it is turned off")
    users = [_some_uid(), None] if os.geteuid() == 0 else [None]
    if isolation is Isolation.RLIMITS:
        users = users[:1]  # nothing but permissions protects files, so root must not stay root
    reason = ""
    for uid in users:
        reason = _trial(isolation, uid)
        if not reason:
            return uid
    raise SandboxError(f"{isolation} does not work here ({reason})")


def _trial(isolation: Isolation, uid: int | None) -> str:
    """Why a trivial program does not run; "" when it does."""
    with Folder(uid=uid) as folder:
        pipes = Pipes()
        launch = Launch(
            isolation=isolation,
            limits=Limits(),
            readable=readable_paths(()),
            folder=folder,
            in_memory=not isolation.shares_host,
            argv=["python3", "-I", "-S", "-c", "print(1)"],
            env={},
            cwd=".",
        )
        try:
            ended = subprocess.run(
                launch.command(pipes), env=outer_environment(), pass_fds=pipes.inner, capture_output=True, timeout=60
            )
            report = pipes.report()
        except (OSError, subprocess.TimeoutExpired) as error:
            return describe(error)
        finally:
            pipes.close()
    if report.get("code") == 0 and ended.stdout == b"1\n":
        return ""
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    return report.get("error") or (said[-1] if said else f"status {report.get('code', ended.returncode)}")


def _some_uid() -> int:
    """A user that nobody else has, so that the kernel counts its processes by themselves."""
    return _FIRST_UID + secrets.randbelow(_NUM_UIDS)


def own_uid(isolation: Isolation) -> int | None:
    """The user that programs run as, if the isolation can give them one."""
    return None if user_of(isolation) is None else _some_uid()


def _interpreter() -> str:
    """The interpreter itself rather than a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def search_path() -> str:
    """Where programs are looked up."""
    return f"{os.path.dirname(sys.executable)}:{os.path.dirname(_interpreter())}:/usr/local/bin:/usr/bin:/bin"


def _library_path() -> dict[str, str]:
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def outer_environment() -> dict[str, str]:
    """What the jail's own launcher needs of the environment."""
    return {"PATH": os.environ.get("PATH", os.defpath), **_library_path()}


@cache
def readable_paths(further: tuple[str, ...]) -> tuple[str, ...]:
    """Every path that programs may read, those first that lie above others."""
    # A virtual environment may be a link to one elsewhere, and so may the interpreter that it was made of.
    prefixes = (sys.prefix, sys.base_prefix)
    python = (*prefixes, *map(os.path.realpath, prefixes), str(_JAIL))
    paths = {*_SYSTEM, *(f"/etc/{name}" for name in _SETTINGS), *python}
    for path in further:
        if not os.path.isabs(path) or not os.path.exists(path):
            raise SandboxError(f"sandbox: the readable path {path} must be absolute and exist")
        paths |= {path, os.path.realpath(path)}
    found = sorted(path for path in paths if os.path.lexists(path))
    folders = {path for path in found if not os.path.islink(path)}
    return tuple(path for path in found if not any(str(above) in folders for above in Path(path).parents))


def _counts_by_namespace() -> bool:
    """Whether this kernel counts a user's processes in each user namespace by itself, as Linux does from 5.14 on."""
    major, minor = (int(number) for number in os.uname().release.split(".")[:2])
    return os.geteuid() != 0 and (major, minor) >= (5, 14)
