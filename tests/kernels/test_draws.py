from __future__ import annotations

import math

import pytest
import torch

from kernels import record_draws
from kernels.reference.draws import DRAW_FIELDS


def test_a_row_by_hand() -> None:
    none = float("-inf")
    logits = torch.tensor([[none, 1.0, none, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    table = record_draws(logits, torch.tensor([3, 1]), torch.tensor([1, 0], dtype=torch.int32), 2)
    assert table.dtype == torch.int32 and table.shape == (2, DRAW_FIELDS + 2)
    assert table[0, [0, 1, 3, 4, 5]].tolist() == [3, 1, 3, 1, 3]  # of ids 1, 3 and 4 two fit
    logprob = 2.0 - math.log(math.exp(1.0) + math.exp(2.0) + math.exp(0.5))
    torch.testing.assert_close(table[0, 2:3].view(torch.float32), torch.tensor([logprob]))
    assert table[1, 1] == 0


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
