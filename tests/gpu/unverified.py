"""Weight updates without their verification, to measure what that costs. Of weights that stay as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

from trainer import sender


def skip_sums(wrapper: Any, skip: bool) -> None:
    """Runs in a vLLM worker whose updates are written straight: it adds nothing up and answers as it did last."""
    worker = getattr(wrapper, "worker", wrapper)
    updates = worker.weight_transfer_engine.updates
    held = updates._held
    assert not updates.through_loader
    if skip:
        answer = worker.held_weights([held.key])
        worker.finish_update = lambda known: worker.finish_weight_update() or answer
        held._sums_as_written = held._is_large
        held._is_large = False
    else:
        del worker.finish_update
        held._is_large = held._sums_as_written


class KeptSums(sender.Summing):
    """In the place of a learner rank's checksums, and keeps them."""

    last: dict[str, int] = {}  # noqa: RUF012

    def result(self) -> dict[str, int]:
        KeptSums.last = super().result()
        return KeptSums.last


class SkippedSums(KeptSums):
    """Adds nothing up; the result is the last that was."""

    def of(self, buckets: Iterator[Any]) -> Iterator[Any]:
        return buckets

    def end(self) -> None:
        pass

    def result(self) -> dict[str, int]:
        return KeptSums.last


def _rank_skips(rank: Any, skip: bool) -> None:
    sender.Summing = SkippedSums if skip else KeptSums


def _engine_skips(actor: Any, skip: bool) -> None:
    """What is called of an actor in this way has a thread of its own."""
    engine = actor._engine
    asked = engine.collective_rpc(skip_sums, args=(skip,))
    asyncio.run_coroutine_threadsafe(asked, engine.output_handler.get_loop()).result(60)


async def skip_verification(system: Any, skip: bool, *, engines: bool = True) -> None:
    """Of the real actors' next updates; ``engines`` as well, which the last one was written into straight."""
    await system.learner._all("__ray_call__", partial(_rank_skips, skip=skip))
    for engine in system.pool._engines if engines else ():
        await engine.actor.__ray_call__.remote(partial(_engine_skips, skip=skip))
