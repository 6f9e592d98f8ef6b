"""Everything a run reads before it starts anything: prompts, those held out for evaluation, and demonstrations.

All of a user's mistakes in data surface here, before an actor is started or a directory is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl.config import Recipe
from rl.demonstrations import Demonstration, load_demonstrations
from rl.errors import RecipeError
from rl.prompts import PromptStream, load_split, question
from rl.sample import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a recipe's data sources hold."""

    stream: PromptStream
    training: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    demonstrations: tuple[Demonstration, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.training + self.evaluation


def load_data(recipe: Recipe) -> RunData:
    """Reads and checks every source of the recipe. Raises RecipeError or DataError naming the place."""
    training: dict[str, list[Prompt]] = {}
    evaluation: list[Prompt] = []
    for name, domain in recipe.domains.items():
        training[name], held_out = load_split(name, domain, recipe.evaluation.num_prompts, seed=recipe.seed)
        evaluation += held_out
    training = {name: _not_asked(name, members, evaluation) for name, members in training.items()}
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


def _not_asked(name: str, prompts: Sequence[Prompt], evaluation: Sequence[Prompt]) -> list[Prompt]:
    """Prompts whose question no domain holds out: one domain must not train on what another is evaluated on."""
    asked = {question(prompt) for prompt in evaluation}
    training = [prompt for prompt in prompts if question(prompt) not in asked]
    if prompts and not training:
        raise RecipeError(f"domains.{name}: every one of its prompts is held out for the evaluation of another domain")
    return training
