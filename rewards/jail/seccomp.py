"""The filter of system calls: what no program under judgement needs, and what the other walls do not stop."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from . import syscalls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000

_NUMBERS = {  # x86_64, aarch64
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442),
    "unshare": (272, 97), "setns": (308, 268), "clone": (56, 220), "clone3": (435, 435),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "socket": (41, 198), "connect": (42, 203), "setsid": (112, 157), "setpgid": (109, 154),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip

_NEW_NAMESPACES = 0x7E020000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_STREAM, _SOCK_KIND = 1, 0xF


@dataclass(frozen=True)
class Rule:
    """Fails a call, always or for some values of one argument (its low 32 bits, after ``mask``)."""

    name: str
    argument: int | None = None
    mask: int = 0xFFFFFFFF
    refused: Sequence[int] = ()  # these values are refused ...
    accepted: Sequence[int] = ()  # ... or all but these
    error: int = errno.EPERM


ALWAYS = (
    *(Rule(name) for name in (
        "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "bpf", "perf_event_open",
        "userfaultfd", "keyctl", "add_key", "request_key", "mount", "umount2", "pivot_root", "chroot", "open_tree",
        "move_mount", "fsopen", "fsmount", "fspick", "mount_setattr", "unshare", "setns", "open_by_handle_at",
        "name_to_handle_at", "fanotify_init", "kexec_load", "kexec_file_load", "init_module", "finit_module",
        "delete_module", "reboot", "acct", "quotactl", "syslog",
    )),
    # Memory that belongs to no process, so that nobody counts it.
    *(Rule(name, error=errno.ENOSYS) for name in ("memfd_create", "memfd_secret", "shmget", "msgget", "semget")),
    Rule("io_uring_setup", error=errno.ENOSYS),  # its operations are not system calls
    # clone3 has its flags behind a pointer; the C library falls back to clone.
    Rule("clone3", error=errno.ENOSYS),
    Rule("clone", 0, mask=_NEW_NAMESPACES, accepted=(0,)),
    Rule("socket", 0, accepted=(_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK)),
)  # fmt: skip


def without_namespaces(*, protected: Sequence[int]) -> tuple[Rule, ...]:
    """Further rules where the program shares the host's network and process table.

    Only local stream sockets that others connect to are left. The processes ``protected`` cannot be signalled, nor
    can everything at once, and no process leaves the group by which all of them are killed.
    """
    everyone = 0xFFFFFFFF  # -1
    return (
        Rule("socket", 0, accepted=(_AF_UNIX,)),
        Rule("socket", 1, mask=_SOCK_KIND, accepted=(_SOCK_STREAM,)),
        Rule("connect"),
        Rule("setsid"),
        Rule("setpgid"),
        Rule("tkill"),
        Rule("pidfd_open"),
        Rule("pidfd_send_signal"),
        Rule("rt_sigqueueinfo"),
        Rule("rt_tgsigqueueinfo"),
        Rule("kill", 0, refused=(everyone, *protected, *(-pid & everyone for pid in protected))),
        Rule("tgkill", 0, refused=protected),
        *(Rule(name, 0, accepted=(0,)) for name in ("prlimit64", "migrate_pages", "move_pages", "sched_setaffinity")),
        *(Rule(name, 0, accepted=(0,)) for name in ("sched_setscheduler", "sched_setparam", "sched_setattr")),
        Rule("setpriority", 1, accepted=(0,)),
        Rule("ioprio_set", 1, accepted=(0,)),
    )


def is_supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return syscalls.MACHINE in _ARCHITECTURES


def install(rules: Sequence[Rule]) -> None:
    """Filters the system calls of this process and of all that it starts, for good. Raises OSError."""
    program = assemble(rules, syscalls.MACHINE)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    syscalls.prctl_pointer(syscalls.PR_SET_SECCOMP, 2, header)  # SECCOMP_MODE_FILTER


_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def assemble(rules: Sequence[Rule], machine: str) -> bytes:
    """The filter as a classic BPF program, 8 bytes an instruction."""
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    column = 0 if machine == "x86_64" else 1
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for rule in rules:
        body = _refusal(rule)
        code += [(_EQUAL, 0, len(body), _NUMBERS[rule.name][column]), *body]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _refusal(rule: Rule) -> list[tuple[int, int, int, int]]:
    fail = (_RETURN, 0, 0, _ERROR | rule.error)
    if rule.argument is None:
        return [fail]
    body = [(_LOAD, 0, 0, 16 + 8 * rule.argument), (_AND, 0, 0, rule.mask)]
    if rule.accepted:
        count = len(rule.accepted)
        body += [(_EQUAL, count - place, 0, value) for place, value in enumerate(rule.accepted)]
    else:
        count = len(rule.refused)
        body += [(_EQUAL, count - place - 1, 1 if place == count - 1 else 0, v) for place, v in enumerate(rule.refused)]
    return [*body, fail, (_LOAD, 0, 0, 0)]  # the next rule compares the call's number again
