"""The last steps of the process that becomes the program under judgement."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from typing import Any

from . import landlock, seccomp, syscalls

_STACK = 8 << 20


def become(config: Mapping[str, Any], *, protected: Sequence[int]) -> None:
    """Gives up every right that the program shall not have, and executes it. Never returns.

    A program that cannot be executed ends as a shell would end it: a line on standard error, status 127.
    """
    argv: list[str] = config["argv"]
    os.setsid()
    os.nice(5)  # so that the supervisor is heard among many of them
    _limit(config["limits"])
    syscalls.drop_capabilities(config["uid"])
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if config["landlock"] is not None:
        landlock.restrict(**config["landlock"])
    if seccomp.is_supported():
        shared = seccomp.without_namespaces(protected=protected) if config["shares_host"] else ()
        seccomp.install((*seccomp.ALWAYS, *shared))
    try:
        place = config["cwd"]
        os.chdir(place)
        place = argv[0]
        os.execvpe(place, argv, config["env"])
    except OSError as error:
        os.write(2, f"{place}: {error.strerror}\n".encode())
        os._exit(127)


def _limit(limits: Mapping[str, Any]) -> None:
    def bound(kind: int, value: int) -> None:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    bound(resource.RLIMIT_CORE, 0)
    bound(resource.RLIMIT_NOFILE, limits["open_files"])
    bound(resource.RLIMIT_FSIZE, limits["disk_bytes"])
    # Stacks count from the moment they are reserved; the supervisor sees to what is really used.
    bound(resource.RLIMIT_DATA, limits["memory_bytes"] + limits["processes"] * _STACK)
    bound(resource.RLIMIT_MSGQUEUE, 0)
    bound(resource.RLIMIT_MEMLOCK, 64 << 10)
    if limits["cpu_s"] is not None:
        bound(resource.RLIMIT_CPU, int(limits["cpu_s"]) + 1)
    if limits["processes_of_user"] is not None:
        bound(resource.RLIMIT_NPROC, limits["processes_of_user"])
