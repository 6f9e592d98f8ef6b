"""What vLLM reports of its own work, step by step. Importing this module needs vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger  # pyright: ignore[reportMissingImports]

from rollout.engine_step import Step
from rollout.step_records import StepRecords


class StepCounters(PrometheusStatLogger):
    """Counters since the engine started, its load after the last step, and what the steps recorded.

    Stands where vLLM would put its logger for Prometheus, which takes every token's latency down for nobody to read.
    """

    def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
        cache = vllm_config.cache_config
        self.records = StepRecords((cache.num_gpu_blocks or 0) * cache.block_size)
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
            if scheduler_stats.kv_connector_stats is not None:  # where `rollout.vllm_recording` puts them
                self.records.add(Step.of_plain(scheduler_stats.kv_connector_stats))
        if iteration_stats is not None:
            self.num_steps += 1
            self.num_generated_tokens += iteration_stats.num_generation_tokens
            self.num_prefilled_tokens += iteration_stats.prompt_token_stats.computed

    def log_engine_initialized(self) -> None:
        pass

    def record_admission_rejection(self, reason: str) -> None:
        pass

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        pass
