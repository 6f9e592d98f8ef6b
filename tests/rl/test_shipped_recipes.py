"""Recipes that ship: all load, with what their first lines advise, and name rewards that exist."""

from __future__ import annotations

import re
import shlex

import pytest

from rewards.protocol import check_names, resolve
from rl.config import Domain, Recipe
from rl.recipe import load_recipe
from tests.rl.tiny_runs import REPOSITORY

DOMAINS = {
    *("math", "programming", "logic", "general_agent"),
    *("agentic_coding", "agentic_search", "general_qa", "mixed"),
}
COMMAND = re.compile(r"^#   python -m rl\.train (?P<path>\S+\.yaml)(?P<rest>.*)$", re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Every command in the first lines of a recipe, as its path and the overrides."""
    found = []
    for path in sorted((REPOSITORY / "recipes").glob("*.yaml")):
        for match in COMMAND.finditer(path.read_text()):
            words = [word for word in shlex.split(match["rest"], comments=True) if not word.startswith("--")]
            found.append((match["path"], words))
    return found


@pytest.mark.parametrize(("path", "overrides"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_what_a_recipe_advises_to_type_loads(path: str, overrides: list[str]):
    load_recipe(REPOSITORY / path, overrides)


def shipped(name: str) -> Recipe:
    return load_recipe(REPOSITORY / f"recipes/{name}.yaml")


def budget(recipe: Recipe, domain: Domain) -> int:
    """Tokens that one sample may have."""
    episode = domain.environment.max_tokens if domain.environment is not None else None
    return episode or recipe.sampling.max_tokens


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_every_kind_of_domain_has_a_recipe_with_and_without_thinking(name: str):
    """The same tasks, judged alike; what differs is thinking and the room for it."""
    thinking, direct = shipped(name), shipped(f"{name}_direct")
    assert direct.name == f"{name}_direct" and direct.domains.keys() == thinking.domains.keys()
    assert {f"recipes/{form}.yaml" for form in (name, f"{name}_direct")} <= {path for path, _ in commands()}
    assert direct.sampling.max_tokens < thinking.sampling.max_tokens
    for domain, settings in thinking.domains.items():
        without = direct.domains[domain]
        assert settings.thinking and not without.thinking
        assert [(use.use, use.weight) for use in without.rewards] == [(use.use, use.weight) for use in settings.rewards]
        assert (without.prompts, without.kl_beta) == (settings.prompts, settings.kl_beta)
        assert budget(direct, without) < budget(thinking, settings)


@pytest.mark.parametrize("form", ["", "_direct"])
@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_a_price_on_length_is_reached_within_the_budget(name: str, form: str):
    recipe = shipped(name + form)
    for domain in recipe.domains.values():
        for use in domain.rewards:
            if use.use == "length_penalty":
                assert 0 < use.args["target"] < use.args["limit"] <= budget(recipe, domain)


@pytest.mark.parametrize("name", sorted(DOMAINS | {f"{name}_direct" for name in DOMAINS}))
def test_rewards_are_those_of_the_report(name: str):
    """Rules decide on reasoning and agents, beside length and language; a rubric on general questions."""
    for domain, settings in shipped(name).domains.items():
        check_names(domain, settings)
        functions = [resolve(use) for use in settings.rewards if "rubric" not in use.use]
        parts = {function.name for function in functions}
        if domain == "general_qa":
            assert [use.use for use in settings.rewards] == ["rubric"]
        else:
            assert {"language_consistency", "length_penalty"} < parts
            assert (settings.environment is not None) == ("tool_protocol" in parts)
        assert (settings.kl_beta == 0) == (domain == "math")
