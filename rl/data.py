"""Everything a run reads before it starts anything: prompts, those held out for evaluation, and demonstrations.

All of a user's mistakes in data surface here, before an actor is started or a directory is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl.config import Recipe
from rl.demonstrations import Demonstration, load_demonstrations
from rl.prompts import PromptStream, load_split
from rl.sample import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a recipe's data sources hold."""

    stream: PromptStream
    training: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    demonstrations: tuple[Demonstration, ...]


def load_data(recipe: Recipe) -> RunData:
    """Reads and checks every source of the recipe. Raises RecipeError or DataError naming the place."""
    training: dict[str, list[Prompt]] = {}
    evaluation: list[Prompt] = []
    for name, domain in recipe.domains.items():
        training[name], held_out = load_split(name, domain, recipe.evaluation.num_prompts, seed=recipe.seed)
        evaluation += held_out
    weights = {name: domain.weight for name, domain in recipe.domains.items()}
    prompts = tuple(prompt for members in training.values() for prompt in members)
    demonstrations = (
        load_demonstrations(recipe.supervised.demonstrations, prompts, seed=recipe.seed, held_out=evaluation)
        if recipe.supervised.steps
        else []
    )
    return RunData(
        stream=PromptStream(training, weights, seed=recipe.seed),
        training=prompts,
        evaluation=tuple(evaluation),
        demonstrations=tuple(demonstrations),
    )
