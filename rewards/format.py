"""Whether a reply has the form that the chat format promises."""

from __future__ import annotations

import re

from rewards.reply import THINK_END, THINK_START, answer, text
from rl.sample import Sample, Status

_SPECIAL = re.compile(rf"<｜[^<>｜]*｜>|<\|[^<>|]*\|>|{THINK_START}")


def follows_format(sample: Sample) -> float:
    """1 if all of these hold, else 0:

    * the policy ended the reply itself (it was not cut off);
    * ``</think>`` occurs exactly once if the prompt thinks, and not at all if it does not;
    * the answer is not empty;
    * apart from the final stop token, the reply holds no other special token (``<｜...｜>``, ``<|...|>``, ``<think>``).

    A reply that thinks may begin with ``<think>``: some chat templates, such as Qwen3's, leave that to the model.
    """
    reply = text(sample)
    if sample.prompt.thinking:
        reply = reply.removeprefix(THINK_START)
    holds = (
        sample.status is Status.FINISHED
        and reply.count(THINK_END) == int(sample.prompt.thinking)
        and answer(sample) != ""
        and _SPECIAL.search(reply) is None
    )
    return float(holds)
