"""How good each sample of a group was, compared with its siblings."""

from __future__ import annotations

import numpy as np

_EPSILON = 1e-6  # keeps siblings that differ by rounding only from being told apart


def group_advantages(rewards: np.ndarray, *, divide_by_std: bool = False) -> np.ndarray:
    """``A_i = R_i - mean(R)`` over the siblings of one prompt, the form of DeepSeek-V3.2 (arXiv 2512.02556).

    Args:
        rewards: float [G].
        divide_by_std: divides by the group's population standard deviation (plus 1e-6), as DeepSeekMath and R1 do.
            It gives prompts that are nearly always or nearly never solved a larger weight.

    Returns:
        float64 [G]. All zeros, exactly, for a group whose rewards are equal.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or not np.all(np.isfinite(rewards)):
        raise ValueError(f"group_advantages: rewards must be one finite number a sibling, got {rewards.tolist()}")
    if len(rewards) == 0 or np.all(rewards == rewards[0]):
        return np.zeros_like(rewards)  # the mean of equal numbers may differ from them by rounding
    advantages = rewards - rewards.mean()
    return advantages / (rewards.std() + _EPSILON) if divide_by_std else advantages
