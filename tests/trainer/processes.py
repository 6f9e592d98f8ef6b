"""Learner ranks in processes of their own, kept for many tests because each takes seconds to import its libraries."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rl.config import Recipe
from tests.trainer.samples import fully_sharded, tiny_recipe
from trainer.rank import LOOPBACK, LearnerRank

MakeRank = Callable[[Recipe], LearnerRank]
TIMEOUT_S = 180.0


class Ranks:
    """``ranks(work, *args)`` runs ``work(make_rank, *args)`` on every rank and returns what each of them returned."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        port = self._receive(self._pipes[0])
        for pipe in self._pipes:
            pipe.send(port)

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((work, args))
        return [self._receive(pipe) for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        assert pipe.poll(TIMEOUT_S), "a rank hangs"
        result, error = pipe.recv()
        assert error is None, error
        return result

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, world_size: int) -> None:
    first = LearnerRank(tiny_recipe(), rank=rank, world_size=world_size)
    if rank == 0:
        pipe.send((first.open_store(LOOPBACK), None))
    first.join(LOOPBACK, pipe.recv(), TIMEOUT_S)

    def make(recipe: Recipe) -> LearnerRank:
        made = LearnerRank(recipe, rank=rank, world_size=world_size, sharding=fully_sharded(recipe))
        made.device = first.device
        return made

    while True:
        work, args = pipe.recv()
        try:
            pipe.send((work(make, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
