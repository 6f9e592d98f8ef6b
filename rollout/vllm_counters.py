"""What vLLM reports of its own work, step by step. Importing this module needs vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase  # pyright: ignore[reportMissingImports]


class StepCounters(StatLoggerBase):
    """Counters since the engine started, and its load after the last step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.num_generated_tokens = 0
        self.num_prefilled_tokens = 0
        self.num_steps = 0
        self.num_active = 0
        self.num_waiting = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.num_active = scheduler_stats.num_running_reqs
            self.num_waiting = scheduler_stats.num_waiting_reqs
        if iteration_stats is not None:
            self.num_steps += 1
            self.num_generated_tokens += iteration_stats.num_generation_tokens
            self.num_prefilled_tokens += iteration_stats.prompt_token_stats.computed

    def log_engine_initialized(self) -> None:
        pass
