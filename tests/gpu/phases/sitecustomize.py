"""Where a step of a vLLM engine, or an update of its weights, spends its time.

    PYTHONPATH=tests/gpu/phases PYTHON_PHASES=runs/phases python -m tests.gpu.measure throughput --passes 4

Python imports this module first, of itself, where its folder is on PYTHONPATH.

Times methods of vLLM's and ours in every process, as soon as their modules are there, and writes to PYTHON_PHASES.PID
how often each was called, and the mean and median of its milliseconds after the first quarter of the calls. What one
calls counts to the other as well. What a GPU does meanwhile is not in it, but for what Event.synchronize waits. The
last calls are in PYTHON_PHASES.PID.calls, with their beginnings in seconds of the machine's clock, and their
milliseconds: `sort -n` of all these files is what the processes of a run did, in order.

The variable is named so that Ray's processes have it too (`rl.environ`).
"""

from __future__ import annotations

import functools
import inspect
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

METHODS = {
    "vllm.v1.engine.core": ("EngineCore.step_with_batch_queue",),
    "vllm.v1.executor.uniproc_executor": ("UniProcExecutor.execute_model", "UniProcExecutor.sample_tokens"),
    "vllm.v1.core.sched.scheduler": ("Scheduler.schedule", "Scheduler.update_from_output"),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner.sample", "GPUModelRunner.prepare_inputs"),
    "vllm.v1.worker.gpu.sample.sampler": ("Sampler.__call__", "Sampler.sample"),
    "vllm.v1.worker.gpu.async_utils": ("AsyncOutput.__init__", "AsyncOutput.get_output"),
    "vllm.v1.serial_utils": ("MsgpackEncoder.encode_into", "MsgpackDecoder.decode"),
    "vllm.v1.engine.output_processor": ("OutputProcessor.process_outputs",),
    "rollout.vllm_recording": ("RecordingScheduler.schedule", "RecordingScheduler.update_from_output", "Seen.step"),
    "rollout.vllm_step": (
        "StepOutput.__init__",
        "StepOutput.get_output",
        "RowRecorder.prepare_output",
        "PendingRows.enqueue_cpu_copy",
    ),
    "rollout.step_records": ("StepRecords.add", "StepRecords.read"),
    "rollout.held_weights": (
        "HeldWeights.write",
        "HeldWeights.take_written",
        "HeldWeights.answer",
        "HeldWeights.absorb",
        "HeldWeights.is_live",
        "HeldWeights._read",
        "Verifier.checksums",
    ),
    "rollout.weight_receiver": ("WeightReceiver.take",),
    "rollout.direct_update": ("DirectUpdates.begin", "DirectUpdates.taken"),
    "rollout.vllm_worker": (
        "WeightReader.take_broadcast",
        "WeightReader.finish_update",
        "WeightReader.held_weights",
        "WeightReader.peak_memory_gb",
    ),
    "vllm.v1.worker.gpu_worker": ("Worker.start_weight_update", "Worker.update_weights", "Worker.finish_weight_update"),
    "rollout.vllm_engine": (
        "VllmEngineActor.take_broadcast",
        "VllmEngineActor.begin_update",
        "VllmEngineActor.receive",
        "VllmEngineActor.commit",
        "VllmEngineActor._make_way",
        "VllmEngineActor._of_workers",
        "VllmEngineActor._relabel",
        "VllmEngineActor._put_into_effect",
    ),
    "rl.sync": ("Publisher.publish", "Broadcast._connected", "Broadcast.update", "SharedMemory.update"),
    "rollout.pool": ("EnginePool.take_broadcast", "EnginePool.receive", "EnginePool.commit"),
    "trainer.learner": ("Learner.send_weights", "Learner.offer_weights"),
    "trainer.rank": ("LearnerRank.send_weights", "LearnerRank.offer_weights"),
    "trainer.sender": ("WeightSender.offer", "WeightSender.send"),
    "model.transport": (
        "StagingBuffers.pack",
        "BroadcastGroup.send",
        "BroadcastGroup._broadcast",
        "BroadcastGroup._description",
        "BroadcastGroup._forget_last_round",
        "BroadcastGroup._take",
        "BroadcastGroup._wait",
        "BroadcastGroup._publish",
    ),
    "model.checksum": ("Checksums.add", "Checksums.result", "LiveSums.sums"),
    "kernels.checksum_triton": ("DeviceTable.sums",),
    "torch.cuda.streams": ("Event.synchronize",),
}
LOOK_S, STARTING_S, WRITE_S = 0.005, 300.0, 2.0
LAST_CALLS = 4000


class Phases:
    def __init__(self, out: str) -> None:
        self._out = Path(f"{out}.{os.getpid()}")
        self._seconds: dict[str, list[float]] = {}
        self._calls: deque[tuple[float, float, str]] = deque(maxlen=LAST_CALLS)
        self._left = {(module, name) for module, names in METHODS.items() for name in names}

    def watch(self) -> None:
        """Engines keep methods of theirs from their start on, so they are replaced before."""
        began, written = time.monotonic(), 0.0
        while True:
            starting = bool(self._left) and time.monotonic() - began < STARTING_S
            time.sleep(LOOK_S if starting else WRITE_S)
            for module, name in list(self._left):
                of, _, method = name.partition(".")
                owner = getattr(sys.modules.get(module), of, None)
                if owner is not None and method in vars(owner):
                    self._left.discard((module, name))
                    self._time(owner, method)
            if self._seconds and time.monotonic() - written > WRITE_S:
                written = time.monotonic()
                self._write()

    def _time(self, owner: type, method: str) -> None:
        inner, name = vars(owner)[method], f"{owner.__name__}.{method}"
        seconds = self._seconds.setdefault(name, [])

        def note(began: float) -> None:
            took = time.perf_counter() - began
            seconds.append(took)
            self._calls.append((began, took, name))

        @functools.wraps(inner)  # Ray looks at what a method takes
        def timed(*args: Any, **others: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **others)
            finally:
                note(began)

        @functools.wraps(inner)
        async def awaited(*args: Any, **others: Any) -> Any:
            began = time.perf_counter()
            try:
                return await inner(*args, **others)
            finally:
                note(began)

        setattr(owner, method, awaited if inspect.iscoroutinefunction(inner) else timed)

    def _write(self) -> None:
        lines = []
        for name, seconds in self._seconds.items():
            if settled := [1e3 * s for s in seconds[len(seconds) // 4 :]]:
                mean, median = statistics.fmean(settled), statistics.median(settled)
                lines.append(f"{name:40} {len(seconds):7} calls  mean {mean:9.4f} ms  median {median:9.4f} ms\n")
        self._put(self._out, lines)
        calls = sorted(self._calls.copy())
        lines = [f"{began:.6f} {1e3 * s:9.3f} ms  {os.getpid()}  {name}\n" for began, s, name in calls]
        self._put(self._out.with_name(f"{self._out.name}.calls"), lines)

    def _put(self, out: Path, lines: list[str]) -> None:
        coming = out.with_name(f"{out.name}.coming")
        coming.write_text("".join(lines))  # whoever is killed amid this leaves the last one
        coming.replace(out)


if out := os.environ.get("PYTHON_PHASES"):
    threading.Thread(target=Phases(out).watch, name="phases", daemon=True).start()
