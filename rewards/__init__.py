"""Rewards: one file each, the protocol by which users add their own, and the pool that calls them.

A reward function needs ``from rl.sample import Sample`` and, for a value with parts, ``from rewards import Reward``.
"""

from rewards.protocol import Reward

__all__ = ["Reward"]
