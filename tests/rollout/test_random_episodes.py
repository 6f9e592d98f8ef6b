"""Every array of random episodes on the embedded engine against the learner's own forward."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.tokenizer import build_byte_tokenizer
from rl.config import Sampling
from rl.sample import Sample, ToolCall
from rollout.conversation import Conversation, MalformedReply, Reply
from rollout.engine import Completion, Request
from rollout.torch_engine import TorchEngine
from tests.rollout.worlds import STRATEGIES, World, episode
from tests.trainer.samples import with_another_indexer
from trainer.pack import WeightedSample, pack_step
from trainer.policy import PackedTokens, Policy


class Eager(Conversation):
    """Reads calls, broken calls and answers into any reply, and takes many tokens for its end.

    So a model with random weights has episodes of many short turns.
    """

    def __init__(self, stops: int) -> None:
        super().__init__(build_byte_tokenizer())
        self.stop_token_ids = (1, *range(264 - stops, 264))

    def parse_reply(self, text: str, *, thinking: bool) -> Reply:
        draw = hashlib.sha256(text.encode()).digest()
        if draw[0] < 40:
            raise MalformedReply("it is garbled", in_calls=True)
        calls = tuple(ToolCall(name=f"tool{n}") for n in range(draw[1] % 3 + 1)) if draw[0] < 220 else ()
        return Reply(reasoning=None, answer=text, calls=calls)


class Recorder:
    """The embedded engine, its weights renumbered between replies, with everything it was asked and answered."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.trace: list[tuple[Request, Completion]] = []

    async def __call__(self, request: Request) -> Completion:
        self.engine.commit(self.engine.version + 1)
        (completion,) = self.engine.generate([request])
        self.trace.append((request, completion))
        return completion


@pytest.mark.parametrize("seed", range(12))
def test_every_array_of_a_random_episode_is_the_learners(make_model, seed):
    rng = np.random.default_rng(seed)
    model = make_model(seed % 3)
    engine = TorchEngine(make_model(seed % 3), max_num_seqs=4, max_context=700, record_selections=True)
    recorder = Recorder(engine)
    conversation = Eager(stops=int(rng.integers(30, 120)))
    world = World(
        lambda call: f"<think> {rng.integers(1000)}" + "x" * int(rng.integers(20)), ["more", "!"], shown=False
    )
    sampling = Sampling(temperature=float(rng.uniform(0.7, 1.3)), top_p=float(rng.choice([0.8, 1.0])), max_tokens=60)
    sample = episode(
        world,
        recorder,
        conversation,
        thinking=bool(rng.integers(2)),
        max_context=700,
        sampling=sampling,
        seed=seed,
        max_turns=int(rng.integers(2, 14)),
        context=STRATEGIES[seed % 4],
        context_threshold=0.4,
    )
    assert sample.num_generated == sum(len(completion.token_ids) for _, completion in recorder.trace)
    assert len({(request.seed) for request, _ in recorder.trace}) == len(recorder.trace)
    remaining = list(recorder.trace)
    for sequence in sample.sequences:
        remaining = check_against_trace(sequence, remaining)
        check_against_learner(sequence, model, sampling.temperature)
    assert not remaining


def check_against_trace(sequence: Sample, trace: list[tuple[Request, Completion]]) -> list[tuple[Request, Completion]]:
    """Every request was a prefix of the sequence, and exactly the completions are sampled, in order."""
    expected = np.zeros(len(sequence), bool)
    versions = np.full(len(sequence), -1)
    while trace and len(trace[0][0].token_ids) < len(sequence):
        request, completion = trace[0]
        begin, end = len(request.token_ids), len(request.token_ids) + len(completion.token_ids)
        if expected[begin:].any() or request.token_ids.tolist() != sequence.token_ids[:begin].tolist():
            break
        np.testing.assert_array_equal(sequence.token_ids[begin:end], completion.token_ids)
        np.testing.assert_array_equal(sequence.rollout_logprobs[begin:end], completion.logprobs)
        expected[begin:end] = True
        versions[begin:end] = completion.versions
        trace = trace[1:]
    np.testing.assert_array_equal(sequence.sampled, expected)
    np.testing.assert_array_equal(sequence.versions, versions)
    assert expected.any()
    return trace


def check_against_learner(sequence: Sample, model, temperature: float) -> None:
    """Whose indexer has other weights: what the engine selected takes its place."""
    alone = WeightedSample(sample=replace(sequence, earlier=()))
    (micro,) = pack_step([alone], ranks=1, micro_tokens=1000).ranks[0]
    assert sequence.routed is not None and (sequence.kept is None or sequence.kept.sizes[sequence.sampled].all())
    assert not (micro.context & ~sequence.routed).any()
    top_k = model.config.index_topk
    assert sequence.selections is not None
    assert not (micro.context & (micro.positions >= top_k) & ~sequence.selections.recorded).any()
    with torch.no_grad():
        tokens = PackedTokens.of(micro, "cpu", index_topk=top_k)
        learned = Policy(with_another_indexer(model), temperature=temperature)(tokens).logprobs.numpy()
        live = model.backbone(tokens.token_ids.unsqueeze(0), record_routes=True).routes
    assert live is not None and sequence.routes is not None
    np.testing.assert_allclose(learned, sequence.rollout_logprobs, atol=2e-4, rtol=0)
    np.testing.assert_array_equal(sequence.routes[sequence.routed], live[0].numpy()[sequence.routed])
