"""The GPU kernel, run by Triton's interpreter, against the torch version."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import checksum

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare() -> None:
    """Runs in a process of its own: Triton decides at its import whether kernels are interpreted."""
    from kernels import checksum_triton

    checksum_triton._LONGEST = 40_000  # so that a row is more than one in the table
    first, stride = 2**33 + 5, 2**34 + 3
    parts = []
    for size, dtype in WORDS.items():
        for shape in [(1, 1), (1, 5000), (7, 3), (3, 2049), (0, 4), (4, 9000)]:
            octets = torch.randint(256, (shape[0] * shape[1] * size,), dtype=torch.uint8)
            words = octets.view(dtype).view(shape)
            parts += [(words, first, stride), (words, first, shape[1])]
    wide = torch.randint(-(2**63), 2**63 - 1, (6, 40))
    parts += [(wide[:, 8:24], 3, 40), (wide[::2, :5], 3, 40), (wide[:, :1], 3, 40)]
    parts.append((torch.randint(-(2**63), 2**63 - 1, (1, 90_000)), 7, 90_000))
    table = checksum_triton.DeviceTable(parts)
    expected = [int(checksum.word_hash_sum(*part)) for part in parts]
    assert table.sums().tolist() == expected
    wide[0, 8] += 1
    changed = [place for place, now in enumerate(table.sums().tolist()) if now != expected[place]]
    assert changed == [len(parts) - 4]
    assert checksum_triton.DeviceTable([(torch.zeros(0, 4), 0, 4)]).sums().tolist() == [0]
    with pytest.raises(ValueError, match="side by side"):
        checksum_triton.DeviceTable([(wide.T, 3, 40)])


def test_kernel_and_torch_agree():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    outcome = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=250)
    assert outcome.returncode == 0, outcome.stderr


if __name__ == "__main__":
    compare()
