"""The numbers and trajectories of one step, under the names of the design page, to every sink at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rl.alarms import Alarms
from rl.buffer import staleness
from rl.config import Recipe
from rl.evaluate import Evaluation, accuracy
from rl.metrics import values
from rl.progress import Progress
from rl.reward_shares import reward_shares
from rl.rollouts import Tally
from rl.run_directory import RunDirectory
from rl.sample import Group, NDArray, Sample, Scored, Status
from rl.sync import Sync
from rl.trajectory import SequenceView, Trajectory, token_texts
from rollout.conversation import Conversation
from trainer.learner import StepResult


class StepClock:
    """Wall-clock seconds of a step, lap by lap, as the learner's side of the loop sees them.

    ``rollout`` is the wait for groups: with overlap, what generation takes longer than learning.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class StepLog:
    """Writes steps to the run's directory and to the terminal."""

    def __init__(self, recipe: Recipe, conversation: Conversation, run: RunDirectory, progress: Progress) -> None:
        self.recipe = recipe
        self.conversation = conversation
        self.run = run
        self.progress = progress
        self.alarms = Alarms(recipe, run, progress)

    def before(self, evaluation: Evaluation) -> None:
        """Step 0: the evaluation before training."""
        self._write({"step": 0, **evaluation.metrics()})
        self._warn_of_unscored(0, evaluation)
        shown = evaluation.scored[: self.recipe.log_samples]
        self.run.log_samples(0, (self._trajectory(scored, 0.0, None) for scored in shown))

    def step(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[NDArray],
        tally: Tally,
        result: StepResult,
        sync: Sync,
        clock: StepClock,
        measured: Mapping[str, float],
        evaluation: Evaluation | None,
    ) -> dict[str, float]:
        """One step of training, whose row is returned; ``sync`` published the weights that it made, ``measured`` are
        metrics as they are."""
        metrics = {"step": step, **self._rollout_metrics(groups, tally), **self._ages(groups, version=step - 1)}
        metrics |= {f"time/{name}_s": seconds for name, seconds in clock.seconds.items()}
        metrics |= {"time/step_s": clock.total, "time/reward_s": float(tally.scoring)}
        metrics["tokens_per_s"] = metrics["tokens/generated"] / clock.total
        metrics |= {f"time/{part}_s": seconds for part, seconds in result.seconds.items()}
        metrics |= measured
        metrics |= values(result.metrics) | sync.metrics() | (evaluation.metrics() if evaluation else {})
        metrics |= self.alarms.observe(metrics)
        self._write(metrics)
        self._warn(step, tally, result)
        if evaluation:
            self._warn_of_unscored(step, evaluation)
        logged = list(_first(groups, advantages, self.recipe.log_samples))
        self.run.log_samples(
            step, (self._trajectory(one, advantage, result.learner_logprobs) for one, advantage in logged)
        )
        return metrics

    def _write(self, metrics: dict[str, float]) -> None:
        self.run.log(metrics)
        self.progress.step(metrics)

    def _warn(self, step: int, tally: Tally, result: StepResult) -> None:
        for reason, count in tally.failures.most_common(3):
            self.progress.warn(f"step {step}: {count} samples left out: {reason}")
        for skipped in result.skipped:
            what = "loss" if skipped.sample_ids else "gradient"
            self.progress.warn(f"optimizer step {skipped.step} skipped: {what} not finite; {skipped.suspects}")

    def _warn_of_unscored(self, step: int, evaluation: Evaluation) -> None:
        if evaluation.num_failed:
            self.progress.warn(
                f"evaluation at step {step}: {evaluation.num_failed} samples could not be scored and count as wrong"
            )

    def _rollout_metrics(self, groups: Sequence[Group], tally: Tally) -> dict[str, float]:
        # Replaced groups count too: without them rewards would be those of the prompts that still tell siblings apart.
        groups = [*groups, *tally.replaced]
        scored = [one for group in groups for one in group.scored]
        metrics = {
            "tokens/generated": float(tally.failed_tokens + sum(one.sample.num_generated for one in scored)),
            "length/mean": _mean(one.sample.num_generated for one in scored),
            "length/truncated": _mean(one.sample.status == Status.TRUNCATED for one in scored),
            "groups/zero_variance": _mean(group.zero_variance for group in groups),
            "groups/failed": float(tally.failed_groups),
            "groups/replaced": float(len(tally.replaced)),
            "samples/failed": float(sum(tally.failures.values())),
            "reward/mean": _mean(one.reward for one in scored),
        }
        for domain in sorted({group.prompt.domain for group in groups}):
            members = [one for one in scored if one.sample.prompt.domain == domain]
            metrics[f"reward/{domain}"] = _mean(one.reward for one in members)
            for part in sorted({part for one in members for part in one.parts}):
                metrics[f"reward/{domain}/{part}"] = _mean(one.parts[part] for one in members if part in one.parts)
            own = [group for group in groups if group.prompt.domain == domain]
            metrics |= reward_shares(domain, self.recipe.domains[domain], own)
            if len(self.recipe.domains) > 1:  # of one domain these are length/mean and groups/zero_variance
                metrics[f"reply_length/{domain}"] = _mean(one.sample.num_generated for one in members)
                metrics[f"zero_variance/{domain}"] = _mean(group.zero_variance for group in own)
        return metrics | {f"accuracy/{domain}": value for domain, value in accuracy(self.recipe, scored).items()}

    def _ages(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        age = staleness(groups, version)
        return {"staleness/mean": float(age.mean), "staleness/max": float(age.max)}

    def _trajectory(self, scored: Scored, advantage: float, learned: Mapping[str, NDArray] | None) -> Trajectory:
        sequences = scored.sample.sequences
        ratios = [_log_ratios(sequence, (learned or {}).get(sequence.id)) for sequence in sequences]
        masked = self._is_masked(sequences, advantage, ratios)
        views = [
            SequenceView(
                sample=sequence,
                token_texts=token_texts(sequence.token_ids, self.conversation.spell),
                log_ratios=own,
                masked=masked,
            )
            for sequence, own in zip(sequences, ratios, strict=True)
        ]
        return Trajectory(scored=scored, sequences=views, advantage=advantage)

    def _is_masked(self, sequences: Sequence[Sample], advantage: float, ratios: Sequence[NDArray | None]) -> bool:
        """The objective's off-policy mask (paper Eq. 9) over an episode, as the learner applied it."""
        delta = self.recipe.objective.off_policy_delta
        known = [own[one.sampled] for one, own in zip(sequences, ratios, strict=True) if own is not None]
        drifts = -np.concatenate(known or [np.zeros(0)])
        return delta is not None and advantage < 0 and len(drifts) > 0 and float(drifts.mean()) > delta


def _log_ratios(sample: Sample, logprobs: NDArray | None) -> NDArray | None:
    return None if logprobs is None else np.where(sample.sampled, logprobs - sample.rollout_logprobs, 0.0)


def _first(groups: Sequence[Group], advantages: Sequence[NDArray], count: int) -> Iterator[tuple[Scored, float]]:
    """Siblings stay together, so that a reader can compare what earned which advantage."""
    pairs = (
        (scored, float(advantage))
        for group, row in zip(groups, advantages, strict=True)
        for scored, advantage in zip(group.scored, row, strict=True)
    )
    for _, pair in zip(range(count), pairs, strict=False):
        yield pair


def _mean(numbers: object) -> float:
    array = np.array(list(numbers), dtype=np.float64)  # pyright: ignore[reportArgumentType]
    return float(array.mean()) if len(array) else 0.0
