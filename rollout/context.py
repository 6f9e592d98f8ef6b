"""What becomes of an episode whose context fills up (DeepSeek-V3.2, section 4.4): summary, or discarded history.

A strategy starts a new sequence from the prompt and some of the rounds so far; a round is one reply with the results of
its tools. Discarding cuts the tokens and encodes nothing again; the summary's request is appended to the tokens that
there are, without their reasoning, and what it brings forth is encoded into the task's last message.
"""

from __future__ import annotations

import math

from rl.choices import ContextStrategy
from rl.sample import NDArray
from rollout.token_stream import TokenStream

DISCARDED_SHARE = 0.75

SUMMARY_REQUEST = (
    "The context is nearly full, so this conversation will be restarted from the task and a summary of yours. Write "
    "that summary now, without calling a tool: what you have found out, with the facts and figures themselves, what "
    "you tried without success, and what remains to be done."
)
SUMMARY_HEADING = "\n\nYou have worked on this before, until the context was full. Your summary of that work:\n"


def rounds_of(stream: TokenStream) -> list[NDArray]:
    """The tokens behind the prompt, cut in front of every reply."""
    begins = [span.begin for span in stream.replies]
    return [stream.token_ids[begin:end] for begin, end in zip(begins, [*begins[1:], len(stream)], strict=True)]


def num_dropped(strategy: ContextStrategy, num_rounds: int) -> int:
    """How many of the rounds, the oldest, a discarding strategy drops."""
    return num_rounds if strategy == ContextStrategy.discard_all else math.ceil(DISCARDED_SHARE * num_rounds)
