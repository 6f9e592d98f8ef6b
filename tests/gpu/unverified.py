"""Weight updates of a vLLM worker without their verification, to measure what that costs."""

from __future__ import annotations

from typing import Any


def skip_sums(wrapper: Any, skip: bool) -> None:
    """Runs in a worker whose updates are written straight: it adds nothing up and answers what it answered last."""
    worker = getattr(wrapper, "worker", wrapper)
    updates = worker.weight_transfer_engine.updates
    held = updates._held
    assert not updates.through_loader
    if skip:
        answer = worker.held_weights([held.key])
        worker.finish_update = lambda known: worker.finish_weight_update() or answer
        held._bucket_of = lambda names: ([], None)
    else:
        del worker.finish_update, held._bucket_of
