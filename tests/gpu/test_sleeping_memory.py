"""Every byte that an engine has to find again after a sleep without weights, before it and after it.

With the same weights before and after, and nothing generated in between, all memory but that of caches and scratch must
be what it was. What is not is named by whoever holds it in vLLM's process.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import save_model
from rollout.vllm_engine import EngineSettings, VllmEngineActor
from tests.gpu.soil import soil_free_memory
from tests.gpu.test_vllm_engine import MAX_CONTEXT, make_module, make_requests, update
from trainer.sender import WeightSender

TAGS = ("weights", "runtime")  # of what vLLM's allocator has; caches and scratch have others
BLOCK = 512  # bytes: no two tensors of torch's allocator share such a one


def contents() -> dict[tuple[str, int], torch.Tensor]:
    """uint8 in host memory of all that vLLM's allocator has under the tags, by tag and address."""
    from vllm.device_allocator import cumem  # pyright: ignore[reportMissingImports]

    torch.cuda.synchronize()
    found = {}
    for at, data in cumem.CuMemAllocator.get_instance().pointer_to_data.items():
        if data.tag in TAGS:
            found[data.tag, at] = torch.empty(data.handle[1], dtype=torch.uint8)
            cumem.libcudart.cudaMemcpy(found[data.tag, at].data_ptr(), at, data.handle[1])
    return found


def remember(worker: Any) -> dict[str, int]:
    """Runs inside vLLM's worker: bytes by tag."""
    worker.remembered = contents()
    return {tag: sum(len(part) for (of, _), part in worker.remembered.items() if of == tag) for tag in TAGS}


def lost(worker: Any) -> list[str]:
    """Runs inside vLLM's worker: what is not as it was remembered, by the names that it has."""
    now, changed = contents(), []
    for (tag, at), before in worker.remembered.items():
        differs = before != now[tag, at] if (tag, at) in now else torch.ones_like(before, dtype=torch.bool)
        changed += [(tag, at + BLOCK * int(n)) for n in differs.view(-1, BLOCK).any(dim=1).nonzero()]
    spans = sorted(tensors_held())
    named = set()
    for tag, block in changed:
        names = [f"{name} [{tag}]" for start, end, name in spans if start < block + BLOCK and block < end]
        named.update(names or [f"nobody's [{tag}]"])
    return sorted(named)


def tensors_held() -> Iterator[tuple[int, int, str]]:
    """First and last address of every tensor on the GPU that an attribute holds, and the attribute."""
    gc.unfreeze()  # vLLM froze what it had made, which hides it from the next line
    for holder in gc.get_objects():
        kind = type(holder)
        if str(kind.__module__).partition(".")[0] not in ("vllm", "rollout", "torch", "transformers"):
            continue
        fields = getattr(holder, "__dict__", {})
        if issubclass(kind, torch.nn.Module):
            fields = {**fields, **holder._parameters, **holder._buffers}
        for name, value in list(fields.items()) if isinstance(fields, dict) else ():
            if isinstance(value, torch.Tensor) and value.is_cuda and value.numel():
                storage = value.untyped_storage()
                first = storage.data_ptr()
                yield first, first + storage.nbytes(), f"{kind.__name__}.{name} {tuple(value.shape)}"


async def scenario(path: Path, settings: EngineSettings) -> tuple[dict[str, int], int, list[str]]:
    actor, sender = VllmEngineActor(), WeightSender(rank=0, device=torch.device("cuda", 0))
    module = make_module(1).to("cuda")
    await actor.load(str(path), settings)
    try:
        await update(actor, sender, module, 1)
        await actor.generate(make_requests("before", 8, 600))
        held = (await actor._engine.collective_rpc(remember))[0]
        kept = (await actor._engine.collective_rpc("keep_beside_update", args=(actor._shapes,)))[0]
        await actor.sleep()
        soil_free_memory()
        await update(actor, sender, module, 2)
        return held, kept, (await actor._engine.collective_rpc(lost))[0]
    finally:
        await actor.shutdown()


@pytest.mark.parametrize("keel_dsa", [False, True])
def test_nothing_but_caches_and_scratch_is_other_after_a_sleep(tmp_path: Path, keel_dsa: bool):
    save_model(make_module(0), tmp_path)
    settings = EngineSettings(
        dtype="bfloat16",
        max_num_seqs=32,
        max_context=MAX_CONTEXT,
        gpu_memory=0.3,
        sleeps=True,
        keel_dsa=keel_dsa,
        selections=keel_dsa,
    )
    held, kept, changed = asyncio.run(scenario(tmp_path, settings))
    print(f"bytes by tag {held}, of which {kept} went to host memory")
    assert changed == []
    assert 0 < kept < held["weights"]
