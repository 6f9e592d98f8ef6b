"""Recipes that ship: all load, with what their first lines advise, and name rewards that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rewards.protocol import check_names, resolve
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
    recipe = load_recipe(REPOSITORY / path, overrides)
    thoughtless = [one for one in overrides if one.endswith(".thinking=false")]
    assert sum(not domain.thinking for domain in recipe.domains.values()) == len(thoughtless)


def test_every_kind_of_domain_has_a_recipe_with_and_without_thinking():
    named = [(Path(path).stem, any("thinking=false" in one for one in overrides)) for path, overrides in commands()]
    assert {(name, thoughtless) for name in DOMAINS for thoughtless in (True, False)} <= set(named)


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_rewards_are_those_of_the_report(name: str):
    """Rules decide on reasoning and agents, beside length and language; a rubric on general questions."""
    for domain, settings in load_recipe(REPOSITORY / f"recipes/{name}.yaml").domains.items():
        check_names(domain, settings)
        functions = [resolve(use) for use in settings.rewards if "rubric" not in use.use]
        parts = {function.name for function in functions}
        if domain == "general_qa":
            assert [use.use for use in settings.rewards] == ["rubric"]
        else:
            assert {"language_consistency", "length_penalty"} < parts
            assert (settings.environment is not None) == ("tool_protocol" in parts)
        assert (settings.kl_beta == 0) == (domain == "math")
