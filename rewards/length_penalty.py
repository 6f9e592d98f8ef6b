"""A price on long replies."""

from __future__ import annotations

from dataclasses import dataclass

from rl.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPenalty:
    """With n the number of sampled tokens (reasoning and answer, of all turns; tool output is free):

    0 for n <= target,  -(n - target) / (limit - target) in between,  -1 for n >= limit
    """

    target: int
    limit: int

    def __post_init__(self) -> None:
        if not 0 <= self.target < self.limit:
            raise ValueError(f"target must be from 0 on and below limit, not {self.target} and {self.limit}")

    def __call__(self, sample: Sample) -> float:
        excess = (sample.num_generated - self.target) / (self.limit - self.target)
        return 0.0 - min(max(excess, 0.0), 1.0)  # not -0.0
