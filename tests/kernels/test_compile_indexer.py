"""The indexer's kernels, grouped products, checksums and packed attention's Gluon kernels compiled for an H100 or H200
as they are launched, without a GPU.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

from kernels import (  # noqa: E402
    checksum_triton,
    grouped,
    indexer,
    indexer_loss,
    masked_mha_hopper,
    masked_mha_hopper_backward,
    paged,
    topk,
)

SHARED_MEMORY = 227 * 1024
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Launches = dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What a launch compiles to, by the kernel's name; nothing runs."""
    found: Launches = {}

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            found[kernel.__name__] = kernel.run(*args, grid=grid, warmup=True, **kwargs)

        return compile_only

    hopper = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_stream=lambda device=None: 0,
    )
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    monkeypatch.setattr(driver, "_active", hopper)
    return found


def int32(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def zeros(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(*size, dtype=dtype)


def score(dtype: torch.dtype) -> None:
    queries, keys, weights = zeros(256, 64, 128, dtype=dtype), zeros(256, 128, dtype=dtype), zeros(256, 64)
    indexer.packed_index_scores(queries, keys, weights, int32(256), int32(256), zeros(256, dtype=torch.float32))
    pages, scales = zeros(4, 64, 128, dtype=dtype), zeros(4, 64, dtype=torch.float32)
    indexer.paged_index_scores(queries, pages, weights, int32(4)[None], int32(256), scales)


def learn() -> None:
    index = [zeros(*size).requires_grad_() for size in ((256, 64, 128), (256, 128), (256, 64))]
    attention = zeros(256, 8, 192), zeros(256, 8, 192)
    indexer_loss.packed_indexer_loss(*index, *attention, int32(256), int32(256), 0.1, zeros(256, 64, dtype=torch.int32))


def verify() -> None:
    words = zeros(256, 512).view(torch.int16), zeros(64, 512).view(torch.int64)
    checksum_triton.DeviceTable([(part, 0, part.shape[1]) for part in words]).sums()


def multiply() -> None:
    rows, weights = zeros(256, 512).requires_grad_(), zeros(4, 384, 512).requires_grad_()
    grouped.triton_grouped_linear(rows, weights, int32(4)).sum().backward()


def prepare() -> None:
    angles = zeros(256, 32, dtype=torch.float32)
    indexer.quantise_index_heads(zeros(256, 64, 128), angles, angles, zeros(256, 64))


def attend_pages() -> None:
    pages, table, owners = zeros(8, 64, 576), int32(4)[None], int32(16)
    paged.store_rows(pages, torch.zeros(16, dtype=torch.int64), zeros(16, 576))
    index = zeros(16, 64, 128), zeros(8, 64, 128), zeros(16, 64, dtype=torch.float32)
    paged.project_in_fp32(zeros(16, 7168), zeros(64, 7168))
    places = paged.select_paged_keys(*index, table, owners, owners, 128)
    rows = paged.cache_rows(places, table, owners, 64, 64)
    angles = zeros(16, 32, dtype=torch.float32)
    paged.rotate_heads(zeros(16, 64, 576)[..., 512:], zeros(16, 64, 192)[..., 128:], angles, angles, interleaved=True)
    paged.paged_sparse_attention(zeros(16, 64, 576), pages.flatten(0, 1), rows, 0.1, 512)


def attend() -> None:
    queries, keys, values = (zeros(256, 4, width) for width in (192, 192, 128))
    lse, words = zeros(256, 4, dtype=torch.float32), torch.zeros(256, 8, dtype=torch.int32)
    masked_mha_hopper.forward(queries, keys, values, words, int32(3), values, lse, 0.1)
    pairs = zeros(4 * 3 * 128 * 128)
    masked_mha_hopper_backward.grad_queries(
        queries, keys, values, words, int32(3), values, lse, lse, pairs, pairs, queries, 0.1, 0, 4, 3
    )


CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "prepare": (prepare, []),
    "fp8 scores": (lambda: score(FP8), ["_packed_kernel", "_paged_kernel"]),
    "bf16 scores": (lambda: score(BF16), ["_packed_kernel", "_paged_kernel"]),
    "one tile": (lambda: topk.bounded_topk(zeros(2, 8192, dtype=torch.float32), 2048), []),
    "rounds": (lambda: topk.bounded_topk(zeros(2, 32768, dtype=torch.float32), 2048, int32(2), int32(2)), []),
    "walk": (lambda: topk.bounded_topk(zeros(2, 32768, dtype=torch.float32), 20000), []),
    "pages": (attend_pages, ["_paged_kernel"]),
    "loss": (learn, ["target_kernel", "normaliser_kernel", "queries_kernel", "keys_kernel"]),
    "packed attention": (attend, ["forward_kernel", "grad_queries_kernel"]),
    "checksums": (verify, []),
    "grouped": (multiply, ["_rows_kernel", "_weights_kernel"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_launch_fits_a_multiprocessor(name: str, launches: Launches) -> None:
    run, on_tensor_cores = CASES[name]
    run()
    assert launches and set(on_tensor_cores) <= set(launches)
    for kernel in launches.values():
        assert kernel.metadata.shared <= SHARED_MEMORY
    for kernel in (launches[name] for name in on_tensor_cores):
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "mma.sync" not in kernel.asm["ptx"]
        assert "cp.async" in kernel.asm["ptx"]
