"""The recipe behind `make quickstart` keeps what makes it a run of the whole system, all four stabilisers at work."""

from __future__ import annotations

from model import ModelConfig
from rl.choices import EngineKind
from rl.config import Domain, Recipe
from rl.initial_model import initial_config
from rl.recipe import load_recipe
from tests.rl.tiny_runs import REPOSITORY

SHORTEST = 20
"""Tokens of the shortest sequences, prompt and reply, that the recipe's task has."""


def quickstart() -> tuple[Recipe, Domain, ModelConfig]:
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.yaml")
    (domain,) = recipe.domains.values()
    assert recipe.model.init is not None
    config = initial_config(recipe.model.init, recipe.model.max_context)
    assert isinstance(config, ModelConfig)
    return recipe, domain, config


def test_its_model_is_sparse_in_attention_and_experts():
    _, _, config = quickstart()
    assert config.n_routed_experts >= 8 and len(config.moe_layers) >= 2
    assert config.num_experts_per_tok < config.n_routed_experts
    assert config.index_topk <= 0.6 * SHORTEST


def test_its_run_needs_every_stabiliser():
    recipe, domain, _ = quickstart()
    assert domain.group_size >= 8 and domain.kl_beta > 0
    assert recipe.learner.minibatches >= 2 and recipe.rollout.max_staleness >= 1
    assert recipe.objective.off_policy_delta is not None
    assert recipe.objective.keep_routing and recipe.objective.keep_sampling_mask and recipe.sampling.top_p < 1


def test_it_runs_where_there_is_no_gpu_and_measures_what_it_never_trained_on():
    recipe, domain, _ = quickstart()
    assert recipe.rollout.engine == EngineKind.torch and recipe.model.dtype == "float32"
    assert recipe.supervised.steps > 0 and recipe.supervised.demonstrations is not None
    assert recipe.evaluation.num_prompts >= 100
    assert domain.prompts["reasoning_gym"] == "spell_backward"
