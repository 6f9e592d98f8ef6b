"""Namespaces without bubblewrap: own mounts, processes, network, IPC and host name, and a root of read-only binds."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Mapping, Sequence

from . import syscalls
from .syscalls import MS_BIND, MS_NODEV, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT

DEVICES = ("null", "zero", "full", "random", "urandom")

_LOCKED = {
    os.ST_NOSUID: MS_NOSUID,
    os.ST_NODEV: MS_NODEV,
    os.ST_NOEXEC: 8,
    os.ST_NOATIME: 1024,
    os.ST_RELATIME: 1 << 21,
}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def enter(
    *, readable: Sequence[str], writable: Mapping[str, str], scratch: Mapping[str, int], staged: Mapping[str, str]
) -> None:
    """Returns in a new process, the first of its own process table, that sees nothing else of the machine.

    The calling process stays behind, waits for it and exits as it did; if it is killed, so is everything inside.

    Args:
        readable: paths that exist inside as they are outside, read-only. Links stay links, except below ``writable``.
        writable: path outside, by path inside.
        scratch: bytes of a file system in memory, by path inside.
        staged: path outside, by path inside, read-only.

    Raises:
        OSError: this user may not make namespaces here.
    """
    user, group = os.geteuid(), os.getegid()
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC
    flags |= syscalls.CLONE_NEWUTS | (syscalls.CLONE_NEWUSER if user else 0)
    syscalls.unshare(flags)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        _wait_and_exit(child)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    _raise_loopback()
    _change_root(readable, writable, scratch, staged)


def _wait_and_exit(child: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _change_root(
    readable: Sequence[str], writable: Mapping[str, str], scratch: Mapping[str, int], staged: Mapping[str, str]
) -> None:
    root = "/tmp"  # any directory will do: the new root is mounted over it, for this process alone
    syscalls.mount("none", "/", None, MS_REC | MS_PRIVATE)
    # Held open, as the mount hides whatever of it lies below /tmp.
    outside = (*readable, *writable.values(), *staged.values())
    below = tuple(f"{inside}/" for inside in writable)  # where a link would outlast this program
    links = {path: os.readlink(path) for path in readable if os.path.islink(path) and not path.startswith(below)}
    held = {path: os.open(path, os.O_PATH) for path in outside if path not in links}
    syscalls.mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    for inside, size in scratch.items():
        os.makedirs(root + inside, exist_ok=True)
        syscalls.mount("tmpfs", root + inside, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0777,size={size}")
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for inside, path in (*writable.items(), *staged.items()):
        _bind(held[path], root + inside, read_only=inside in staged)
    for path in readable:
        if path in held:
            _bind(held[path], root + path, read_only=True)
    for device in DEVICES:
        _bind(os.open(f"/dev/{device}", os.O_PATH), f"{root}/dev/{device}", read_only=False)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    os.makedirs(f"{root}/proc", exist_ok=True)
    syscalls.mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | 8)
    os.chdir(root)
    syscalls.pivot_root(".", ".")
    syscalls.detach(".")
    os.chdir("/")
    syscalls.mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind(source: int, target: str, *, read_only: bool) -> None:
    origin = f"/proc/self/fd/{source}"
    if os.path.isdir(origin):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    syscalls.mount(origin, target, None, MS_BIND | MS_REC)
    os.close(source)
    if read_only:
        # Flags that the original mount was given from above cannot be taken off, and must be named again.
        kept = sum(flag for bit, flag in _LOCKED.items() if os.statvfs(target).f_flag & bit)
        syscalls.mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)
