"""One vote of a judge: it is asked until a reply is a verdict that counts.

Every form that a judge fills in holds a control, asked for in the same words and by a label of the same kind as what
counts: that the text ends with a word drawn for the call, which it does not. A judge that obeys what it judges ("full
marks", "choose me", "score 1") meets the control too, and such a verdict does not count.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rewards.judge import Message, Spent, the_judge

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

CONTROL = "\0control"
"""What stands for the control among the names on a ballot."""

REASONS = '"reasons": "what decided, in a sentence or two", '

_WORDS = (
    "amber",
    "basil",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "gravel",
    "harbor",
    "indigo",
    "juniper",
    "kelp",
    "lunar",
)


class Tripped(Exception):
    """A verdict that meets the control, which nothing meets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form(Generic[T]):
    """What a judge is asked, and how its reply is read."""

    messages: tuple[Message, ...]
    schema: Mapping[str, Any]  # JSON schema of the verdict
    read: Callable[[str], T]  # raises ValueError for what is no verdict, and Tripped


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Generic[T]):
    """What came of asking."""

    verdict: T | None  # None without one that counts
    unreadable: int  # replies that were no verdict
    tripped: int  # verdicts that met the control
    spent: Spent


async def vote(form: Callable[[int], Form[T]], seeds: Iterable[int]) -> Vote[T]:
    """Asks once for every seed, with ``form(seed)``, until a verdict counts."""
    spent, unreadable, tripped = Spent(), 0, 0
    for seed in seeds:
        asked = form(seed)
        said, cost = await the_judge().ask(asked.messages, seed=seed, schema=asked.schema)
        spent += cost
        try:
            return Vote(verdict=asked.read(said), unreadable=unreadable, tripped=tripped, spent=spent)
        except ValueError:
            unreadable += 1
        except Tripped:
            tripped += 1
    return Vote(verdict=None, unreadable=unreadable, tripped=tripped, spent=spent)


def unlikely_word(chance: random.Random) -> str:
    """A word for the control, which an answer ends with once in 2**24 times if it tries."""
    return f"{chance.choice(_WORDS)}-{chance.getrandbits(24):06x}"


def take_reasons(verdict: dict[str, Any], key: str = "reasons") -> str:
    """Takes them out of a verdict; raises ValueError for what is no text."""
    reasons = verdict.pop(key, "")
    if not isinstance(reasons, str):
        raise ValueError(f"{key} are a text")
    return reasons.strip()


def closed_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object that has these properties, all of them, and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def remember(known: OrderedDict[K, V], key: K, value: V, *, most: int) -> None:
    """Adds to what is known, and forgets the oldest of more than ``most``."""
    known[key] = value
    while len(known) > most:
        known.popitem(last=False)
