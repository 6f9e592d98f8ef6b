from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model import DeepseekV32, save_model
from rl.config import Recipe
from tests.trainer.samples import fully_sharded, tiny_config
from trainer.rank import LOOPBACK, LearnerRank

MakeRank = Callable[[Recipe], LearnerRank]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer model whose weights are large enough for its experts and keys to compete."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    save_model(DeepseekV32(tiny_config()), path)
    return path


@pytest.fixture(scope="module")
def sole_rank() -> Iterator[MakeRank]:
    """Makes the only rank of a learner, in this process."""
    environment = dict(os.environ)
    joined: list[torch.device] = []

    def make(recipe: Recipe) -> LearnerRank:
        rank = LearnerRank(recipe, rank=0, world_size=1, sharding=fully_sharded(recipe))
        if joined:
            rank.device = joined[0]
        else:
            rank.join(LOOPBACK, rank.open_store(LOOPBACK), 60.0)
            joined.append(rank.device)
        return rank

    yield make
    if joined:
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
