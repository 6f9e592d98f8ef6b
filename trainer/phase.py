"""The phases a learner goes through, and which parameters each of them trains."""

from __future__ import annotations

from enum import StrEnum

from model import LanguageModel
from rl.choices import IndexerTraining
from rl.config import Recipe
from trainer.deepspeed_engine import Optimization


class Phase(StrEnum):
    """Each phase starts from a model directory with a fresh optimizer."""

    INDEXER_WARMUP = "indexer_warmup"
    """Attention is dense and only the lightning indexer learns, to imitate it (paper Eq. 3)."""
    SUPERVISED = "supervised"
    """Next-token training on demonstrations."""
    REINFORCEMENT = "reinforcement"
    """GRPO."""


def trains_indexer(recipe: Recipe, phase: Phase) -> bool:
    """Whether the phase trains the indexer on its own KL loss, beside the policy or alone."""
    if phase == Phase.INDEXER_WARMUP:
        return True
    settings = recipe.supervised if phase == Phase.SUPERVISED else recipe.learner
    return settings.indexer == IndexerTraining.kl


def optimization(recipe: Recipe, phase: Phase) -> Optimization:
    """The optimizer settings of a phase; betas and clipping are the learner's in all of them."""
    learner, supervised = recipe.learner, recipe.supervised
    settings = learner if phase == Phase.REINFORCEMENT else supervised
    steps = {
        Phase.INDEXER_WARMUP: supervised.dense_warmup_steps,
        Phase.SUPERVISED: supervised.steps - supervised.dense_warmup_steps,
        Phase.REINFORCEMENT: recipe.steps * learner.minibatches,
    }
    return Optimization(
        lr=settings.lr,
        warmup_steps=settings.warmup_steps,
        decay_steps=steps[phase] if settings.lr_decay else None,
        weight_decay=settings.weight_decay,
        betas=(learner.betas[0], learner.betas[1]),
        grad_clip=learner.grad_clip,
    )


def freeze(model: LanguageModel, recipe: Recipe, phase: Phase) -> None:
    """Leaves exactly the parameters of the phase trainable.

    The policy's loss does not reach the indexer: its top-k is a hard choice. So without its own loss the indexer is
    frozen, which also spares its optimizer state.
    """
    with_indexer = trains_indexer(recipe, phase)
    for name, parameter in model.named_parameters():
        is_indexer = ".indexer." in name
        parameter.requires_grad_(with_indexer if is_indexer else phase != Phase.INDEXER_WARMUP)
