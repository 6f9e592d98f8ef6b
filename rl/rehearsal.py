"""`python -m rl.train RECIPE --check`: what can be known of a run before anything of it starts.

By then the recipe has been read, the model's config.json and the data. Here the longest prompt is measured with the
model's tokenizer, and every reward is imported and called, in a process of its own as in a run, with the reply ``0`` to
prompts of its domain: one that cannot score that most likely cannot score anything.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from model.tokenizer import save_byte_tokenizer
from rewards.check import scored
from rewards.protocol import JUDGED, Fault, part_name
from rewards.saved import sample_of
from rewards.worker import Surroundings
from rl.config import Domain, Recipe, RewardUse
from rl.data import RunData
from rl.environ import chosen_variables
from rl.errors import RecipeError
from rl.printable import printable
from rl.sample import Prompt, Sample
from rl.system import check_lengths, lengths_of, open_conversation

ENOUGH_S = 5.0
"""Seconds after which no further prompt is tried with a reward."""
_REPLY = "0"


def rehearse(recipe: Recipe, data: RunData) -> int:
    """Prints it; the exit status: 1 where a reward could not score a prompt.

    Raises RecipeError and DataError as a run would.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(recipe.model.path or folder)
        if recipe.model.path is None:
            save_byte_tokenizer(path)
        lengths = lengths_of(open_conversation(recipe, (), path), data.prompts)
    check_lengths(recipe, lengths)
    surroundings = Surroundings(directory=os.getcwd(), env=chosen_variables(recipe.reward_env), seed=recipe.seed)
    failed = 0
    for name, domain in recipe.domains.items():
        members = [prompt for prompt in data.training if prompt.domain == name]
        longest = max((lengths[prompt.id] for prompt in members), default=0)
        held_out = sum(prompt.domain == name for prompt in data.evaluation)
        print(
            f"{name}: {len(members):,} prompts and {held_out:,} for evaluation; the longest has {longest:,} of the "
            f"{recipe.model.max_context:,} tokens of model.max_context"
        )
        for use in domain.rewards:
            sentence, fails = _of_reward(domain, use, members, surroundings)
            print(printable(f"  {part_name(use)}: {sentence}"), flush=True)
            failed += fails
    print("\nnothing was started; " + (f"rewards that failed: {failed}" if failed else "this much is in order"))
    return int(failed > 0)


def _of_reward(
    domain: Domain, use: RewardUse, prompts: Sequence[Prompt], surroundings: Surroundings
) -> tuple[str, bool]:
    """What is to be said of it, and whether it failed."""
    if use.use in JUDGED:
        return "asks the judge; not tried", False
    began, values, reasons = time.monotonic(), Counter[float](), Counter[str]()
    replied = prompts if domain.environment is None else ()
    samples = (sample_of(prompt, f"</think>{_REPLY}" if prompt.thinking else _REPLY) for prompt in replied)
    try:
        for outcome in scored(replace(use, retries=0), _for_a_while(samples, began), surroundings):
            if isinstance(outcome, Fault):
                reasons[outcome.reason] += 1
            else:
                values[outcome.value] += 1
    except RecipeError as error:
        return f"fails: {error}", True
    if domain.environment is not None:
        return "is there; not tried, as it scores what an environment leaves", False
    tried = values.total() + reasons.total()
    of_all = f"tried on {tried:,} of {len(prompts):,} prompts"
    if reasons:
        ((reason, _),) = reasons.most_common(1)
        return f"fails for {reasons.total():,}, {of_all}: {reason}", True
    ((value, _),) = values.most_common(1)
    return f"{value:g} for the reply {_REPLY}, {of_all}", False


def _for_a_while(items: Iterator[Sample], began: float) -> Iterator[Sample]:
    """At least one of them, then as many as there is time for."""
    for item in items:
        yield item
        if time.monotonic() - began > ENOUGH_S:
            return
