"""The sandbox's filter of system calls, run by an interpreter."""

import struct

import pytest

from rewards.jail import seccomp


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_as_its_rules_say(machine):
    """The assembled program, run by an interpreter of classic BPF."""
    rules = (*seccomp.ALWAYS, *seccomp.without_namespaces(protected=(77,)))
    program = seccomp.assemble(rules, machine)
    column = 0 if machine == "x86_64" else 1
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(name: str | int, *arguments: int, arch: int = architecture) -> int:
        number = name if isinstance(name, int) else seccomp._NUMBERS[name][column]
        padded = [argument & (1 << 64) - 1 for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
        return _interpret(program, struct.pack("<IIQ6Q", number, arch, 0, *padded))

    allow, refuse, absent = 0x7FFF0000, 0x50001, 0x50026
    assert verdict(0) == verdict("clone", 0x11) == verdict("kill", 78, 9) == verdict("tgkill", 78, 78, 9) == allow
    assert verdict("clone", 0x10000011) == verdict("clone", 0x20011) == verdict("ptrace") == verdict("mount") == refuse
    assert verdict("clone3") == verdict("memfd_create") == verdict("io_uring_setup") == absent
    assert (
        verdict("kill", -1, 9) == verdict("kill", 77, 9) == verdict("kill", -77, 9) == verdict("tgkill", 77) == refuse
    )
    assert verdict("socket", 1, 1) == verdict("socket", 1, 0x80801) == verdict("prlimit64", 0) == allow
    assert verdict("socket", 2, 1) == verdict("socket", 10, 1) == verdict("socket", 16, 3) == refuse
    assert (
        verdict("socket", 1, 2) == verdict("socket", 40, 1) == verdict("connect") == verdict("prlimit64", 5) == refuse
    )
    assert verdict("setpriority", 0, 0) == allow and verdict("setpriority", 0, 5) == refuse
    assert verdict(0, arch=0x40000003) == 0x80000000
    if machine == "x86_64":
        assert verdict(0x40000000 | 101) == absent


def _interpret(program: bytes, data: bytes) -> int:
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator = place = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation in (0x15, 0x35):
            holds = accumulator == value if operation == 0x15 else accumulator >= value
            place += if_true if holds else if_false
        else:
            assert operation == 0x06
            return value
