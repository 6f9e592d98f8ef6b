"""What a step's seconds were spent on: idle time of learner and engines, the learner's MFU, tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl.hardware import peak_flops
from rl.plan import Plan
from rollout.engine import EngineStats
from trainer.pack import Minibatch

PARTS = ("canary", "rollout", "handover", "learn", "sync")
"""Laps of a step that are neither an evaluation nor a checkpoint."""


class Utilization:
    """Compares the engines' counters from step to step. Seconds are those of the driver's clock."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._before: Sequence[EngineStats] = ()

    def begin(self, stats: Sequence[EngineStats]) -> None:
        """The engines' counters at the moment from which the next step counts, evaluations left out."""
        self._before = stats

    def metrics(
        self, seconds: Mapping[str, float], minibatches: Sequence[Minibatch], stats: Sequence[EngineStats]
    ) -> dict[str, float]:
        """``seconds`` of the laps in ``PARTS`` since :meth:`begin`, and the counters now."""
        total = sum(seconds.get(part, 0.0) for part in PARTS)
        pairs = list(zip(self._before, stats, strict=True))
        busy = [now.busy_s - before.busy_s for before, now in pairs]
        generated = [now.num_generated_tokens - before.num_generated_tokens for before, now in pairs]
        self._before = stats
        return {
            "time/learner_idle_s": total - seconds["learn"] - seconds["sync"],
            "time/engines_idle_s": max(0.0, total - sum(busy) / max(1, len(busy))),
            "speed/engines_tokens_per_s": sum(t / s for t, s in zip(generated, busy, strict=True) if s > 0),
            "tokens/trained": float(sum(minibatch.num_tokens for minibatch in minibatches)),
            **self._arithmetic(seconds["learn"], minibatches),
        }

    def _arithmetic(self, learn_s: float, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        flops = sum(
            self.plan.costs.training_flops(length)
            for minibatch in minibatches
            for length in sequence_lengths(minibatch)
        )
        each = flops / max(learn_s, 1e-9) / self.plan.recipe.learner.ranks
        peak = peak_flops(self.plan.hardware.gpu_name)
        return {"speed/learner_tflops": each / 1e12} | ({"speed/learner_mfu": each / peak} if peak else {})


def sequence_lengths(minibatch: Minibatch) -> list[int]:
    """Tokens of every sequence that an optimizer step trains on, over all ranks; padding micro-batches have none."""
    return [
        int(length)
        for rank in minibatch.ranks
        for micro in rank
        if micro.sampled.any()
        for length in micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]
    ]
