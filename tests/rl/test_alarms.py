"""Alarms on series of metrics: which start, when, what they say, when they clear."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rl.alarms import Alarms
from rl.choices import Alarm
from rl.config import Domain, RewardUse
from rl.progress import Progress
from rl.reward_shares import reward_shares
from rl.run_directory import RunDirectory
from rl.sample import Group, Scored
from tests.rl.tiny_runs import make_prompt, make_sample, read_lines, tiny_recipe

HEALTHY = {
    "canary/logprob_abs": 0.01,
    "routes/replayed": 1.0,
    "kept/share": 1.0,
    "kept/mean_size": 8.0,
    "entropy": 0.4,
    "mask/off_policy": 0.05,
    "ratio/clipped": 0.02,
    "groups/zero_variance": 0.4,
    "length/mean": 500.0,
    "length/truncated": 0.02,
    "accuracy/sums": 0.5,
    "reward_share/sums/format": 0.1,
}
WINDOW = 4


class Station:
    """The alarms of a tiny run, fed step by step."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        recipe = tiny_recipe(
            folder,
            f"alarms.window={WINDOW}",
            "domains.sums.rewards=[{use: 'tests.rl.tiny_rewards:evenness'}, {use: format}]",
            *overrides,
        )
        self.printed = io.StringIO()
        self.run = RunDirectory.create(folder / "run", recipe="name: tiny\n")
        self.progress = Progress("tiny", steps=3, console=Console(file=self.printed, width=500))
        self.alarms = Alarms(recipe, self.run, self.progress)
        self.again = lambda: Alarms(recipe, self.run, self.progress)
        self.step = 0

    def feed(self, **changes: float | Sequence[float]) -> list[float]:
        """As many healthy steps as the longest change has values, with the changes; ``alarms/active`` of each."""
        series = {name.replace("__", "/"): np.atleast_1d(value).tolist() for name, value in changes.items()}
        active = []
        for number in range(max(map(len, series.values()))):
            self.step += 1
            row = HEALTHY | {name: values[min(number, len(values) - 1)] for name, values in series.items()}
            row = {"step": self.step, **row}
            row |= self.alarms.observe(row)
            self.run.log(row)
            active.append(row["alarms/active"])
        return active

    @property
    def told(self) -> list[dict[str, Any]]:
        return read_lines(self.run.alarms) if self.run.alarms.exists() else []


@pytest.fixture
def station(tmp_path: Path) -> Station:
    station = Station(tmp_path)
    assert station.feed(entropy=[0.4] * WINDOW) == [0.0] * WINDOW
    return station


PATHOLOGIES = [
    (Alarm.mismatch, "canary/logprob_abs", 0.3, 1, ("0.3 nats", "alarms.mismatch 0.05", "canary/max")),
    (Alarm.mismatch, "canary/logprob_abs", float("nan"), 1, ("nan nats",)),
    (Alarm.replay, "routes/replayed", 0.9, 1, ("from 1.000 to 0.975", "0.025 is above alarms.replay 0.02")),
    (Alarm.replay, "kept/share", 0.0, 1, ("kept/share fell from 1.000 to 0.750",)),
    (Alarm.kept, "kept/mean_size", 150.0, 1, ("from 8 to 43.5 ids", "5.44 is above alarms.kept 5")),
    (Alarm.kept, "kept/mean_size", 1.0, WINDOW, ("from 8 to 1 ids",)),
    (Alarm.entropy, "entropy", 0.002, WINDOW, ("from 0.4 to 0.002 nats", "0.005 is below alarms.entropy 0.1")),
    (Alarm.masked, "mask/off_policy", 0.9, 3, ("69% of the samples", "alarms.masked 0.5", "max_staleness")),
    (Alarm.clipped, "ratio/clipped", 0.6, 2, ("31% of the tokens", "learner.lr")),
    (Alarm.saturation, "accuracy/sums", 1.0, WINDOW, ("100.0% of the samples are right (accuracy/sums)",)),
    (Alarm.zero_variance, "groups/zero_variance", 1.0, WINDOW, ("100% of the groups", "objective.zero_variance")),
    (Alarm.dominance, "reward_share/sums/format", 1.0, WINDOW, ("reward_share/sums/format", "at its weight")),
    (Alarm.length, "length/mean", 4100.0, 2, ("4.6 times longer, from 500 to 2300 tokens", "alarms.length 3")),
    (Alarm.truncated, "length/truncated", 0.99, WINDOW, ("99% of the replies", "sampling.max_tokens")),
]


@pytest.mark.parametrize(("alarm", "metric", "value", "after", "words"), PATHOLOGIES)
def test_a_pathology_is_told_once_and_its_end_too(
    station: Station, alarm: Alarm, metric: str, value: float, after: int, words: Sequence[str]
):
    """``after`` steps of it bring the window's mean beyond the limit; a window of healthy steps ends it."""
    (first, *others) = station.feed(**{metric: [value] * (after + 2)})[after - 1 :]
    assert first == 1.0 and set(others) == {1.0}
    (started,) = station.told
    assert (started["alarm"], started["metric"], started["active"]) == (alarm, metric, True)
    assert started["step"] == WINDOW + after
    assert started["limit"] == getattr(tiny_recipe(station.run.path.parent).alarms, alarm)
    for word in (*words, metric, f"alarms.{alarm}"):
        assert word in started["sentence"]
    assert f"warning: step {started['step']}: {started['sentence']}\n" in station.printed.getvalue()

    span = 1 if alarm == Alarm.mismatch else WINDOW
    assert station.feed(**{metric: [HEALTHY[metric]] * (span + 2)}) == [1.0] * (span - 1) + [0.0] * 3
    _, cleared = station.told
    assert (cleared["alarm"], cleared["active"], cleared["step"]) == (alarm, False, WINDOW + after + 2 + span)
    assert f"alarm {alarm} cleared: {metric}" in cleared["sentence"]
    assert station.printed.getvalue().count("warning") == 2


def test_every_alarm_has_a_pathology_and_a_section_in_the_docs():
    assert {alarm for alarm, *_ in PATHOLOGIES} == set(Alarm)
    page = (Path(__file__).parents[2] / "docs/alarms.md").read_text()
    assert not [alarm for alarm in Alarm if f"| `{alarm}` |" not in page]


def test_a_single_step_is_no_alarm(station: Station):
    for metric, value in {
        "entropy": 0.0,
        "groups/zero_variance": 1.0,
        "accuracy/sums": 1.0,
        "length/mean": 900,
    }.items():
        assert station.feed(**{metric: [value, HEALTHY[metric], HEALTHY[metric], HEALTHY[metric]]}) == [0.0] * 4
    assert station.told == []


def test_mastery_looks_like_collapse_and_is_not(station: Station):
    """What the quickstart's end looks like: hardly an error left, so hardly any entropy, choice or variance."""
    mastered = station.feed(entropy=[0.002] * 9, groups__zero_variance=0.95, accuracy__sums=0.97, kept__mean_size=1.2)
    assert mastered == [0.0] * 9
    forgotten = station.feed(entropy=[0.002] * 4, groups__zero_variance=0.95, accuracy__sums=0.5, kept__mean_size=1.2)
    assert forgotten[-1] == 3.0
    assert {row["alarm"] for row in station.told} == {"entropy", "zero_variance", "kept"}


def test_kept_sets_that_grow_are_no_mastery(station: Station):
    station.feed(accuracy__sums=[0.97] * WINDOW, kept__mean_size=80.0)
    assert {row["alarm"] for row in station.told} == {"kept"}


def test_slow_growth_is_no_blow_up(station: Station):
    assert set(station.feed(length__mean=list(np.geomspace(500, 20_000, 120)))) == {0.0}


def test_a_limit_of_null_turns_an_alarm_off(tmp_path: Path):
    station = Station(tmp_path, "alarms.entropy=null")
    assert set(station.feed(entropy=[0.4] * WINDOW + [0.0] * 9)) == {0.0}


def test_alarms_that_stop_the_run(tmp_path: Path):
    station = Station(tmp_path, "alarms.stop=[masked]")
    station.feed(groups__zero_variance=[1.0] * WINDOW)
    assert station.alarms.stopping is None  # one is active, and not one of those
    station.feed(mask__off_policy=[0.9] * WINDOW)
    assert station.alarms.stopping is not None
    assert station.alarms.stopping.startswith("alarm masked: the off-policy mask takes out 90% of the samples")
    assert station.alarms.stopping.endswith("; it is one of alarms.stop")


def test_a_run_that_goes_on_knows_its_beginning_and_what_was_active(station: Station):
    station.feed(length__truncated=[0.99] * WINDOW, entropy=[0.4, 0.4, 0.2, 0.2])
    assert [row["alarm"] for row in station.told] == ["truncated"]
    printed = station.printed.getvalue()
    before, station.alarms = station.alarms, station.again()
    assert station.printed.getvalue() == printed
    assert [watch.sentence for watch in station.alarms.watches] == [watch.sentence for watch in before.watches]
    station.feed(length__truncated=[0.99], entropy=[0.001] * WINDOW)
    assert [row["alarm"] for row in station.told] == ["truncated", "entropy"]


def test_metrics_that_are_not_finite_come_back_as_null(station: Station):
    assert station.feed(entropy=[float("nan")]) == [1.0]
    assert json.loads(station.run.metrics.read_text().splitlines()[-1])["entropy"] is None
    assert station.again().observe({"step": 99}) == {"alarms/active": 1.0}


def test_shares_of_rewards_are_those_of_what_tells_siblings_apart():
    """Against numpy: weights count squared, levels of whole groups not at all."""
    domain = Domain(
        rewards=[
            RewardUse(use="math_answer"),
            RewardUse(use="m:brevity", weight=0.5),
            RewardUse(use="format", weight=0),
        ]
    )
    right, brief = np.array([[0, 0, 1, 1], [1, 1, 1, 1]]), np.array([[4, 4, 4, 6], [0, 2, 0, 2]])
    groups = []
    for number, (a, b) in enumerate(zip(right, brief, strict=True)):
        prompt = make_prompt(str(number))
        parts = [{"math_answer": float(x), "brevity": float(y), "format": 7.0 * y} for x, y in zip(a, b, strict=True)]
        members = (Scored(sample=make_sample(prompt, i), reward=0.0, parts=p) for i, p in enumerate(parts))
        groups.append(Group(prompt=prompt, scored=tuple(members)))
    variances = np.array([right.var(axis=1).mean(), 0.25 * brief.var(axis=1).mean()])
    shares = reward_shares("sums", domain, groups)
    assert shares.keys() == {"reward_share/sums/math_answer", "reward_share/sums/brevity"}
    np.testing.assert_allclose(list(shares.values()), variances / variances.sum())
    assert set(reward_shares("sums", domain, groups[:0]).values()) == {0.0}
    assert reward_shares("sums", Domain(rewards=[RewardUse(use="math_answer")]), groups) == {}
