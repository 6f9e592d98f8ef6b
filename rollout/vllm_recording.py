"""vLLM's side of `rollout.step_records`: what a step recorded leaves vLLM's processes as a few arrays.

Two of vLLM's own parts are replaced. Its scheduler takes what a step recorded off what the workers return, before it
would be cut up by request, and sends it with the step's statistics. Its workers' output of a step (`rollout.vllm_step`)
brings tokens, log-probabilities and kept sets in one table, and rows as they lie on the GPU, of which it keeps none:
`rollout.prefix_rows` finds those of tokens that come out of the prefix cache.

Importing this module needs vLLM.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from rl.sample import NDArray
from rollout.drawn import Drawn
from rollout.engine_step import Step
from rollout.vllm_slots import QuickSlots

_NEW_TOKENS = operator.attrgetter("new_token_ids")


@lru_cache(maxsize=1 << 14)
def key_of(request_id: str) -> str:
    """Of a request in `rollout.step_records`; the id that vLLM was given begins with it, the rest is for logs."""
    return request_id.partition(".")[0]


@lru_cache(maxsize=4)
def keys_of(request_ids: tuple[str, ...]) -> tuple[list[str], str]:
    """And all of them as `rollout.engine_step.Step` has them; most steps are of the requests of the one before."""
    keys = list(map(key_of, request_ids))
    return keys, "\n".join(keys)


class RecordingScheduler(AsyncScheduler):
    """``scheduler_cls`` of our engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_output_connector = None  # rows are not cut up here
        self.quick_slots = QuickSlots.installed(self.kv_cache_manager)
        self._generation = 0

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with only_cached_blocks(self.kv_cache_manager.block_pool):
            cleared = super().reset_prefix_cache(*args, **kwargs)
        self._generation += int(cleared)
        return cleared

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        planned = super().schedule(*args, **kwargs)
        planned.keel_generation = self._generation
        return planned

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        seen = Seen.taken_from(model_runner_output)
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        outputs = by_client.get(0)
        if seen is not None and outputs is not None and outputs.scheduler_stats is not None:
            generation = scheduler_output.keel_generation
            stale = generation != self._generation
            if step := seen.step(outputs.outputs, stale=stale, block=self.hash_block_size, generation=generation):
                # A field for others' statistics, which leaves a dictionary as it is; nobody else uses it here.
                outputs.scheduler_stats.kv_connector_stats = step.to_plain()
        return by_client


@contextmanager
def only_cached_blocks(pool: Any) -> Iterator[None]:
    """vLLM clears its prefix cache by going through all its blocks, a hundred thousand where a GPU is large. Those that
    cache nothing have nothing to clear."""
    every, pool.blocks = pool.blocks, _cached_blocks(pool.cached_block_hash_to_block)
    try:
        yield
    finally:
        pool.blocks = every


def _cached_blocks(by_hash: Any) -> Iterator[Any]:
    """When they are asked for: what is preempted first may be cached yet."""
    for held in by_hash._cache.values():
        yield from held.values() if isinstance(held, dict) else [held]


@dataclass(frozen=True, slots=True)
class Seen:
    """What workers return of a step of B requests, in their order."""

    names: list[str]
    joined: str
    drawn: Drawn

    @classmethod
    def taken_from(cls, output: Any) -> Self | None:
        """None of a step that fed nothing."""
        drawn, output.aux_output_connector_output = output.aux_output_connector_output, None
        return cls(*keys_of(tuple(output.req_ids)), drawn) if isinstance(drawn, Drawn) else None

    def step(self, outputs: Sequence[Any], *, stale: bool, **of_cache: int) -> Step | None:
        """Without the requests whose token vLLM threw away: they were aborted, or will compute it again. So will those
        amid their prompt when the cache was cleared meanwhile, which makes the step ``stale``."""
        drawn = self.drawn
        goes = self._emitted(outputs) | (~drawn.sampled & (not stale))
        every = bool(goes.all())
        if not (every or goes.any()):
            return None
        starts = counts = np.zeros(len(goes), np.int64)
        rows = np.zeros((0, 0), np.uint8)
        if drawn.rows is not None:
            starts, counts, rows = drawn.rows.starts, np.diff(drawn.rows.edges), drawn.rows.rows
            rows = rows if every else rows[np.repeat(goes, counts)]
        got = slice(None) if every and drawn.sampled.all() else goes & drawn.sampled
        those = slice(None) if every else goes
        return Step(
            names=self.joined if every else "\n".join(itertools.compress(self.names, goes.tolist())),
            starts=starts[those],
            counts=counts[those],
            sampled=drawn.sampled[those],
            token_ids=drawn.token_ids[got],
            logprobs=drawn.logprobs[got],
            kept_sizes=None if drawn.kept_sizes is None else drawn.kept_sizes[got],
            kept_starts=drawn.kept_starts[got],
            kept_ids=drawn.kept_ids,
            rows=rows,
            **of_cache,
        )

    def _emitted(self, outputs: Sequence[Any]) -> NDArray:
        """bool [B]: the requests whose token leaves vLLM."""
        if len(outputs) == self.drawn.sampled.sum() and all(map(_NEW_TOKENS, outputs)):
            return self.drawn.sampled  # tokens come from nowhere else
        emitted = {key_of(output.request_id) for output in outputs if output.new_token_ids}
        return np.fromiter(map(emitted.__contains__, self.names), bool, count=len(self.names))
