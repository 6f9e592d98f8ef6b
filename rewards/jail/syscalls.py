"""System calls that Python has no function for, through the C library, with errors as OSError."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 28, 36, 38

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x20000000, 0x40000000, 0x2000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

MACHINE = platform.machine()
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_LIBC.prctl(option, *padded), f"prctl({option})")


def prctl_pointer(option: int, mode: int, pointer: object) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(mode), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl({option})")


def call(name: str, number: int, *arguments: object) -> int:
    """A system call by number; integers are passed as 64-bit."""
    widened = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_LIBC.syscall(ctypes.c_long(number), *widened), name)


def unshare(flags: int) -> None:
    _check(_LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    place = f"mount of {source} on {target}"
    _check(_LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), place)


def pivot_root(new_root: str, put_old: str) -> None:
    call("pivot_root", _PIVOT_ROOT[MACHINE], new_root.encode(), put_old.encode())


def detach(target: str) -> None:
    _check(_LIBC.umount2(target.encode(), MNT_DETACH), f"umount of {target}")


def drop_capabilities(uid: int | None) -> None:
    """Gives up every capability for good, and becomes the user ``uid`` if one is given (root alone can)."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one that this kernel knows, or none to give up
            break
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # which clears the other sets
        return
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            prctl(PR_SET_SECUREBITS, 0b101111)  # root regains none at execve: NOROOT and NO_SETUID_FIXUP, locked
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", _CAPSET[MACHINE], ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
