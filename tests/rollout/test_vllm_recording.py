"""What our scheduler makes of steps, beside vLLM's own of the same steps. vLLM's parts are real, the model is not."""

# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.aux_output_connector import worker as connectors
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.distributed.aux_output_connector.routed_experts import RoutedExpertsBuffer
from vllm.distributed.aux_output_connector.store import BackgroundBlockObjectStore, BlockObjectStore
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

from kernels.reference.draws import DRAW_FIELDS, draws_in
from rollout.drawn import Drawn
from rollout.engine_step import Step
from rollout.step_records import StepRecords
from rollout.vllm_recording import RecordingScheduler, key_of
from rollout.vllm_step import PendingRows

BLOCK, LAYERS, TOP_K, VOCAB = 8, 3, 2, 50
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": LAYERS, **SHAPE}
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB, "max_position_embeddings": 512}))
    return path


def make_scheduler(kind: type, path: Path, num_blocks: int) -> Any:
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        model_config=ModelConfig(model=str(path), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=24,
            max_model_len=256,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=True,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
    )
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    manager = StructuredOutputManager(config)
    return kind(config, cache, structured_output_manager=manager, block_size=BLOCK, log_stats=True)


def drawn(tokens: list[int], weights: int, purpose: int) -> np.random.Generator:
    """Of a model with these weights, after these tokens."""
    return np.random.default_rng([purpose, weights, *tokens])


class Model:
    """What a worker computes: everything follows from the weights and the tokens up to a position."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.weights = scheduler, 0
        self.tokens: dict[str, list[int]] = {}
        self.connector = None
        if scheduler.aux_output_connector is not None:
            self.connector = their_connector(8 * 1024)

    def __call__(self, planned: Any) -> ModelRunnerOutput:
        names, counts = list(planned.num_scheduled_tokens), list(planned.num_scheduled_tokens.values())
        if self.connector is not None:
            self.connector.begin_step(planned.aux_output_connector_metadata)
        starts = {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
        cached = planned.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        rows, sampled, logprobs, kept = [], [], [], []
        for name, count in zip(names, counts, strict=True):
            request = self.scheduler.requests[name]
            if name not in cached.req_ids or name in cached.resumed_req_ids:
                self.tokens[name] = list(request.all_token_ids)
            tokens, end = self.tokens[name], starts[name] + count
            for at in range(starts[name], end):
                rows.append(drawn(tokens[: at + 1], self.weights, 1).integers(0, 200, (LAYERS, TOP_K)))
            ids, token, logprob = sampled_by(tokens[:end], self.weights)
            whole = end == len(tokens)
            if whole:
                tokens.append(token)
            sampled.append([token] if whole else [])
            logprobs.append(logprob)
            kept.append(ids if whole else ids[:0])
        output = ModelRunnerOutput(
            req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
        )
        edges = np.concatenate([[0], np.cumsum(counts)])
        first = np.array([starts[name] for name in names])
        taken = torch.tensor(np.array(rows)).to(torch.uint8)
        if self.connector is None:
            output.aux_output_connector_output = ours(sampled, logprobs, kept, first, edges, taken)
            return output
        chosen = torch.tensor([[s[0] if s else -1] for s in sampled], dtype=torch.int32)
        output.logprobs = LogprobsTensors(chosen, torch.tensor(logprobs).float()[:, None], chosen[:, 0]).tolists()
        output.sampling_masks = their_masks(kept)
        output.aux_output_connector_output = self._recorded(names, first, edges, taken, sampled)
        return output

    def _recorded(self, names: list[str], starts: Any, edges: Any, rows: torch.Tensor, sampled: list[list[int]]) -> Any:
        pending: Any = connectors.PendingAuxOutput(self.connector, names, starts, edges, rows)
        pending.enqueue_cpu_copy(np.array(list(map(len, sampled))), np.zeros(len(names), int))
        assert self.connector is not None
        self.connector._pending_outputs.append(pending)
        for name in names:
            self.connector._requests[name].pending_outputs += 1
        return pending.process_output()


def their_masks(kept: list[np.ndarray]) -> Any:
    ids = torch.tensor(np.stack([np.pad(k, (0, 5 - len(k))) for k in kept]), dtype=torch.int32)
    counts = torch.tensor([len(k) for k in kept], dtype=torch.int32)
    masks = SamplingMaskTensors(ids, torch.zeros(len(kept), 7, dtype=torch.uint8), counts, VOCAB)
    return masks.tolists(np.array([len(k) > 0 for k in kept]))


def ours(sampled: list[list[int]], logprobs: list[Any], kept: list[np.ndarray], *rows: Any) -> Drawn:
    """In a table with room for three ids a row, of sets of up to five."""
    table = np.full(1 + len(sampled) * (DRAW_FIELDS + 3), -9, np.int32)
    fields, room = draws_in(table, len(sampled))
    table[0] = 0
    for row, tokens, logprob, ids in zip(fields[::-1], sampled[::-1], logprobs[::-1], kept[::-1], strict=True):
        there = 0 < len(ids) <= 3
        row[:] = [tokens[0] if tokens else -9, len(tokens), 0, len(ids), table[0] if there else -1]
        row[2:3] = np.array([logprob], np.float32).view(np.int32)
        if there:
            room[table[0] : table[0] + len(ids)] = ids
            table[0] += len(ids)
    pending = PendingRows(*rows)
    pending.enqueue_cpu_copy()
    return Drawn.of_table(table, len(sampled), VOCAB, pending.process_output(), kept.__getitem__)


def their_connector(room: int) -> Any:
    connector = connectors.AuxOutputWorkerConnector.__new__(connectors.AuxOutputWorkerConnector)
    connector._requests, connector._pending_outputs, connector._step_metadata = {}, [], None
    connector._generation, connector._lock, connector._max_concurrent_batches = 0, threading.Lock(), 2
    size = BLOCK * LAYERS * TOP_K
    store = BlockObjectStore(max_bytes=room * size, object_nbytes=size)
    connector._store = BackgroundBlockObjectStore(store, max_pending_batches=64)
    connector._buffer = RoutedExpertsBuffer(np.dtype(np.uint8), (LAYERS, TOP_K), BLOCK, 8, 24, 2)
    return connector


class Engine:
    """vLLM's scheduler and front end around the model, two steps under way at once as in a real engine."""

    def __init__(self, kind: type, path: Path, num_blocks: int) -> None:
        self.scheduler = make_scheduler(kind, path, num_blocks)
        self.scheduler.return_sampling_mask = True
        if kind is AsyncScheduler:
            self.scheduler.aux_output_connector = AuxOutputSchedulerConnector()
        self.model, self.front = Model(self.scheduler), OutputProcessor(None, log_stats=True)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self.records, self.under_way, self.outputs = StepRecords(1 << 20), [], {}
        self.queues: dict[str, RequestOutputCollector] = {}
        self.prompts: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], num_tokens: int) -> None:
        sampling = SamplingParams(
            top_p=0.9, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=0, flat_logprobs=True
        )
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        asked = EngineCoreRequest(f"{name}-12345678", prompt, None, sampling, None, 0.0, None, None, None)
        asked.external_req_id = name
        self.queues[name] = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, asked.request_id)
        self.prompts[name] = prompt
        self.front.add_request(asked, None, None, 0, self.queues[name])
        self.records.open(key_of(name), np.array(prompt))
        self.scheduler.add_request(Request.from_engine_core_request(asked, self.hasher))

    def abort(self, name: str) -> None:
        ids = self.front.abort_requests([name], internal=False)
        self.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        self.collect()

    def update(self) -> None:
        """New weights between two steps, as `pause_generation(mode="keep", clear_cache=True)` lets them in."""
        while self.under_way:
            self.finish_step()
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.model.weights += 1

    def step(self) -> None:
        planned = self.scheduler.schedule()
        if planned.total_num_scheduled_tokens:
            self.under_way.append((planned, self.model(planned)))
        if len(self.under_way) == 2 or not planned.total_num_scheduled_tokens:
            self.finish_step()

    def finish_step(self) -> None:
        if not self.under_way:
            return
        made = self.scheduler.update_from_output(*self.under_way.pop(0)).get(0)
        if made is None:
            return
        sent = self.decoder.decode([bytes(part) for part in self.encoder.encode(made)])
        self.front.process_outputs(sent.outputs, 0.0, None)
        if (stats := sent.scheduler_stats) is not None and stats.kv_connector_stats is not None:
            self.records.add(Step.of_plain(stats.kv_connector_stats))
        self.collect()

    def collect(self) -> None:
        for name, queue in self.queues.items():
            if (found := queue.get_nowait()) is not None:
                self.outputs[name] = found.outputs[0], self._record(name, found.outputs[0])

    def _record(self, name: str, output: Any) -> Any:
        return self.records.read(key_of(name), len(output.token_ids), width=LAYERS * TOP_K)


def cache_of(engine: Engine) -> tuple[Any, ...]:
    """Who holds which blocks of vLLM's cache, what they are known by, and which are free."""
    manager = engine.scheduler.kv_cache_manager
    held = {name: manager.get_block_ids(name) for name in engine.scheduler.requests}
    known = [(block.block_hash, block.ref_cnt) for block in manager.block_pool.blocks]
    return held, known, [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]


@pytest.fixture(autouse=True)
def theirs() -> None:
    init_none_hash(sha256)


@pytest.mark.parametrize("num_blocks", [200, 24])
@pytest.mark.parametrize("seed", range(6))
def test_requests_are_recorded_as_vllm_records_them(model_dir: Path, num_blocks: int, seed: int):
    """With groups of one prompt, prompts in chunks, too few blocks for all, aborts and new weights in between."""
    engines = [Engine(AsyncScheduler, model_dir, num_blocks), Engine(RecordingScheduler, model_dir, num_blocks)]
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, VOCAB, int(generator.integers(3, 40))).tolist() for _ in range(4)]
    prompts.append(prompts[0] + generator.integers(0, VOCAB, 20).tolist())
    waiting = [(f"{n}.r", prompts[int(generator.integers(5))], int(generator.integers(1, 30))) for n in range(24)]
    names = [name for name, _, _ in waiting]
    for at in range(600):
        running = [name for name in engines[0].queues if name not in engines[0].outputs]
        aborted = running[0] if running and generator.random() < 0.03 else None
        for engine in engines:
            if waiting and at % 3 == 0:
                engine.add(*waiting[0])
            if at in (40, 75):
                engine.update()
            if aborted is not None:
                engine.abort(aborted)
            engine.step()
        if waiting and at % 3 == 0:
            waiting.pop(0)
        assert cache_of(engines[1]) == cache_of(engines[0])
    reference, ours = engines
    assert ours.scheduler.quick_slots.num_spared > 100
    assert sorted(reference.outputs) == sorted(ours.outputs) == sorted(names)
    aborted_early = 0
    for name in names:
        (theirs, _), (output, record) = reference.outputs[name], ours.outputs[name]
        assert output.token_ids == theirs.token_ids == record.token_ids.tolist()
        if not theirs.token_ids:
            aborted_early += 1
            continue
        assert record.logprobs.tolist() == list(np.array(theirs.logprobs.logprobs, np.float32))
        sets = [record.kept.ids[a:b].tolist() for a, b in itertools.pairwise(record.kept.offsets)]
        assert sets == theirs.sampling_mask.token_ids
        rows = theirs.routed_experts.reshape(len(theirs.routed_experts), -1)
        assert record.recorded.tolist() == [True] * len(rows) + [False]
        np.testing.assert_array_equal(record.rows[:-1], rows)
    assert aborted_early < 4


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_new_weights_overtook_are_left_out(model_dir: Path, seed: int):
    """The cache is cleared while two steps are under way: their tokens are thrown away, and computed again."""
    engine, generator = Engine(RecordingScheduler, model_dir, 200), np.random.default_rng(seed)
    prompts = {f"{n}.r": generator.integers(0, VOCAB, int(generator.integers(3, 60))).tolist() for n in range(12)}
    blocks, cached = engine.scheduler.kv_cache_manager.block_pool.blocks, 0
    for name, prompt in prompts.items():
        engine.add(name, prompt, 12)
    for at in range(300):
        if at in (2, 5, 9, 14):
            cached += sum(block.block_hash is not None for block in blocks)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            assert engine.scheduler.kv_cache_manager.block_pool.blocks is blocks
            assert all(block.block_hash is None and block.block_hash_num_tokens is None for block in blocks)
            engine.model.weights += 1
        engine.step()
    assert engine.outputs.keys() == prompts.keys() and cached
    for name, prompt in prompts.items():
        output, record = engine.outputs[name]
        assert record.token_ids.tolist() == output.token_ids
        assert record.recorded.tolist() == [True] * (len(record.recorded) - 1) + [False]
        sequence, last = prompt + output.token_ids, 0
        for at in range(len(prompt), len(sequence)):
            (weights,) = (
                w for w in range(last, 5) if logprob_of(sequence[:at], w) == record.logprobs[at - len(prompt)]
            )
            last = weights
            for fed in range(0 if at == len(prompt) else at - 1, at):
                row = drawn(sequence[: fed + 1], weights, 1).integers(0, 200, (LAYERS, TOP_K))
                assert record.rows[fed].tolist() == row.reshape(-1).tolist(), (name, fed, weights)


def logprob_of(tokens: list[int], weights: int) -> np.float32:
    return sampled_by(tokens, weights)[2]


def sampled_by(tokens: list[int], weights: int) -> tuple[np.ndarray, int, np.float32]:
    """Kept ids, the token and its log-probability."""
    generator = drawn(tokens, weights, 2)
    ids = np.sort(generator.choice(VOCAB, int(generator.integers(1, 6)), replace=False))
    return ids, int(generator.choice(ids)), np.float32(-generator.random())
