"""The scorers of the reasoning_gym library, for prompts that come from its tasks."""

from __future__ import annotations

from collections.abc import Mapping

from rewards.protocol import Reward
from rewards.reply import answer
from rl.procedural import scorer
from rl.sample import Sample


def reasoning_gym_score(sample: Sample) -> Reward:
    """What the task's own ``score_answer`` gives the answer (after ``</think>``, stripped), from 0 to 1.

    ``prompt.answer`` is the library's entry ``{question, answer, metadata}``; its metadata name the task. Many tasks
    give partial credit, and a few give 0.01 for any answer. A reply without an answer is scored as the library scores
    none. A few scorers raise on an answer that they cannot read: it counts as 0, and the part ``unreadable`` is 1.
    Raises ValueError for a prompt that does not come from the library.

    Some tasks evaluate the answer as Python or through sympy (binary_matrix, countdown, n_queens, puzzle24,
    spiral_matrix, string_insertion, the polynomial and integration tasks), with the rights of the worker process.
    """
    entry = sample.prompt.answer
    if not isinstance(entry, Mapping) or "source_dataset" not in entry.get("metadata", {}):
        raise ValueError(f"prompt {sample.prompt.id} does not come from reasoning_gym: its answer is no entry of it")
    entry = dict(entry)
    score = scorer(entry["metadata"]["source_dataset"])
    try:
        return Reward(float(score(answer(sample) or None, entry)), {"unreadable": 0.0})
    except Exception:
        score(entry["answer"], entry)  # raises again if the entry is at fault, and not the reply
        return Reward(0.0, {"unreadable": 1.0})
