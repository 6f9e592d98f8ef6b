"""Keep Selection from the engine to the learner: what was attended to when a token was sampled, it is trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model import DeepseekV32, packing
from rl.config import Objective, Sampling
from rl.metrics import values
from rl.sample import Prompt, Sample
from rl.selections import Selections
from rollout.engine import Finish, Request
from rollout.samples import to_sample
from rollout.torch_engine import TorchEngine
from tests.trainer.samples import TEMPERATURE, VOCAB, tiny_config, with_another_indexer
from tests.trainer.test_grpo_step import gradients, run
from trainer.pack import Microbatch, Minibatch, WeightedSample, pack_step
from trainer.policy import PackedTokens, Policy
from trainer.selections import key_selection
from trainer.step import Reference

CPU = torch.device("cpu")
TOP_K = tiny_config().index_topk
KEEP = Objective(off_policy_delta=None, keep_selection=True)
FORMS = ("groups", "masked", "sparse")


@pytest.fixture(scope="module")
def model() -> DeepseekV32:
    torch.manual_seed(0)
    return DeepseekV32(tiny_config())


def attend_as(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences this short are otherwise padded groups."""
    if form != "groups":
        monkeypatch.setattr(packing, "_MAX_GROUPED", 0)
        monkeypatch.setattr("kernels.crossover.crossover", lambda *_, **__: 10**6 if form == "masked" else 0)


def samples_of(model: DeepseekV32, prompts: Sequence[int], *, max_tokens: int, prefill_tokens: int) -> list[Sample]:
    """Two siblings of each prompt of so many tokens; the engine has places for three sequences."""
    engine = TorchEngine(
        with_copy(model), max_num_seqs=3, max_context=80, prefill_tokens=prefill_tokens, record_selections=True
    )
    rng = np.random.default_rng(len(prompts))
    requests = []
    for number, length in enumerate(prompts):
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=max_tokens - number)
        requests += [Request(id=f"{number}#{i}", token_ids=ids, sampling=sampling, seed=9 * number + i) for i in (0, 1)]
    return [
        to_sample(Prompt(id=request.id, domain="math", token_ids=request.token_ids), 0, request, completion, "")
        for request, completion in zip(requests, engine.generate(requests), strict=True)
    ]


def with_copy(model: DeepseekV32) -> DeepseekV32:
    other = DeepseekV32(model.config).to(model.lm_head.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other


def packed(samples: Sequence[Sample], micro_tokens: int = 10_000, *, kl_beta: float = 0.0) -> Minibatch:
    weighted = [
        WeightedSample(sample=sample, advantage=(-1.0) ** n, kl_beta=kl_beta) for n, sample in enumerate(samples)
    ]
    return pack_step(weighted, ranks=1, micro_tokens=micro_tokens)


def off_by(policy: Policy, minibatch: Minibatch, index_topk: int | None) -> float:
    """The most by which the learner's log-probabilities are not the engine's."""
    worst = 0.0
    for micro in minibatch.ranks[0]:
        with torch.no_grad():
            learned = policy(PackedTokens.of(micro, "cpu", index_topk=index_topk)).logprobs.numpy()
        worst = max(worst, float(np.abs(learned - micro.rollout_logprobs).max()))
    return worst


@pytest.mark.parametrize("form", FORMS)
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    prompts=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    max_tokens=st.integers(12, 28),
    prefill_tokens=st.sampled_from([16, 64, 2048]),
)
def test_a_learner_that_selects_otherwise_finds_the_engines_log_probabilities(
    model: DeepseekV32, monkeypatch: pytest.MonkeyPatch, form: str, prompts, max_tokens, prefill_tokens
):
    """Prompts on both sides of index_topk, in chunks, and places that are used again."""
    samples = samples_of(model, prompts, max_tokens=max_tokens, prefill_tokens=prefill_tokens)
    with monkeypatch.context() as patch:
        attend_as(form, patch)
        stranger = Policy(with_another_indexer(model).eval(), temperature=1.0)
        minibatch = packed(samples, micro_tokens=100)
        assert off_by(stranger, minibatch, TOP_K) < 1e-4
        if max(map(len, samples)) > 2 * TOP_K:
            assert off_by(stranger, minibatch, None) > 1e-3
    for sample in samples:
        assert sample.selections is not None
        order = np.arange(len(sample))
        np.testing.assert_array_equal(sample.selections.recorded, (order >= TOP_K) & (order < len(sample) - 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_a_learner_that_selects_the_same(
    model: DeepseekV32, monkeypatch: pytest.MonkeyPatch, form: str, recompute: bool
):
    """Nothing of the indexer's reaches the policy, its own loss or none, and without that loss it has no gradient."""
    samples = samples_of(model, (5, 20, 33), max_tokens=20, prefill_tokens=64)
    attend_as(form, monkeypatch)
    minibatch = packed(samples, 100, kl_beta=0.3)
    reference = Reference(Policy(model, temperature=TEMPERATURE))
    wanted = run(with_copy(model), minibatch, reference=reference)
    found = []
    for weight in (None, 1.0):
        stranger = with_another_indexer(model)
        if recompute:
            stranger.recompute_activations()
        step, gradient = run(stranger, minibatch, KEEP, index_topk=TOP_K, indexer_weight=weight, reference=reference)
        found.append(step)
        for name, tensor in wanted[1].items():
            torch.testing.assert_close(gradient[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
        indexers = [p.grad for name, p in stranger.named_parameters() if ".indexer." in name]
        assert all((grad is None) == (weight is None) for grad in indexers)
    plain, learning = (values(step.metrics) for step in found)
    assert plain["kl/reference"] < 1e-8  # the same policy but for the indexer, and it replays too
    assert plain["selections/replayed"] == learning["selections/replayed"] == 1.0
    assert "selections/identical" not in plain and 0 < learning["selections/identical"] < 0.5
    same, _ = run(with_copy(model), packed(samples, 100), KEEP, index_topk=TOP_K, indexer_weight=1.0)
    assert values(same.metrics)["selections/identical"] > 0.99


def test_the_indexers_loss_is_over_the_replayed_keys(model: DeepseekV32, monkeypatch: pytest.MonkeyPatch):
    """Padded masks and packed indices are two implementations of it; a live selection has another loss."""
    (micro,) = packed(samples_of(model, (5, 20, 33), max_tokens=20, prefill_tokens=64)).ranks[0]
    losses: dict[str, list[torch.Tensor]] = {}
    for form in FORMS:
        with monkeypatch.context() as patch:
            attend_as(form, patch)
            for kept in (TOP_K, None):
                stranger = with_another_indexer(model)
                output = Policy(stranger)(PackedTokens.of(micro, "cpu", index_topk=kept), indexer_loss="sparse")
                assert output.indexer_loss is not None
                output.indexer_loss.backward()
                grads = [p.grad for name, p in stranger.named_parameters() if ".indexer." in name]
                assert all(grad is not None for grad in grads)
                flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
                losses.setdefault(f"{kept}", []).append(torch.cat([output.indexer_loss.detach().view(1), flat]))
                assert not any(float(tensor.abs().max()) for tensor in gradients(stranger).values())
    for values_of in losses.values():
        for one in values_of[1:]:
            torch.testing.assert_close(one, values_of[0], atol=1e-4, rtol=1e-3)
    assert abs(float(losses["None"][0][0] / losses[f"{TOP_K}"][0][0]) - 1) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_what_was_not_recorded_is_selected_now_and_counted(
    model: DeepseekV32, monkeypatch: pytest.MonkeyPatch, form: str
):
    """A sample without, one that lost every other row, and one as it was."""
    bare, holed, whole = samples_of(model, (9, 30), max_tokens=20, prefill_tokens=64)[:3]
    assert holed.selections is not None
    recorded = holed.selections.recorded & (np.arange(len(holed)) % 2 == 0)
    rows = holed.selections.keys[recorded[holed.selections.recorded]]
    bare = dataclasses.replace(bare, selections=None)
    holed = dataclasses.replace(holed, selections=Selections.of(rows, recorded))
    attend_as(form, monkeypatch)
    minibatch = packed([bare, holed, whole])
    assert off_by(Policy(model, temperature=1.0), minibatch, TOP_K) < 1e-4
    assert off_by(Policy(with_another_indexer(model), temperature=1.0), minibatch, TOP_K) > 1e-3
    step, _ = run(with_copy(model), minibatch, KEEP, index_topk=TOP_K)
    needed = [len(sample) - 1 - TOP_K for sample in (bare, holed, whole)]
    replayed = int(recorded[:-1].sum()) + needed[2]
    assert values(step.metrics)["selections/replayed"] == pytest.approx(replayed / sum(needed))
    assert values(step.metrics)["selections/identical"] > 0.99  # chosen anyway, for those that had none
    step, _ = run(with_copy(model), packed([bare]), KEEP, index_topk=TOP_K)
    assert values(step.metrics)["selections/replayed"] == 0.0


def test_the_mismatch_of_bfloat16_is_not_larger(model: DeepseekV32):
    """Engine and learner round differently, so that near ties among keys are decided otherwise."""
    rounded = with_copy(model).to(torch.bfloat16)
    minibatch = packed(samples_of(rounded, (20, 30, 40), max_tokens=30, prefill_tokens=2048))
    (micro,) = minibatch.ranks[0]
    found = []
    for kept in (None, TOP_K):
        with torch.no_grad():
            learned = Policy(rounded, temperature=1.0)(PackedTokens.of(micro, "cpu", index_topk=kept)).logprobs
        found.append(float(np.abs(learned.numpy() - micro.rollout_logprobs)[micro.sampled].mean()))
    live, replayed = found
    print(f"mean |learner - engine|: {live:.4f} with own selections, {replayed:.4f} with the engine's")
    assert replayed < 0.8 * live


def test_completions_that_ended_early_say_so(model: DeepseekV32):
    engine = TorchEngine(with_copy(model), max_num_seqs=1, max_context=80, record_selections=True)
    ids = np.arange(20, dtype=np.int32)
    first, second = (Request(id=name, token_ids=ids, sampling=Sampling(max_tokens=30), seed=0) for name in "ab")
    engine.submit(first, second)
    for _ in range(3):
        engine.step()
    ended = dict(engine.abort())
    assert {completion.finish for completion in ended.values()} == {Finish.ABORT}
    cut, unborn = (ended[name].selections for name in "ab")
    assert cut is not None and unborn is not None and len(ended["b"].token_ids) == 0
    length = 20 + len(ended["a"].token_ids)
    assert np.flatnonzero(cut.recorded).tolist() == list(range(TOP_K, length - 1)) and cut.fault() is None
    assert len(unborn) == 20 and not unborn.recorded.any() and unborn.fault() is None


def test_weights_that_change_in_flight_leave_what_each_token_attended_to(model: DeepseekV32):
    """The engine changes its indexer in the middle: earlier rows stay, later ones are the new indexer's."""
    request = Request(id="a", token_ids=np.arange(20, dtype=np.int32), sampling=Sampling(max_tokens=20), seed=0)

    def complete(updated: bool) -> Selections:
        engine = TorchEngine(with_copy(model), max_num_seqs=1, max_context=80, record_selections=True)
        engine.submit(request)
        done = {}
        for step in range(20):
            if updated and step == 10:
                engine.stage({n: p.detach() for n, p in with_another_indexer(model).named_parameters()})
                engine.commit(1)
            done |= dict(engine.step())
        return done["a"].selections

    plain, changed = complete(False).keys, complete(True).keys
    same = (plain == changed).all(axis=(1, 2))
    fed_before = 20 + 10 - TOP_K
    assert same[:fed_before].all() and not same[fed_before:].any()


def test_selections_of_another_model_are_refused(model: DeepseekV32):
    (micro,) = packed(samples_of(model, (20,), max_tokens=20, prefill_tokens=64)).ranks[0]
    assert isinstance(micro, Microbatch)
    with pytest.raises(ValueError, match=f"sample 0#[01]#0: its selections keep {TOP_K} tokens, but .* to 12"):
        key_selection(micro, 12, CPU)
