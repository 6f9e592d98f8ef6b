"""A toolset for the `tools` environment, with its tasks and their verifier: plan the cheapest trip that will do.

``python -m recipes.trips`` prints the tasks that ship as ``recipes/data/trips.jsonl``.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from rollout.environments.protocol import ToolError, tool

SCHEMA = """
CREATE TABLE hotels (city TEXT, name TEXT, stars INTEGER, night INTEGER, PRIMARY KEY (city, name));
CREATE TABLE trains (origin TEXT, destination TEXT, fare INTEGER, PRIMARY KEY (origin, destination));
"""
CITIES = ("Arlen", "Brask", "Corvo", "Dunmere", "Eskdale", "Farrow")
_HOTELS = ("Anchor", "Bell", "Crown", "Dolphin", "Elm", "Fleece", "Globe", "Harp")


def fill(database: sqlite3.Connection, seed: int) -> None:
    """Five hotels in every city, one of them with five stars, and a train between any two cities."""
    draw = random.Random(seed)
    for city in CITIES:
        for place, name in enumerate(draw.sample(_HOTELS, 5)):
            stars = 5 if place == 0 else draw.randint(1, 4)
            hotel = (city, name, stars, 20 * stars + draw.randrange(5, 60))
            database.execute("INSERT INTO hotels VALUES (?, ?, ?, ?)", hotel)
    pairs = [(origin, destination) for origin in CITIES for destination in CITIES if origin != destination]
    database.executemany("INSERT INTO trains VALUES (?, ?, ?)", [(*pair, draw.randrange(15, 90)) for pair in pairs])


@tool
def list_hotels(database: sqlite3.Connection, city: str) -> list[dict[str, Any]]:
    """Lists the hotels of a city with their stars and the price of one night."""
    rows = database.execute("SELECT name, stars, night FROM hotels WHERE city = ? ORDER BY name", (city,)).fetchall()
    if not rows:
        raise ToolError(f"there is no city {city}; there are {', '.join(CITIES)}")
    return [{"name": name, "stars": stars, "night": night} for name, stars, night in rows]


@tool
def train_fare(database: sqlite3.Connection, origin: str, destination: str) -> int:
    """The fare of the train from one city to another, one way; the way back may cost something else."""
    where = (origin, destination)
    row = database.execute("SELECT fare FROM trains WHERE origin = ? AND destination = ?", where).fetchone()
    if row is None:
        raise ToolError(f"there is no train from {origin} to {destination}; the cities are {', '.join(CITIES)}")
    return row[0]


def verify(state: Mapping[str, Any], answer: Mapping[str, Any]) -> float:
    """1 for the cheapest hotel with stars enough and the right sum, 0.5 for either of the two, else 0."""
    result = state["result"]
    result = json.loads(result) if isinstance(result, str) else result
    costs = hotel_costs(answer)
    return 0.5 * (costs.get(result["hotel"]) == min(costs.values())) + 0.5 * (result["total"] == min(costs.values()))


def hotel_costs(answer: Mapping[str, Any]) -> dict[str, int]:
    """What the whole trip of a task costs, by every hotel that has stars enough."""
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    fill(database, answer["seed"])
    home, city, nights, stars = (answer[name] for name in ("home", "city", "nights", "stars"))
    journey = sum(
        database.execute("SELECT fare FROM trains WHERE origin = ? AND destination = ?", way).fetchone()[0]
        for way in ((home, city), (city, home))
    )
    rows = database.execute("SELECT name, night FROM hotels WHERE city = ? AND stars >= ?", (city, stars)).fetchall()
    database.close()
    return {name: journey + nights * night for name, night in rows}


def tasks(count: int = 120, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Prompts with what the verifier needs, each over a database of its own."""
    draw = random.Random(seed)
    for number in range(count):
        home, city = draw.sample(CITIES, 2)
        answer = {"seed": number, "home": home, "city": city, "nights": draw.randint(1, 6), "stars": draw.randint(1, 5)}
        text = (
            f"Plan a trip by train from {home} to {city} and back, with {answer['nights']} nights in one hotel of at "
            f"least {answer['stars']} stars, as cheap as possible. Submit "
            '{"hotel": its name, "total": the price of trains and hotel together}.'
        )
        yield {"id": f"trip-{number:03}", "prompt": text, "answer": answer}


if __name__ == "__main__":
    for task in tasks():
        print(json.dumps(task))
