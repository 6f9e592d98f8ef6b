"""Means that can be added up over micro-batches, ranks and steps without losing their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """A numerator and its denominator. ``float(mean)`` divides; two means add by adding both.

    Averaging the averages of unequal micro-batches would weight them wrongly; adding ``Mean``\\ s cannot.
    """

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def __float__(self) -> float:
        return self.total / self.count if self.count else 0.0


def merge(tallies: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Adds means of the same name, over whatever produced them."""
    merged: dict[str, Mean] = {}
    for tally in tallies:
        for name, mean in tally.items():
            merged[name] = merged[name] + mean if name in merged else mean
    return merged


def values(tally: Mapping[str, Mean]) -> dict[str, float]:
    """The plain numbers that the sinks write."""
    return {name: float(mean) for name, mean in tally.items()}
