"""A language model that judges: how rewards ask it, and how little of its output they believe.

The judge is an OpenAI-compatible endpoint. The driver names it, or starts one of its own (``rl/judge.py``), and tells
every worker process before rewards are constructed; a reward gets it by :func:`the_judge`.

What is judged was written by the policy, which would like to write its score too. So

* it reaches the judge as data: JSON strings on lines of their own, behind markers with a code that is drawn for each
  call, with ``<`` and ``>`` escaped so that no tag or special token can be spelled;
* the verdict is read from the judge's own output only, must be one JSON object and nothing else, must carry the code,
  and must give every label exactly once. Labels are drawn for each call too. A forged verdict inside an answer knows
  neither, and a judge that repeats it casts no vote.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from rl.errors import RecipeError
from rl.plugin import describe

Message = Mapping[str, str]

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
_THOUGHT = re.compile(r"\A.*</think>", re.DOTALL)


class JudgeFailed(Exception):
    """The judge could not be reached, or never said anything that counts as a verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAddress:
    """Where the judge is and how it is asked; see ``rl.config.Judge`` for what the values mean."""

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    temperature: float = 1.0
    max_tokens: int = 2048
    timeout_s: float = 120.0
    attempts: int = 3
    structured: bool = True
    concurrency: int = 64
    usd_per_million_input: float = 0.0
    usd_per_million_output: float = 0.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What asking the judge took."""

    calls: int = 0
    seconds: float = 0.0
    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.usd + other.usd,
        )

    def parts(self) -> dict[str, float]:
        """``judge_s`` is the mean latency of a call; tokens and dollars are sums."""
        return {
            "judge_calls": float(self.calls),
            "judge_s": self.seconds / self.calls if self.calls else 0.0,
            "judge_tokens": float(self.tokens),
            "judge_usd": self.usd,
        }


class Judge:
    """A client of one judge, for one event loop."""

    def __init__(self, address: JudgeAddress) -> None:
        self.address = address
        self._client: httpx2.AsyncClient | None = None
        self._places = asyncio.Semaphore(address.concurrency)

    async def ask(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> tuple[str, Spent]:
        """What the judge says, without its reasoning. ``schema`` is asked of an endpoint that can enforce one.

        A call that fails to connect, times out or is refused for now is made again after a growing pause.
        Raises JudgeFailed with the reason of the last attempt.
        """
        address = self.address
        body: dict[str, Any] = {
            "model": address.model,
            "messages": list(messages),
            "temperature": address.temperature,
            "max_tokens": address.max_tokens,
            "seed": seed,
        }
        if schema is not None and address.structured:
            verdict = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": verdict}
        reason = ""
        for attempt in range(address.attempts):
            if attempt:
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0))
            async with self._places:
                began = time.monotonic()
                try:
                    response = await self._connection().post("/chat/completions", json=body)
                except httpx2.HTTPError as error:
                    reason = f"cannot be reached ({describe(error)})"
                    continue
            if response.status_code in _RETRIED:
                reason = f"answered with status {response.status_code}"
                continue
            if response.status_code != 200:
                raise JudgeFailed(f"the judge refused with status {response.status_code}: {response.text[:200]}")
            return self._read(response, time.monotonic() - began)
        raise JudgeFailed(f"the judge at {address.url} {reason}, {address.attempts} times")

    def _read(self, response: httpx2.Response, seconds: float) -> tuple[str, Spent]:
        try:
            answered = response.json()
            content = answered["choices"][0]["message"]["content"] or ""
            usage = answered.get("usage") or {}
            given, said = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeFailed(f"the judge's answer is no chat completion ({describe(error)})") from error
        prices = self.address.usd_per_million_input, self.address.usd_per_million_output
        usd = (given * prices[0] + said * prices[1]) / 1e6
        return _THOUGHT.sub("", content).strip(), Spent(1, seconds, given + said, usd)

    def _connection(self) -> httpx2.AsyncClient:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self.address.api_key}"} if self.address.api_key else {}
            self._client = httpx2.AsyncClient(
                base_url=self.address.url.rstrip("/"),
                headers=headers,
                timeout=self.address.timeout_s,
                limits=httpx2.Limits(max_connections=self.address.concurrency),
                trust_env=False,
            )
        return self._client


@dataclass(frozen=True, slots=True)
class Ballot:
    """One call's code and labels, which nobody could know when the answer was written: it is what decides them."""

    code: str
    labels: Mapping[str, str]  # by what they stand for

    @classmethod
    def draw(cls, names: Sequence[str], chance: random.Random) -> Ballot:
        """A code, and a label for each name; ``chance`` is :func:`rewards.chance.drawn_for` all that is quoted."""
        labels: dict[str, None] = {}  # in the order of drawing; a set's differs between processes
        while len(labels) < len(names):
            labels["".join(chance.choices("bcdfghjkmnpqrstvwxz", k=5))] = None
        return cls(f"{chance.getrandbits(64):016x}", dict(zip(names, labels, strict=True)))

    def quote(self, name: str, text: str) -> str:
        """Text of strangers on one line that nothing in it can leave."""
        quoted = json.dumps(text, ensure_ascii=False)
        for character in "<>\u2028\u2029\u0085｜":
            quoted = quoted.replace(character, f"\\u{ord(character):04x}")
        return f"{name}-{self.code}: {quoted}"

    def read(self, said: str) -> dict[str, Any]:
        """The judge's JSON object, which must be all it said and carry this ballot's code, without the code.

        Raises ValueError.
        """
        fenced = _FENCE.match(said.strip())
        try:
            verdict = json.loads(fenced[1] if fenced else said, object_pairs_hook=_without_duplicates)
        except RecursionError as error:
            raise ValueError("the verdict is nested too deeply") from error
        if not isinstance(verdict, dict) or verdict.pop("ballot", None) != self.code:
            raise ValueError("the verdict does not carry its ballot's code")
        return verdict


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


_address: JudgeAddress | None = None
_judges: dict[int, Judge] = {}


def appoint(address: JudgeAddress | None) -> None:
    """Makes a judge this process's; called before rewards are constructed."""
    global _address
    _address = address
    _judges.clear()


def require_judge(reward: str) -> None:
    """Raises RecipeError, for a reward that needs a judge where none is appointed."""
    if _address is None:
        raise RecipeError(
            f"the reward {reward} needs a judge; set judge.url or judge.path in the recipe, or give --judge-url"
        )


def the_judge() -> Judge:
    """This process's judge, for the running event loop."""
    if _address is None:
        raise JudgeFailed("no judge is appointed")
    loop = id(asyncio.get_running_loop())
    if loop not in _judges:
        _judges[loop] = Judge(_address)
    return _judges[loop]
