"""The cold start as a run does it: demonstrations in a shuffled order, a line of metrics a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rl.config import Recipe
from rl.data import RunData
from rl.errors import DataError
from rl.metrics import values
from rl.progress import Progress
from rl.run_directory import RunDirectory
from rl.system import System
from rollout.conversation import Conversation
from rollout.engine import check_window
from trainer.learner import cold_start
from trainer.supervised import EncodedDemonstration


async def run_cold_start(
    recipe: Recipe,
    demonstrations: Sequence[EncodedDemonstration],
    system: System,
    model_dir: Path,
    run: RunDirectory,
    progress: Progress,
) -> Path:
    """Leaves the learner ready for RL from the weights that the cold start ended with; returns where they are."""
    out_dir = run.path / "cold_start"
    batches = shuffled_batches(demonstrations, recipe.supervised.batch_size, seed=recipe.seed)
    results = cold_start(system.learner, recipe.supervised, batches, model_dir=model_dir, out_dir=out_dir)
    step = 0
    async for result in results:
        step += 1
        metrics = {"step": step, **values(result.metrics)}
        run.log_supervised(metrics)
        progress.supervised_step(metrics)
        for skipped in result.skipped:
            progress.warn(f"cold start step {skipped.step} skipped: its loss or gradient was not finite")
    system.conversation.tokenizer.save_pretrained(out_dir)
    return out_dir


def encode_demonstrations(recipe: Recipe, data: RunData, conversation: Conversation) -> list[EncodedDemonstration]:
    """Raises DataError naming the demonstration that cannot be encoded or does not fit the window."""
    encoded = []
    for demonstration in data.demonstrations:
        name = f"demonstration for {demonstration.prompt.id}"
        try:
            prompt = demonstration.prompt
            token_ids, trained = conversation.encode_demonstration(
                demonstration.messages, thinking=prompt.thinking, tools=prompt.tools
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        check_window(name, len(token_ids) - 1, recipe.model.max_context)
        encoded.append(EncodedDemonstration(id=demonstration.prompt.id, token_ids=token_ids, trained=trained))
    return encoded


def shuffled_batches(
    demonstrations: Sequence[EncodedDemonstration], batch_size: int, *, seed: int
) -> Iterator[list[EncodedDemonstration]]:
    """Batches for ever, epoch after epoch, each epoch in an order of its own."""
    order: list[int] = []
    for epoch in range(1 << 62):
        order += np.random.default_rng([seed, 2, epoch]).permutation(len(demonstrations)).tolist()
        while len(order) >= batch_size:
            batch, order = order[:batch_size], order[batch_size:]
            yield [demonstrations[index] for index in batch]
