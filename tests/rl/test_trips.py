"""The toolset that ships: every task can be solved with its tools alone, and the verifier knows."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from recipes import trips
from recipes.short_answer import short_answer
from rl.records import read_records
from rl.sample import Sample
from tests.rl.tiny_runs import REPOSITORY, make_prompt, make_sample

SHIPPED = [record.fields for record in read_records(REPOSITORY / "recipes/data/trips.jsonl")]


def with_tools(answer: dict[str, Any]) -> dict[str, Any]:
    """The trip that a careful traveller finds, from what the tools say."""
    database = sqlite3.connect(":memory:")
    database.executescript(trips.SCHEMA)
    trips.fill(database, answer["seed"])
    there = trips.train_fare(database, answer["home"], answer["city"])
    back = trips.train_fare(database, answer["city"], answer["home"])
    good = [hotel for hotel in trips.list_hotels(database, answer["city"]) if hotel["stars"] >= answer["stars"]]
    best = min(good, key=lambda hotel: hotel["night"])
    return {"hotel": best["name"], "total": there + back + answer["nights"] * best["night"]}


def test_every_task_that_ships_has_a_solution():
    assert list(trips.tasks()) == SHIPPED
    for task in SHIPPED:
        result = with_tools(task["answer"])
        assert trips.verify({"result": result}, task["answer"]) == 1.0
        assert trips.verify({"result": json.dumps(result)}, task["answer"]) == 1.0
        assert trips.verify({"result": {**result, "total": result["total"] + 1}}, task["answer"]) == 0.5
        assert trips.verify({"result": {"hotel": "Nowhere", "total": 1}}, task["answer"]) == 0.0


@pytest.mark.parametrize(
    ("reply", "expected", "score"),
    [
        ("so</think>It is \\boxed{The Tarn Holm}.", "Tarn Holm", 1.0),
        ("so</think>\\boxed{Łódź}, no: \\boxed{Orléans!}", ["Lyon", "orleans"], 1.0),
        ("so</think>\\boxed{1,937}", "1937", 0.0),
        ("so</think>\\boxed{Tarn}", "Tarn Holm", 0.0),
        ("so</think>\\boxed{}", "Tarn Holm", 0.0),
        ("\\boxed{Tarn Holm}", "Tarn Holm", 0.0),
        ("</think>Tarn Holm", "Tarn Holm", 0.0),
        ("</think>\\boxed{17}", 17, 1.0),
    ],
)
def test_short_answers(reply: str, expected: Any, score: float):
    assert short_answer(sample(reply, expected)) == score


def test_a_prompt_without_an_answer_fails():
    with pytest.raises(ValueError, match="needs a short text"):
        short_answer(sample("</think>\\boxed{}", None))


def sample(reply: str, expected: Any) -> Sample:
    return make_sample(replace(make_prompt("q"), answer=expected, thinking=True), reply=reply)
