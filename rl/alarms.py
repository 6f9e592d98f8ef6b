"""Alarms: limits on a run's own metrics, each with a sentence that says what was seen and what to look at.

An alarm starts when the mean of its metric over the last ``alarms.window`` steps is beyond the limit, and clears when
none of that many steps was beyond it any more. Both are told once. docs/alarms.md explains each of them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from rewards.protocol import part_name
from rl.choices import Alarm
from rl.config import Recipe
from rl.progress import Progress
from rl.run_directory import RunDirectory

LENGTH_WINDOWS = 5
"""Windows over which replies may not become ``alarms.length`` times longer: slow growth is what training is for."""

MASTERED = 0.9
"""Accuracy, over all domains, from which on little entropy and equal rewards are what success looks like."""

Comparison = Callable[[float, float], float]
"""(now, before) -> the number that has a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind of alarm. Its texts may use {metric}, {now}, {before} and {value}, which is what has the limit."""

    alarm: Alarm
    seen: str
    look: str
    compare: Comparison | None = None
    """None takes now as it is."""
    is_low: bool = False
    """Whether values under the limit are the bad ones, instead of those above it."""
    windows: int | None = None
    """Before is so many windows ago; None is the beginning."""
    every_value: bool = False
    """Whether each value counts by itself, instead of a window's mean."""
    spares_mastery: Callable[[float, float], bool] = lambda now, before: False
    """(now, before) -> whether a policy that is nearly always right may look like this."""


def _times(now: float, before: float) -> float:
    return now / before if before else (1.0 if now == 0 else float("inf"))


def _change(now: float, before: float) -> float:
    """A factor of at least 1, in whichever direction."""
    factor = _times(now, before)
    return max(factor, 1 / factor) if factor else float("inf")


def _loss(now: float, before: float) -> float:
    return before - now


def _however(now: float, before: float) -> bool:
    return True


def _less(now: float, before: float) -> bool:
    return now < before


_MISMATCH = Rule(
    alarm=Alarm.mismatch,
    seen="engine and learner differ by {now:.3g} nats a token on the canary prompts, with the same weights ({metric})",
    look="look at canary/max, routes/replayed, kept/share and objective.keep_*, then at the engine's kernels",
    every_value=True,
)
_REPLAY = Rule(
    alarm=Alarm.replay,
    seen="{metric} fell from {before:.3f} to {now:.3f}, so the learner guesses what the engine recorded before",
    look="look at mismatch/kl, and for prompts or replies that the engine records less of",
    compare=_loss,
)
_KEPT = Rule(
    alarm=Alarm.kept,
    seen="the mean kept set went from {before:.3g} to {now:.3g} ids ({metric})",
    look="look at entropy: a policy that flattens or freezes; then at learner.lr and the kl_beta of domains",
    compare=_change,
    spares_mastery=_less,
)
_ENTROPY = Rule(
    alarm=Alarm.entropy,
    seen="the entropy fell from {before:.3g} to {now:.3g} nats a token ({metric})",
    look="look at groups/zero_variance and at samples that repeat themselves; then at learner.lr and kl_beta",
    compare=_times,
    is_low=True,
    spares_mastery=_however,
)
_MASKED = Rule(
    alarm=Alarm.masked,
    seen="the off-policy mask takes out {now:.0%} of the samples ({metric})",
    look="look at canary/logprob_abs and staleness/mean; then at rollout.max_staleness, learner.minibatches and "
    "learner.lr",
)
_CLIPPED = Rule(
    alarm=Alarm.clipped,
    seen="the clip cuts off the gradient of {now:.0%} of the tokens ({metric})",
    look="look at staleness/mean and mismatch/kl; then at learner.lr and learner.minibatches",
)
_SATURATION = Rule(
    alarm=Alarm.saturation,
    seen="{now:.1%} of the samples are right ({metric})",
    look="look at samples: is the reward too easy to please? If not, the domain wants harder prompts or less weight",
)
_ZERO_VARIANCE = Rule(
    alarm=Alarm.zero_variance,
    seen="{now:.0%} of the groups have the same reward for all samples and teach nothing ({metric})",
    look="look at reward/mean: prompts are too hard, too easy or the reward is constant; objective.zero_variance "
    "replaces such groups",
    spares_mastery=_however,
)
_DOMINANCE = Rule(
    alarm=Alarm.dominance,
    seen="{now:.0%} of what tells siblings apart comes from one reward beside the first ({metric})",
    look="look at its part of reward/ and at accuracy/; then at its weight",
)
_LENGTH = Rule(
    alarm=Alarm.length,
    seen="replies became {value:.1f} times longer, from {before:.0f} to {now:.0f} tokens ({metric})",
    look="look at samples that ramble and at accuracy/; then at length_penalty and learner.lr",
    compare=_times,
    windows=LENGTH_WINDOWS,
)
_TRUNCATED = Rule(
    alarm=Alarm.truncated,
    seen="{now:.0%} of the replies are cut off ({metric})",
    look="look at length/mean against sampling.max_tokens and model.max_context",
)


def rules(recipe: Recipe) -> Iterator[tuple[Rule, str]]:
    """Every rule with a metric that it watches in this recipe."""
    yield _MISMATCH, "canary/logprob_abs"
    yield _REPLAY, "routes/replayed"
    yield _REPLAY, "kept/share"
    if recipe.objective.keep_selection:
        yield _REPLAY, "selections/replayed"
    yield _KEPT, "kept/mean_size"
    yield _ENTROPY, "entropy"
    yield _MASKED, "mask/off_policy"
    yield _CLIPPED, "ratio/clipped"
    yield _ZERO_VARIANCE, "groups/zero_variance"
    yield _LENGTH, "length/mean"
    yield _TRUNCATED, "length/truncated"
    for name, domain in recipe.domains.items():
        yield _SATURATION, f"accuracy/{name}"
        for use in domain.rewards[1:]:
            yield _DOMINANCE, f"reward_share/{name}/{part_name(use)}"


@dataclass(slots=True, kw_only=True)
class Watch:
    """One rule on one metric."""

    rule: Rule
    metric: str
    limit: float
    window: int
    active: bool = False
    _values: list[float] = field(default_factory=list)  # of every step that measured one
    _within: int = 0  # how many of the last values in a row were within the limit

    def observe(self, value: float, *, mastered: bool = False) -> bool:
        """Takes a step's value; whether the alarm starts or clears with it."""
        self._values.append(value)
        if len(self._values) < self.span + (self.rule.compare is not None):
            return False
        spared, before = mastered and self.rule.spares_mastery(self.now, self.before), self.active
        self._within = 0 if self._is_beyond(self._judged(value)) and not spared else self._within + 1
        self.active = self._within < self.span if before else self._is_beyond(self.value) and not spared
        return self.active != before

    @property
    def span(self) -> int:
        """Values that count together."""
        return 1 if self.rule.every_value else self.window

    @property
    def now(self) -> float:
        """The metric, over the last values."""
        return float(np.mean(self._values[-self.span :]))

    @property
    def before(self) -> float:
        """The metric, over the values that now is compared with."""
        windows = self.rule.windows
        start = 0 if windows is None else max(0, len(self._values) - (windows + 1) * self.span)
        return float(np.mean(self._values[start : start + self.span]))

    @property
    def value(self) -> float:
        """What has the limit."""
        return self._judged(self.now)

    @property
    def sentence(self) -> str:
        """What is seen and what to look at; of an alarm that has cleared, that it has."""
        rule, key = self.rule, f"alarms.{self.rule.alarm} {self.limit:g}"
        if not self.active:
            return f"alarm {rule.alarm} cleared: {self.metric} has come back within {key}"
        seen = rule.seen.format(metric=self.metric, now=self.now, before=self.before, value=self.value)
        side = "below" if rule.is_low else "above"
        measured = f", and {self.value:.3g} is" if rule.compare else ","
        return f"alarm {rule.alarm}: {seen}{measured} {side} {key}; {rule.look}"

    def _judged(self, now: float) -> float:
        return self.rule.compare(now, self.before) if self.rule.compare else now

    def _is_beyond(self, value: float) -> bool:
        """A number that is not finite is within no limit."""
        return not (value >= self.limit if self.rule.is_low else value <= self.limit)


class Alarms:
    """All alarms of a run. They go on from the metrics that the run's directory already holds."""

    def __init__(self, recipe: Recipe, run: RunDirectory, progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self._stopping = frozenset(recipe.alarms.stop)
        self.watches = [
            Watch(rule=rule, metric=metric, limit=limit, window=recipe.alarms.window)
            for rule, metric in rules(recipe)
            if (limit := getattr(recipe.alarms, rule.alarm)) is not None
        ]
        self._accuracies: deque[float] = deque(maxlen=recipe.alarms.window)  # mean over domains, of the last steps
        if run.metrics.exists():
            for line in run.metrics.read_text().splitlines():
                self._changes(json.loads(line))

    def observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Tells which alarms start or clear with a step, and returns how many are active."""
        step = int(metrics["step"])
        for watch in self._changes(metrics):
            self.progress.warn(f"step {step}: {watch.sentence}")
            self.run.log_alarm(
                {
                    "step": step,
                    "alarm": watch.rule.alarm,
                    "metric": watch.metric,
                    "active": watch.active,
                    "value": watch.value,
                    "limit": watch.limit,
                    "sentence": watch.sentence,
                }
            )
        return {"alarms/active": float(sum(watch.active for watch in self.watches))}

    @property
    def stopping(self) -> str | None:
        """Why the run must not go on: the sentence of an alarm of ``alarms.stop`` that is active."""
        for watch in self.watches:
            if watch.active and watch.rule.alarm in self._stopping:
                return f"{watch.sentence}; it is one of alarms.stop"
        return None

    def _changes(self, metrics: Mapping[str, float | None]) -> list[Watch]:
        """Those that start or clear. What a step did not measure is passed over; null stands for not finite."""
        accuracies = [value or 0.0 for name, value in metrics.items() if name.startswith("accuracy/")]
        if accuracies:
            self._accuracies.append(float(np.mean(accuracies)))
        mastered = bool(self._accuracies) and float(np.mean(self._accuracies)) >= MASTERED
        told = []
        for watch in self.watches:
            if watch.metric in metrics:
                value = metrics[watch.metric]
                if watch.observe(float("nan") if value is None else value, mastered=mastered):
                    told.append(watch)
        return told
