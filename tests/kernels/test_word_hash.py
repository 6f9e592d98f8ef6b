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
    from kernels.checksum_triton import word_hash_sum

    first, stride = 2**33 + 5, 2**34 + 3
    for size, dtype in WORDS.items():
        for shape in [(1, 1), (1, 5000), (7, 3), (3, 2049), (0, 4)]:
            octets = torch.randint(256, (shape[0] * shape[1] * size,), dtype=torch.uint8)
            words = octets.view(dtype).view(shape)
            assert int(word_hash_sum(words, first, stride)) == int(checksum.word_hash_sum(words, first, stride)), shape
    wide = torch.randint(-(2**63), 2**63 - 1, (6, 40))
    for words in (wide[:, 8:24], wide[::2, :5], wide.T):
        assert int(word_hash_sum(words, 3, 40)) == int(checksum.word_hash_sum(words.contiguous(), 3, 40))


def test_kernel_and_torch_agree():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    outcome = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=250)
    assert outcome.returncode == 0, outcome.stderr


if __name__ == "__main__":
    compare()
