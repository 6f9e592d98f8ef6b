"""The embedded engine as an async actor: implements `rollout.engine.Engine` around a TorchEngine.

Everything runs on the actor's one event loop: a step blocks it for milliseconds, and between two steps waiting calls
have their turn. So weights can only change between steps, and nothing needs a lock. While the engine sleeps it does not
step: calls that generate wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import torch

from model.hf import load_model
from model.tokenizer import load_tokenizer
from rl.errors import DataError
from rollout.engine import Completion, EngineStats, Request
from rollout.schema import SchemaReader
from rollout.torch_engine import Finished, TorchEngine


class EngineActor:
    """Made a Ray actor by `rollout.pool`; call :meth:`load` before anything else."""

    def __init__(self) -> None:
        self._engine: TorchEngine | None = None
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def load(
        self,
        model_path: str,
        *,
        dtype: str,
        device: str,
        max_num_seqs: int,
        max_context: int,
        threads: int,
        version: int = 0,
        record_selections: bool = False,
        structured: bool = False,
    ) -> None:
        """Loads a Hugging Face directory; `dtype` is a torch dtype's name, `threads` counts CPU threads.

        `structured`: whether requests may have a schema.
        Raises DataError for a checkpoint that cannot be read, naming the tensor where it is one.
        """
        torch.set_num_threads(threads)
        try:
            module = load_model(model_path, dtype=getattr(torch, dtype), device=device)
        except (ValueError, OSError) as error:
            raise DataError(f"the model in {model_path} cannot be loaded: {error}") from error
        self._engine = TorchEngine(
            module,
            max_num_seqs=max_num_seqs,
            max_context=max_context,
            version=version,
            record_selections=record_selections,
            schemas=SchemaReader(load_tokenizer(model_path), module.outline.vocab_size) if structured else None,
        )

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self._live.submit(*requests)
        loop = asyncio.get_running_loop()
        futures = [self._futures.setdefault(request.id, loop.create_future()) for request in requests]
        self._go_on()
        return list(await asyncio.gather(*futures))

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        ended = self._live.abort(request_ids)
        self._deliver(ended)
        return len(ended)

    async def stage(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Receives a part of the next weights under in-memory names; generation goes on with the current ones.

        Raises ValueError naming the parameter that is unknown or has the wrong shape.
        """
        self._live.stage(bucket)

    async def commit(self, version: int) -> dict[str, int]:
        sums = self._live.commit(version)
        self._go_on()
        return sums

    async def sleep(self, *, keep_weights: bool = False) -> None:
        self._live.sleep(keep_weights=keep_weights)

    async def wake(self) -> None:
        self._live.wake()
        self._go_on()

    async def stats(self) -> EngineStats:
        return self._live.stats()

    async def shutdown(self) -> None:
        """Aborts what is in flight and returns when nothing runs any more."""
        if self._engine is not None:
            await self.abort()
        while self._stepping is not None or len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)

    @property
    def _live(self) -> TorchEngine:
        if self._engine is None:
            raise RuntimeError("the engine has no model yet; call load first")
        return self._engine

    def _go_on(self) -> None:
        """Steps, unless there is nothing to do or it does so already."""
        if self._stepping is None and self._live.has_work and not self._live.is_asleep:
            self._stepping = asyncio.get_running_loop().create_task(self._step_until_idle())

    async def _step_until_idle(self) -> None:
        """Returns when nothing is left to do, or when the engine sleeps."""
        engine = self._live
        try:
            while engine.has_work and not engine.is_asleep:
                self._deliver(engine.step())
                await asyncio.sleep(0)
        except Exception as error:
            # Whatever a step was doing, its sequences cannot go on; the engine itself is as good as before.
            engine.abort()
            for future in self._futures.values():
                future.set_exception(error)
            self._futures.clear()
        finally:
            self._stepping = None

    def _deliver(self, finished: Finished) -> None:
        for name, completion in finished:
            self._futures.pop(name).set_result(completion)
