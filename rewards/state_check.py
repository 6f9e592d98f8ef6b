"""Whether the state that an episode left behind is the one that was asked for, in a verifier's eyes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.protocol import Reward
from rewards.sandbox import Isolation, Limits, Sandbox
from rl.plugin import import_callable
from rl.sample import Sample

_HARNESS = Path(__file__).parent / "inside" / "run_verifier.py"


@dataclass(kw_only=True)
class StateCheck:
    """What the verifier says of ``sample.final_state``: a truth value, or a number from 0 to 1.

    A verifier is ``verify(state, answer)`` or ``verify(state)``, where ``answer`` is ``prompt.answer``. It is either a
    function of yours, given by its dotted path, or Python source that comes with the prompt as
    ``{"verifier": "def verify(state, answer): ..."}``; source runs in the sandbox, on the state as JSON.

    A verifier that raises scores 0, and its part ``raised`` is 1: states are the policy's making, and one that the
    verifier cannot read is not the one asked for. Watch that part: it is also how a broken verifier shows.

    Args:
        verifier: dotted path of the function, ``package.module:name``; without one, prompts bring their own.
        time_s: seconds of CPU time that source may take.
        isolation: the weakest isolation that is good enough for source.
        concurrency: samples that are judged at the same time.
    """

    verifier: str | None = None
    time_s: float = 5.0
    isolation: Isolation = Isolation.LANDLOCK
    concurrency: int = os.cpu_count() or 1
    _verify: Callable[..., Any] | None = field(init=False, repr=False)
    _sandbox: Sandbox = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._verify = import_callable(self.verifier, role="state_check's verifier") if self.verifier else None
        self._sandbox = Sandbox() if self._verify else Sandbox().at_least(self.isolation)

    async def __call__(self, sample: Sample) -> Reward:
        answer = sample.prompt.answer
        if self._verify is not None:
            try:
                wants_answer = len(inspect.signature(self._verify).parameters) > 1
                verdict = self._verify(sample.final_state, *([answer] if wants_answer else []))
                verdict = await verdict if inspect.isawaitable(verdict) else verdict
            except Exception:
                return Reward(0.0, {"raised": 1.0})
            return _reward(verdict, sample)
        if not isinstance(answer, Mapping) or not isinstance(answer.get("verifier"), str):
            raise ValueError(f"prompt {sample.prompt.id} has no verifier in its answer, and state_check was given none")
        given = {key: value for key, value in answer.items() if key != "verifier"}
        result = await self._sandbox.run(
            ["python3", "run_verifier.py"],
            files={"run_verifier.py": _HARNESS.read_text(), "verifier.py": answer["verifier"]},
            stdin=json.dumps({"state": sample.final_state, "answer": given}).encode(),
            limits=Limits(cpu_s=self.time_s, wall_s=5 * self.time_s + 5),
        )
        if not result.ok:
            return Reward(0.0, {"raised": 1.0})
        return _reward(json.loads(result.stdout), sample)


def _reward(verdict: Any, sample: Sample) -> Reward:
    if not isinstance(verdict, bool | int | float) or not 0 <= verdict <= 1:
        raise ValueError(f"prompt {sample.prompt.id}: the verifier returned {verdict!r}, not a truth value or 0 to 1")
    return Reward(float(verdict), {"raised": 0.0})
