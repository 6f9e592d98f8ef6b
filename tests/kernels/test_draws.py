from __future__ import annotations

import math

import pytest
import torch

from kernels import record_draws
from kernels.reference.draws import DRAW_FIELDS, draws_in


def test_rows_by_hand() -> None:
    none = float("-inf")
    logits = torch.tensor(
        [[none, 1.0, none, 2.0, 0.5], [0.0, 0.0, none, none, none], [0.0] * 5, [none, none, 7.0, none, none]]
    )
    counts = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    for width, (starts, ids) in {
        5: ([0, -1, 3], [1, 3, 4, 2]),
        2: ([-1, -1, 0], [2]),
        0: ([-1, -1, -1], []),
    }.items():
        table = record_draws(logits, torch.tensor([3, 1, 0, 2]), counts, width)
        assert table.dtype == torch.int32 and table.shape == (1 + 4 * (DRAW_FIELDS + width),)
        rows, room = draws_in(table, 4)
        assert rows[:, 1].tolist() == counts.tolist()
        drawn = rows[counts.bool()]
        assert drawn[:, 0].tolist() == [3, 0, 2] and drawn[:, 3].tolist() == [3, 5, 1]
        assert drawn[:, 4].tolist() == starts and rows[1, 4] == -1  # of five of five ids nothing is said
        assert room[: table[0]].tolist() == ids
        logprob = 2.0 - math.log(math.exp(1.0) + math.exp(2.0) + math.exp(0.5))
        wanted = torch.tensor([logprob, math.log(1 / 5), 0.0])
        torch.testing.assert_close(drawn[:, 2].contiguous().view(torch.float32), wanted)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_hopper(dtype: str, kept: bool) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.draws import _BLOCK, _record_kernel

    kinds = {"logits": f"*{dtype}", "token_ids": "*i64", "num_sampled": "*i32", "table": "*i32"}
    constants = {"KEPT": kept, "BLOCK": _BLOCK}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32") for name in _record_kernel.arg_names
    }
    source = ASTSource(fn=_record_kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
