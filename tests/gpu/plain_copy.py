"""The fastest that bytes can travel the way that weights do: a device-to-device copy, or a broadcast between two."""

from __future__ import annotations

import statistics
import tempfile
import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

BUCKET_BYTES = 1 << 30
PASSES = 5


def copy_speed(num_bytes: int, *, across: bool, on_gpu: bool) -> float:
    """10^9 bytes a second, the median of some passes. ``across``: from one GPU to another (gloo without GPUs).

    Raises RuntimeError when one of the two processes fails.
    """
    if not across:
        return _within(num_bytes, "cuda" if on_gpu else "cpu")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_broadcast, args=(r, num_bytes, on_gpu, f"{folder}/store", theirs), daemon=True)
            for r in range(2)
        ]
        for process in processes:
            process.start()
        try:
            while not ours.poll(0.2):  # one that waits for a partner that failed would not answer
                if any(process.exitcode for process in processes):
                    raise RuntimeError("a process that should copy failed; its traceback is above")
            seconds = ours.recv()
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()
    return num_bytes / seconds / 1e9


def _within(num_bytes: int, device: str) -> float:
    buckets = [min(BUCKET_BYTES, num_bytes - start) for start in range(0, num_bytes, BUCKET_BYTES)]
    sources = [torch.ones(size, dtype=torch.uint8, device=device) for size in buckets]
    targets = [torch.empty_like(source) for source in sources]
    seconds = []
    for _ in range(PASSES + 1):
        began = _now(device)
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        seconds.append(_now(device) - began)
    return num_bytes / statistics.median(seconds[1:]) / 1e9


def _broadcast(rank: int, num_bytes: int, on_gpu: bool, file: str, answer: Connection) -> None:
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sizes = [min(BUCKET_BYTES, num_bytes - start) for start in range(0, num_bytes, BUCKET_BYTES)]
    buckets = [torch.ones(size, dtype=torch.uint8, device=device) for size in sizes]
    seconds = []
    for _ in range(PASSES + 1):
        began = _now(device)
        for bucket in buckets:
            dist.broadcast(bucket, src=0)
        seconds.append(_now(device) - began)
    if rank == 0:
        answer.send(statistics.median(seconds[1:]))
    dist.destroy_process_group()


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
