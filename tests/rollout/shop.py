"""A toolset over a small database, for the tests of the `tools` environment."""

from __future__ import annotations

import random
import sqlite3

from rollout.environments.protocol import ToolError, tool

SCHEMA = "CREATE TABLE items (name TEXT PRIMARY KEY, price INTEGER, stock INTEGER);"


def fill(database: sqlite3.Connection, seed: int) -> None:
    prices = random.Random(seed)
    database.executemany(
        "INSERT INTO items VALUES (?, ?, 3)", [(name, prices.randrange(1, 100)) for name in ("apple", "pear", "fig")]
    )


@tool
def list_items(database: sqlite3.Connection) -> list[str]:
    """Lists what the shop has."""
    return [name for (name,) in database.execute("SELECT name FROM items ORDER BY name")]


@tool
def price(database: sqlite3.Connection, name: str) -> int:
    """The price of one item.

    name: an item's name
    """
    row = database.execute("SELECT price FROM items WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise ToolError(f"there is no {name}")
    return row[0]


@tool
def buy(database: sqlite3.Connection, name: str, count: int = 1) -> str:
    """Buys some of an item."""
    database.execute("UPDATE items SET stock = stock - ? WHERE name = ?", (count, name))
    if database.execute("SELECT MIN(stock) FROM items").fetchone()[0] < 0:
        raise ToolError("not enough in stock")
    return "bought"


@tool
def ponder(database: sqlite3.Connection) -> int:
    """Never ends by itself."""
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    return database.execute(endless).fetchone()[0]
