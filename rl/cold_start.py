"""The cold start as a run does it: demonstrations in a shuffled order, a line of metrics a step, and checkpoints.

Where the indexer is warmed up first, that is a phase of its own, which ends in a model as the whole cold start does:
``runs/NAME/indexer_warmup`` and ``runs/NAME/cold_start``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rl.checkpoint import Saved
from rl.config import Recipe, Supervised
from rl.data import RunData
from rl.errors import DataError
from rl.loop_state import LoopState
from rl.metrics import values
from rl.progress import Progress
from rl.resume import check_sums
from rl.run_directory import RunDirectory
from rl.saver import Saver
from rl.stop import Interrupted, Stop
from rl.system import System
from rl.timeline import Span
from rollout.conversation import Conversation
from rollout.engine import check_window
from trainer.learner import StepResult
from trainer.phase import Phase
from trainer.supervised import EncodedDemonstration

Batches = Iterator[tuple[int, list[EncodedDemonstration]]]
"""Each with the number of its step, from 1 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The steps of one phase: those after ``first``, up to ``last``."""

    phase: Phase
    first: int
    last: int


def stretches(settings: Supervised) -> list[Stretch]:
    """What a cold start consists of."""
    warmup, steps = settings.dense_warmup_steps, settings.steps
    both = (
        Stretch(phase=Phase.INDEXER_WARMUP, first=0, last=warmup),
        Stretch(phase=Phase.SUPERVISED, first=warmup, last=steps),
    )
    return [stretch for stretch in both if stretch.last > stretch.first]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """The cold start of one run. The engines sleep meanwhile."""

    recipe: Recipe
    demonstrations: Sequence[EncodedDemonstration]
    contents: str
    """A checksum of them, which is saved."""
    system: System
    run: RunDirectory
    progress: Progress
    stop: Stop
    saver: Saver

    async def train(self, model_dir: Path, saved: Saved | None) -> Path:
        """Leaves the learner ready for RL from the weights that the cold start ended with; returns where they are.

        Goes on after the step that was ``saved``, whose phase began with ``model_dir``. Raises Interrupted between two
        steps when the run is asked to stop, with the last one saved.
        """
        settings = self.recipe.supervised
        batches = enumerate(shuffled_batches(self.demonstrations, settings.batch_size, seed=self.recipe.seed), 1)
        done = saved.step if saved else 0
        left = [stretch for stretch in stretches(settings) if saved is None or _is_left(stretch, saved)]
        self.saver.follow(model_dir, saved, cold_start=True)
        batches = islice(batches, done, None)
        for stretch in left:
            await self._begin(stretch.phase, model_dir)
            if saved is not None and stretch is left[0]:
                await self._bring_back(saved)
            await self._learn(stretch, islice(batches, stretch.last - max(stretch.first, done)))
            model_dir = await self._end(stretch)
        await self._begin(Phase.REINFORCEMENT, model_dir)
        return model_dir

    async def _begin(self, phase: Phase, model_dir: Path) -> None:
        with self._asked("begin"):
            await self.system.learner.begin(phase, model_dir)

    async def _bring_back(self, saved: Saved) -> None:
        learner = self.system.learner
        if saved.has_learner and saved.loop is not None:
            with self._asked("load"):
                await learner.load_checkpoint(saved.path)
            learner.load_state_dict(saved.loop["values"]["learner"])
        check_sums(saved, await self._checksums())

    async def _checksums(self) -> dict[str, int]:
        with self._asked("checksums"):
            return await self.system.learner.checksums()

    def _asked(self, phase: str, step: int | None = None) -> AbstractContextManager[Span]:
        """What the learner is asked for while the block runs, for the hang doctor; in the file it is one cold start."""
        return self.run.timeline.span("learner", phase, step=step, written=False)

    async def _learn(self, stretch: Stretch, batches: Batches) -> None:
        learner, every = self.system.learner, self.recipe.checkpoint.cold_start_every
        for step, batch in batches:
            with self._asked("supervised step", step):
                result = await learner.supervised_step(batch)
            row = self._log(step, result)
            stopping = self.stop.asked
            # The end of a phase is saved as a model.
            if stopping or (every and step % every == 0 and step != stretch.last):
                await self.saver.copy_cold_start(step, self._state(), learner)
            self.saver.write(step, row, {})
            if stopping:
                self.progress.say(f"interrupted; {await self.saver.way_on()}")
                raise Interrupted

    async def _end(self, stretch: Stretch) -> Path:
        """Writes the model that a phase ended with, which is all that the next one begins with."""
        is_last = stretch.last == self.recipe.supervised.steps
        out_dir = self.run.path / ("cold_start" if is_last else str(stretch.phase))
        await self.saver.settle()
        with self._asked("save"):
            await self.system.learner.save_model(out_dir)
        self.system.conversation.tokenizer.save_pretrained(out_dir)
        if not is_last:
            self.saver.follow(out_dir, None, cold_start=True)
            await self.saver.start(await self._checksums(), step=stretch.last, loop=self._state())
        return out_dir

    def _log(self, step: int, result: StepResult) -> dict[str, float]:
        row = {"step": step, **values(result.metrics)}
        self.run.log_supervised(row)
        self.progress.supervised_step(row)
        if result.skipped:
            self.progress.warn(f"cold start step {step} skipped: its loss or gradient was not finite")
        return row

    def _state(self) -> LoopState:
        """What decides the next step besides the ranks' state: the order is that of the recipe's seed."""
        return LoopState(values={"learner": self.system.learner.state_dict(), "demonstrations": self.contents})


def _is_left(stretch: Stretch, saved: Saved) -> bool:
    """Whether a phase was not over; one that was asked to stop after its last step has yet to write its model."""
    return stretch.last > saved.step or (stretch.last == saved.step and saved.has_learner)


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
