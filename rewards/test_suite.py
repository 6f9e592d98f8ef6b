"""Whether a change to a repository makes the failing tests pass and keeps the others passing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.protocol import Reward
from rl.junit import PASSED, read_junit
from rl.sample import Sample

__all__ = ["TestSuite", "read_junit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSuite:
    """1 if every test of ``fail_to_pass`` passes and none of ``pass_to_pass`` is broken, else 0.

    ``prompt.answer`` holds both as lists of test names. The environment ran the tests after the last turn, with the
    test files put back to what they are to be, and says how each went in ``sample.final_state["tests"]``: a mapping of
    names to ``passed``, ``failed``, ``error`` or ``skipped`` (:func:`read_junit` makes one). A test that is not in it
    did not pass. An episode that left no such mapping, because the tests could not be run, scores 0 and has the part
    ``not_run`` 1.

    Parts: ``fail_to_pass`` and ``pass_to_pass``, the shares that pass, and ``not_run``.

    Args:
        partial: the reward is the share of ``fail_to_pass`` where nothing was broken, instead of all or nothing.
    """

    __test__ = False  # pytest takes it for a class of tests
    partial: bool = False

    def __call__(self, sample: Sample) -> Reward:
        asked = sample.prompt.answer
        if not isinstance(asked, Mapping) or not asked.get("fail_to_pass"):
            raise ValueError(f"prompt {sample.prompt.id} needs fail_to_pass (and pass_to_pass) in its answer")
        outcomes = _outcomes(sample.final_state)
        fixed = _share(asked["fail_to_pass"], outcomes or {})
        kept = _share(asked.get("pass_to_pass") or (), outcomes or {})
        value = 0.0 if kept < 1 or outcomes is None else fixed if self.partial else float(fixed == 1)
        return Reward(value, {"fail_to_pass": fixed, "pass_to_pass": kept, "not_run": float(outcomes is None)})


def _outcomes(state: Any) -> Mapping[str, str] | None:
    tests = state.get("tests") if isinstance(state, Mapping) else None
    return tests if isinstance(tests, Mapping) else None


def _share(names: Iterable[str], outcomes: Mapping[str, str]) -> float:
    names = list(names)
    return sum(outcomes.get(name) == PASSED for name in names) / len(names) if names else 1.0
