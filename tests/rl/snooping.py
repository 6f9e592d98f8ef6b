"""A reward and an environment that look for what they should not see, in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rewards import Reward
from rl.sample import Prompt, Sample
from rollout.environments.protocol import Environment

MARK = b"s3cret"
"""Part of every secret of the run."""


def sightings() -> list[str]:
    """Variables that were not given, and processes that show any secret in their environment, with their commands."""
    found = [name for name, value in os.environ.items() if MARK.decode() in value and name != "SCORER_TOKEN"]
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            shown = (directory / "environ").read_bytes()
            name = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if MARK in shown:
            found.append(f"{directory.name}: {name}")
    return found


def parents_are_readable() -> bool:
    """Whether looking would have worked: the parent's environment can be read."""
    return len(Path(f"/proc/{os.getppid()}/environ").read_bytes()) > 0


def snoops(sample: Sample) -> Reward:
    """1 where nothing was seen, and 0.5 where there was nothing to see."""
    seen = sightings()
    if seen:
        raise RuntimeError(f"seen in {seen}")
    return Reward(1.0 if parents_are_readable() else 0.5)


def leaks(sample: Sample) -> float:
    """Fails a sibling with a secret that it was given in the message."""
    if sample.index == 1:
        raise ValueError(f"401 Unauthorized: {os.environ['SCORER_TOKEN']}")
    return sample.index / 10


class Snoop(Environment):
    def __init__(self, prompt: Prompt, *, env: dict[str, str], headers: dict[str, str]) -> None:
        assert set(env) == {"GITHUB_TOKEN"} and set(headers) == {"Authorization"}

    def final_state(self) -> dict[str, Any]:
        return {"seen": sightings(), "readable": parents_are_readable(), "given": "SCORER_TOKEN" in os.environ}
