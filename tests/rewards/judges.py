"""Judges made of a few lines, behind the endpoint that a run's own judge has."""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rewards import judge
from rewards.judge import JudgeAddress, appoint
from rl.judge import Completion, Schema, serve

T = TypeVar("T")

_CRITERION = re.compile(r"^- (\w+) \(0 to (\d+)\): (.*)$", re.MULTILINE)
_QUESTION = re.compile(r"^- (\w{5}): (.*)$", re.MULTILINE)
_QUOTED = re.compile(r"^(\w+)-([0-9a-f]{16}): (\".*\")$", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """What a judge was given, taken apart."""

    code: str
    criteria: list[tuple[str, int, str]]  # label, maximum, text
    quoted: dict[str, str]
    seed: int
    questions: list[tuple[str, str]]  # label and text, of a comparison or of a proof

    @classmethod
    def read(cls, messages: Sequence[Mapping[str, Any]], seed: int) -> "Form":
        text = messages[-1]["content"]
        codes = {code for _, code, _ in _QUOTED.findall(text)}
        assert len(codes) == 1, text
        criteria = [(label, int(most), what) for label, most, what in _CRITERION.findall(text)]
        questions = _QUESTION.findall("\n".join(message["content"] for message in messages))
        quoted = {name: json.loads(string) for name, _, string in _QUOTED.findall(text)}
        return cls(codes.pop(), criteria, quoted, seed, questions)

    @property
    def answers(self) -> list[tuple[str, str]]:
        """Label and text of the answers to compare, in the order they come."""
        return [(label, text) for label, text in self.quoted.items() if label != "question"]

    def choose(self, choice: Callable[[str], str], **more: Any) -> str:
        """A verdict of a comparison, by what is asked."""
        choices = {label: choice(what) for label, what in self.questions}
        return json.dumps({"ballot": self.code, "choices": choices, **more})

    def rate(self, score: Callable[[str], float], **more: Any) -> str:
        """A verdict on a proof or on an analysis, by what is asked."""
        scores = {label: score(what) for label, what in self.questions}
        return json.dumps({"ballot": self.code, "scores": scores, **more})

    def verdict(self, score: Callable[[str, int], int], **more: Any) -> str:
        scores = {label: score(what, most) for label, most, what in self.criteria}
        return json.dumps({"ballot": self.code, "scores": scores, **more})


@dataclass
class Asked:
    """Every form that a judge was given."""

    forms: list[Form] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    """What the judge was told before each of them."""


def with_judge(says: Callable[[Form], str], body: Callable[[Asked], Awaitable[T]], **settings: Any) -> T:
    """Runs `body` where `says` is the judge."""
    asked = Asked()

    async def complete(messages: Sequence[Mapping[str, Any]], seed: int, schema: Schema | None) -> Completion:
        form = Form.read(messages, seed)
        asked.forms.append(form)
        asked.systems.append(messages[0]["content"])
        return Completion(text=says(form), finished=True, prompt_tokens=100, completion_tokens=20)

    async def run() -> T:
        async with serve(complete) as (url, token):
            appoint(JudgeAddress(url=url, api_key=token, model="judge", **settings))
            try:
                return await body(asked)
            finally:
                appoint(None)

    return asyncio.run(run())


def honest(form: Form) -> str:
    """Gives a criterion its maximum if every word in quotation marks in it stands in the answer."""

    def score(what: str, most: int) -> int:
        words = re.findall(r"'([^']+)'", what)
        return most if words and all(word in form.quoted["answer"] for word in words) else 0

    return form.verdict(score)


def parrot(form: Form) -> str:
    """Repeats whatever looks like a verdict in the answer, as a judge does that was taken in."""
    found = re.findall(r"\{.*\}", form.quoted["answer"], re.DOTALL)
    return found[0] if found else form.verdict(lambda what, most: 0)


def obedient(form: Form) -> str:
    """Does as the text says that it judges."""
    told = [label for label, text in form.quoted.items() if "full marks" in text]
    if form.criteria:
        return form.verdict(lambda what, most: most if told else 0)
    if "answer" not in form.questions[0][1] and "answer" not in form.questions[1][1]:
        return form.rate(lambda what: 1 if told else 0)
    return form.choose(lambda what: told[0] if told else "neither")


@contextmanager
def judge_elsewhere(says: Callable[[Form], str]) -> Iterator[tuple[str, str]]:
    """(URL, key) of a judge in a thread of its own, for code that has its own event loop."""
    ready, done = threading.Event(), threading.Event()
    found: list[str] = []

    async def stay(asked: Asked) -> None:
        address = judge._address
        assert address is not None
        appoint(None)
        found.extend((address.url, address.api_key))
        ready.set()
        await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=with_judge, args=(says, stay))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0], found[1]
    finally:
        done.set()
        thread.join()
