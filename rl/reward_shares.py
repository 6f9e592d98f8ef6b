"""Which of a domain's rewards tells siblings apart: only what differs within a group becomes an advantage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.protocol import part_name
from rl.config import Domain
from rl.sample import Group


def reward_shares(name: str, domain: Domain, groups: Sequence[Group]) -> dict[str, float]:
    """``reward_share/<domain>/<part>``: each reward's share of the variance within groups, weights counted.

    The variances are means over the domain's samples and add up to 1 when divided by their sum, whether rewards go
    together or against each other. All are 0 where nothing told siblings apart. A domain with one reward has none.
    """
    used = [use for use in domain.rewards if use.weight > 0]
    if len(used) < 2:
        return {}
    variances = {part_name(use): use.weight**2 * _within(part_name(use), groups) for use in used}
    total = sum(variances.values())
    return {f"reward_share/{name}/{part}": value / total if total else 0.0 for part, value in variances.items()}


def _within(part: str, groups: Sequence[Group]) -> float:
    """Sum of squared differences from the mean of the sample's group."""
    values = [np.array([one.parts[part] for one in group.scored]) for group in groups if group.scored]
    return float(sum(np.sum((value - value.mean()) ** 2) for value in values))
