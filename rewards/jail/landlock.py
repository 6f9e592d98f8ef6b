"""Landlock: rules about the file system that a process sets for itself, without privilege (Linux 5.13 and later)."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from . import syscalls

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REFER, _TRUNCATE, _DEVICE_IOCTL = 1 << 13, 1 << 14, 1 << 15
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _DEVICE_IOCTL
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract sockets and signals


def version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    try:
        return syscalls.call("landlock_create_ruleset", _CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves this process, and all it starts, only these paths and what lies beneath. Absent ones are passed over.

    From ABI 4 on TCP is refused too, and from ABI 6 on signals to processes outside, and their abstract sockets.
    Needs ``no_new_privs``. Raises OSError.
    """
    abi = version()
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    fields = (rights, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 8 * (3 if abi >= 6 else 2 if abi >= 4 else 1)
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", *fields))
    ruleset = syscalls.call("landlock_create_ruleset", _CREATE, attributes, size, 0)
    try:
        for path in readable:
            _allow(ruleset, path, _READING & rights)
        for path in writable:
            _allow(ruleset, path, rights)
        syscalls.call("landlock_restrict_self", _RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # what cannot be reached needs no rule
        return
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= _OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
        syscalls.call("landlock_add_rule", _ADD, ruleset, 1, rule, 0)
    finally:
        os.close(handle)
