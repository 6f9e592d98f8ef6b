"""The attention kernels compiled for an H100 or H200, which needs no GPU, at DeepSeek-V3.2's dimensions.

The interpreter knows neither shared memory nor tensor cores; this does.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from kernels import (  # noqa: E402
    masked_mha,
    masked_mha_hopper,
    masked_mha_hopper_backward,
    masked_mha_triton,
    sparse_mla_hopper,
    sparse_mla_hopper_backward,
)

SHARED_MEMORY = 227 * 1024
FP32 = {"lse", "delta"}
INT32 = {"indices", "bitmask", "cu_seqlens"}
TENSORS = {
    "queries", "keys", "values", "out", "grad_out", "grad_queries", "grad_keys", "grad_values", "probs_out",
    "d_scores_out", "probs", "d_scores", "key_first", "key_rest", "value", "query_first", "query_rest", "upstream",
    "pairs", "pair_scores", *FP32, *INT32,
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], warps: int) -> Any:
    """bf16 tensors aligned to 16 bytes; numbers that are multiples of 16, as the strides of whole rows are, but for
    counts that differ from step to step: a kernel is compiled once for all of them."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = "*fp32" if name in FP32 else "*i32" if name in INT32 else "*bf16" if name in TENSORS else "i32"
        signature[name] = "fp32" if name == "scale" else kind
        if name != "scale" and not kernel.params[place].do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def masked_constants(tiles: masked_mha.Tiles, *, masked: bool = True) -> dict[str, Any]:
    queries, values = (torch.empty(1, 1, width, dtype=torch.bfloat16) for width in (192, 128))
    constants = masked_mha._blocks(queries, values, 4, tiles)
    del constants["num_warps"]
    return constants | {"TMA": False} | ({"MASKED": True} if masked else {})


MASKED = masked_mha
LAUNCHES = MASKED._launches(192, 128, 2)
CASES = {
    "sparse forward": (sparse_mla_hopper.forward_kernel, {}, 4),
    "sparse pairs": (sparse_mla_hopper_backward.pairs_kernel, {}, 4),
    "masked forward": (masked_mha_triton.forward_kernel, masked_constants(LAUNCHES.forward), LAUNCHES.forward.warps),
    "masked grad queries": (
        masked_mha_triton.grad_queries_kernel, masked_constants(LAUNCHES.grad_queries), LAUNCHES.grad_queries.warps
    ),
    "masked grad keys": (
        masked_mha_triton.grad_keys_kernel, masked_constants(LAUNCHES.grad_keys, masked=False), LAUNCHES.grad_keys.warps
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_fits_an_sm_and_uses_its_tensor_cores(name: str) -> None:
    found = compiled(*CASES[name])
    assert found.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in found.asm["ptx"] and "mma.sync" not in found.asm["ptx"]
    assert "cp.async" in found.asm["ptx"]


def compiled_as_called(kernel: Any, arguments: list[Any], **constants: Any) -> Any:
    """With the types and alignments that Triton reads off these arguments."""
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        parameter = kernel.params[place]
        flags = (not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment)
        signature[name], found = native_specialize_impl(CUDABackend, argument, False, *flags)
        attributes[(place,)] = CUDABackend.parse_attr(found or "")
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def test_packed_attention_as_it_is_launched_on_hopper() -> None:
    """Descriptors included; 512 tokens, 16 heads, a bitmask of 16 words a row."""
    tokens, heads, words = 512, 16, 16
    queries, values = (torch.zeros(tokens, heads, width, dtype=torch.bfloat16) for width in (192, 128))
    numbers, bits = torch.zeros(tokens, heads), torch.zeros(tokens, words, dtype=torch.int32)
    forward, backward = masked_mha_hopper, masked_mha_hopper_backward
    part = forward.descriptor
    half, strides = forward.QUERIES // 2, [heads * 192, 192, heads * 192, 192, heads * 128, 128]

    def tiles(keys: int) -> list[Any]:
        blocks = (
            (queries, half, 128),
            (queries, half, 64),
            (queries, keys, 128),
            (queries, keys, 64),
            (values, keys, 128),
        )
        return [part(*block) for block in blocks]

    out = [bits, bits[0], values, numbers, 0.1, heads, 5, words, 192, 192, heads * 128, 128]
    found = compiled_as_called(forward.forward_kernel, [*tiles(forward.KEYS), values, *out], MASKED=True)
    assert found.metadata.shared <= SHARED_MEMORY and "wgmma.mma_async" in found.asm["ptx"]
    pairs = torch.zeros(4 * forward.QUERIES, forward.QUERIES, dtype=torch.bfloat16)
    stored = TensorDescriptor(
        pairs, list(pairs.shape), [forward.QUERIES, 1], [half, backward.KEYS], forward.SWIZZLED.value
    )
    inputs = [queries, queries, values, values, bits, bits[0], numbers, numbers, queries, 0.1, 0, 3, heads, 5, words]
    arguments = [*tiles(backward.KEYS), part(values, half, 128), stored, stored, *inputs, *strides]
    found = compiled_as_called(backward.grad_queries_kernel, arguments, MASKED=True)
    assert found.metadata.shared <= SHARED_MEMORY and "wgmma.mma_async" in found.asm["ptx"]
