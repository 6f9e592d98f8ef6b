"""Whether tools are called in the form that the chat format asks for."""

from __future__ import annotations

import re

from rewards.protocol import Reward
from rewards.reply import answer
from rl.sample import Sample

_FRAGMENT = re.compile(r"<[/]?｜DSML｜|<[/]?function_(?:calls|results)>")


def tool_protocol(sample: Sample) -> Reward:
    """-(malformed replies / replies), from -1 to 0.

    A reply is malformed when its block of calls cannot be read, and also when it calls nothing and still holds pieces
    of such a block. Calls that fail are no fault of the format: asking a tool for what it does not have is how one
    finds out. Parts: ``malformed`` (share of replies), ``failed`` (share of calls whose tool said that it could not),
    and ``calls`` (their number).
    """
    malformed = [bool(turn.malformed) for turn in sample.turns] or [False]
    malformed[-1] |= _FRAGMENT.search(answer(sample)) is not None and not (sample.turns and sample.turns[-1].calls)
    results = [result.failed for turn in sample.turns if not turn.malformed for result in turn.results]
    share = sum(malformed) / len(malformed)
    return Reward(
        0.0 - share,  # not -0.0
        {
            "malformed": share,
            "failed": sum(results) / len(results) if results else 0.0,
            "calls": float(sum(len(turn.calls) for turn in sample.turns)),
        },
    )
