"""The torch engine against full forwards of the model, and against itself in other company."""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from model import CacheView, DeepseekV32, LatentCache
from model.checksum import checksums
from rl.config import Sampling
from rl.errors import DataError
from rl.sample import Prompt, Status
from rollout.engine import Completion, Finish, Request
from rollout.samples import to_sample
from rollout.torch_engine import TorchEngine

ENGINE_RUNS = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking whole engine runs takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def make_engine(make_model):
    def make(seed: int = 0, **options) -> TorchEngine:
        return TorchEngine(make_model(seed), **{"max_num_seqs": 16, "max_context": 96, **options})

    return make


def test_what_is_urgent_goes_before_what_waits(make_engine, make_request):
    """Two places, and replies of equal length; siblings of one call stay in order."""
    engine = make_engine(max_num_seqs=2)
    alone = make_engine().generate([make_request("u", length=9, max_tokens=4)])
    plain = [make_request(name, length=9, max_tokens=4) for name in "abcdef"]
    engine.submit(*plain)
    ended = [name for name, _ in engine.step()]
    urgent = [dataclasses.replace(make_request(name, length=9, max_tokens=4), urgent=True) for name in "uv"]
    engine.submit(*urgent)
    done: dict[str, Completion] = {}
    while engine.has_work:
        done |= dict(engine.step())
    assert [*ended, *done] == ["a", "b", "u", "v", "c", "d", "e", "f"]
    assert_same(done["u"], alone[0])


def assert_same(one: Completion, other: Completion) -> None:
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert one.finish == other.finish
    assert one.routes is not None and other.routes is not None
    assert (one.kept is None) == (other.kept is None)
    if one.kept is not None and other.kept is not None:
        np.testing.assert_array_equal(one.kept.ids, other.kept.ids)
        np.testing.assert_array_equal(one.kept.offsets, other.kept.offsets)
    np.testing.assert_array_equal(one.routes[one.routed], other.routes[other.routed])


def by_hand(logits: torch.Tensor, completion: Completion, sampling: Sampling) -> np.ndarray:
    """log_softmax of logits [C, V] after temperature, over each token's kept set, at the tokens generated."""
    masked = logits.float() / sampling.temperature
    if completion.kept is not None:
        for row in range(len(completion.token_ids)):
            ids = completion.kept.ids[completion.kept.offsets[row] : completion.kept.offsets[row + 1]]
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            outside[torch.from_numpy(ids).long()] = False
            masked[row, outside] = -torch.inf
    return masked.log_softmax(-1)[torch.arange(len(masked)), torch.from_numpy(completion.token_ids).long()].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=1.0, max_tokens=50),
        Sampling(temperature=0.8, top_p=0.7, max_tokens=50),
        Sampling(temperature=1.3, top_p=0.9, top_k=20, min_p=0.01, max_tokens=50),
    ],
    ids=["whole", "top_p", "all"],
)
def test_logprobs_and_routes_are_the_full_forward_s(make_engine, make_request, sampling):
    engine = make_engine()
    requests = [make_request(name, length=length) for name, length in (("a", 30), ("b", 3), ("c", 17))]
    requests = [
        Request(id=r.id, token_ids=r.token_ids, sampling=sampling, seed=r.seed, stop_token_ids=()) for r in requests
    ]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert completion.routes is not None and completion.routed is not None
        num_prompt = len(request.token_ids)
        tokens = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids])).long()[None]
        assert tokens.shape[1] == num_prompt + 50
        with torch.no_grad():
            whole = engine.module.backbone(tokens, record_routes=True)
            logits = engine.module.lm_head(whole.hidden)[0, num_prompt - 1 : -1]
        np.testing.assert_allclose(completion.logprobs, by_hand(logits, completion, sampling), atol=1e-4, rtol=0)
        assert completion.routes.dtype == np.uint8
        assert completion.routed.tolist() == [True] * (num_prompt + 49) + [False]
        np.testing.assert_array_equal(completion.routes[completion.routed], whole.routes[0, :-1].numpy())
        assert (completion.kept is None) == (sampling.top_p == 1)


def test_greedy_is_the_argmax_of_the_full_forward(make_engine, make_request):
    request = make_request("greedy", length=12, temperature=0.0)
    engine = make_engine()
    (completion,) = engine.generate([request])
    tokens = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids])).long()[None]
    np.testing.assert_array_equal(engine.module(tokens)[0, 11:-1].argmax(-1).numpy(), completion.token_ids)
    assert completion.kept is not None
    np.testing.assert_array_equal(completion.kept.ids, completion.token_ids)
    assert not completion.logprobs.any()


@pytest.fixture
def lone_completions(make_engine, make_request) -> dict[str, Completion]:
    """Ten requests of growing length, each completed by an engine that has nothing else to do."""
    requests = [make_request(f"r{number}", max_tokens=4 + 3 * number) for number in range(10)]
    return {request.id: make_engine().generate([request])[0] for request in requests}


@given(data=st.data())
@settings(ENGINE_RUNS, max_examples=10)
def test_tokens_do_not_depend_on_company_order_or_slots(make_engine, make_request, lone_completions, data):
    """Requests arrive at drawn times, in a drawn order, in an engine with a drawn number of slots."""
    engine = make_engine(
        max_num_seqs=data.draw(st.integers(1, 33)), prefill_tokens=data.draw(st.sampled_from([32, 512]))
    )
    together: dict[str, Completion] = {}
    for number in data.draw(st.permutations(range(10))):
        engine.submit(make_request(f"r{number}", max_tokens=4 + 3 * number))
        for _ in range(data.draw(st.integers(0, 4))):
            together.update(engine.step())
    while engine.has_work:
        together.update(engine.step())
    assert together.keys() == lone_completions.keys()
    for name, completion in lone_completions.items():
        assert_same(together[name], completion)


def test_siblings_share_one_prefill_even_when_slots_come_free_one_by_one(make_engine, make_request):
    prompt = make_request("prompt", length=25).token_ids
    siblings = [
        Request(id=f"s{i}", token_ids=prompt, sampling=Sampling(max_tokens=3 + i, top_p=0.9), seed=i) for i in range(9)
    ]
    engine = make_engine(max_num_seqs=4)
    completions = engine.generate(siblings)
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_prefilled_tokens) == (9 * 25, 25)
    assert stats.num_generated_tokens == sum(3 + i for i in range(9))
    for sibling, completion in zip(siblings, completions, strict=True):
        assert_same(completion, make_engine().generate([sibling])[0])
    assert len({tuple(completion.token_ids[:3]) for completion in completions}) > 1


@given(
    order=st.lists(st.sampled_from("abcd"), min_size=2, max_size=12),
    num_slots=st.integers(1, 3),
    together=st.booleans(),
)
@example(order=["a", "b", "b", "a"], num_slots=2, together=False)  # b's second slot overwrites a's
@settings(ENGINE_RUNS, max_examples=15)
def test_prompts_that_come_and_go_are_never_mistaken(make_engine, lone_prompts, order, num_slots, together):
    engine = make_engine(max_num_seqs=num_slots)
    requests = [dataclasses.replace(lone_prompts[name][0], id=f"{name}{place}") for place, name in enumerate(order)]
    if together:
        completions = engine.generate(requests)
    else:
        completions = [engine.generate([request])[0] for request in requests]
    for name, completion in zip(order, completions, strict=True):
        assert_same(completion, lone_prompts[name][1])


@pytest.fixture
def lone_prompts(make_engine, make_request) -> dict[str, tuple[Request, Completion]]:
    requests = {name: make_request(name, length=18, max_tokens=6) for name in "abcd"}
    return {name: (request, make_engine().generate([request])[0]) for name, request in requests.items()}


def test_a_reused_slot_shows_nothing_of_its_past(make_engine, make_request):
    long, short = make_request("long", length=60, max_tokens=30), make_request("short", length=4, max_tokens=30)
    engine = make_engine(max_num_seqs=1)
    assert_same(engine.generate([long, short])[1], make_engine(max_num_seqs=1).generate([short])[0])


def test_finish_reasons(make_engine, make_request):
    engine = make_engine(max_context=48)
    free = make_request("free", length=10, max_tokens=100)
    (whole,) = engine.generate([free])
    assert whole.finish == Finish.LENGTH and len(whole.token_ids) == 38  # the window of 48 is full
    stop = int(whole.token_ids[7])
    first = whole.token_ids.tolist().index(stop)
    stopped, limited, exact = engine.generate(
        [
            make_request("free", length=10, max_tokens=100, stops=(999, stop)),
            Request(id="b", token_ids=free.token_ids, sampling=Sampling(top_p=0.9, max_tokens=5), seed=free.seed),
            make_request("edge", length=47),
        ]
    )
    assert stopped.finish == Finish.STOP
    np.testing.assert_array_equal(stopped.token_ids, whole.token_ids[: first + 1])
    assert limited.finish == Finish.LENGTH
    np.testing.assert_array_equal(limited.token_ids, whole.token_ids[:5])
    assert exact.finish == Finish.LENGTH and len(exact.token_ids) == 1


def test_requests_that_cannot_be_served_are_refused_whole(make_engine, make_request):
    engine = make_engine(max_context=48)
    with pytest.raises(DataError, match=r"request math/7#0: the prompt has 48 tokens .* holds 48"):
        engine.submit(make_request("fine"), make_request("math/7#0", length=48))
    with pytest.raises(DataError, match=r"token id 264 is outside the model's vocabulary of 264"):
        engine.submit(Request(id="x", token_ids=np.array([1, 264], np.int32), sampling=Sampling(), seed=0))
    with pytest.raises(DataError, match=r"sampling.top_p is 0"):
        make_request("y", top_p=0.0)
    assert not engine.has_work
    engine.submit(make_request("fine"))
    with pytest.raises(ValueError, match="request fine: the id is in use"):
        engine.submit(make_request("fine"))


def test_abort_returns_what_there_was_and_frees_the_slot(make_engine, make_request):
    engine = make_engine(max_num_seqs=2)
    running, other, queued = (make_request(name, length=9, max_tokens=40) for name in ("running", "other", "queued"))
    engine.submit(running, other, queued)
    for _ in range(5):
        engine.step()
    ended = dict(engine.abort(["running", "queued", "unknown"]))
    assert set(ended) == {"running", "queued"}
    assert len(ended["queued"].token_ids) == 0 and not np.any(ended["queued"].routed)
    (whole,) = make_engine().generate([running])
    part = ended["running"]
    assert part.finish == Finish.ABORT and len(part.token_ids) == 6  # one from the prefill, five decoded
    np.testing.assert_array_equal(part.token_ids, whole.token_ids[:6])
    prompt = Prompt(id="p", domain="d", token_ids=queued.token_ids)
    assert to_sample(prompt, 0, queued, ended["queued"], "").status == Status.ABORTED
    (late,) = engine.generate([make_request("late")])
    assert_same(late, make_engine().generate([make_request("late")])[0])


def test_weights_change_between_two_tokens_of_a_sequence(make_engine, make_model, make_request):
    """After the update, logits come from the new weights over the cache that the old ones wrote."""
    before, after = make_model(0), make_model(1)
    engine = TorchEngine(copy.deepcopy(before), max_num_seqs=16, max_context=96, version=4)
    request = make_request("flight", length=21, max_tokens=30)
    engine.submit(request)
    for _ in range(9):
        engine.step()
    names = list(after.state_dict())
    engine.stage({name: after.state_dict()[name] for name in names[:10]})
    engine.stage({name: after.state_dict()[name] for name in names[10:]})
    assert engine.commit(5) == checksums(after.state_dict().items())
    done: dict[str, Completion] = {}
    while engine.has_work:
        done.update(engine.step())
    completion = done["flight"]
    assert completion.versions.tolist() == [4] * 10 + [5] * 20

    tokens = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids])).long()
    cache = LatentCache(before.config, num_slots=1, max_len=96)
    rows = []
    # Token t of the completion comes from feeding position 20 + t; positions 0 to 29 were fed to the old weights.
    for begin, end, model in [(0, 30, before), *((p, p + 1, after) for p in range(30, 50))]:
        view = CacheView(cache=cache, slots=torch.tensor([0]), lengths=torch.tensor([end]))
        positions = torch.arange(begin, end)[None]
        with torch.no_grad():
            rows.append(
                model.lm_head(model.backbone(tokens[None, begin:end], positions=positions, cache=view).hidden[0])
            )
    mixed = by_hand(torch.cat(rows)[20:], completion, request.sampling)
    np.testing.assert_allclose(completion.logprobs, mixed, atol=1e-4, rtol=0)


def test_prompts_are_not_shared_across_versions(make_engine, make_model, make_request):
    engine = make_engine(0)
    request = make_request("again", length=15)
    first = engine.generate([request])[0]
    engine.stage(make_model(1).state_dict())
    engine.commit(1)
    assert engine.stats().version == 1
    second = engine.generate([request])[0]
    assert not np.array_equal(first.token_ids, second.token_ids)
    fresh = make_engine(1).generate([request])[0]
    assert_same(second, fresh)
    assert set(second.versions.tolist()) == {1}


def test_staging_names_what_does_not_belong(make_engine, make_request):
    engine = make_engine()
    untouched = engine.commit(0)
    with pytest.raises(ValueError, match=r"no parameter or buffer model\.layers\.9\.mlp\.gate\.weight"):
        engine.stage({"model.layers.9.mlp.gate.weight": torch.zeros(8, 32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(31,\) but the engine's is \(32,\)"):
        engine.stage({"model.norm.weight": torch.zeros(31)})
    assert engine.commit(1) == untouched
    engine.stage({"model.norm.weight": torch.full((32,), 2.0)})
    assert engine.stats().version == 1
    changed = engine.commit(2)
    assert {name for name in changed if changed[name] != untouched[name]} == {"model.norm.weight"}


def test_samples_align_every_stream_with_the_tokens(make_engine, make_request):
    request = make_request("aligned", length=11)
    (completion,) = make_engine().generate([request])
    prompt = Prompt(id="math/1", domain="math", token_ids=request.token_ids)
    sample = to_sample(prompt, 3, request, completion, "text")
    assert sample.id == "math/1#3" and sample.status == Status.TRUNCATED and sample.reply == "text"
    np.testing.assert_array_equal(sample.token_ids[:11], request.token_ids)
    np.testing.assert_array_equal(sample.token_ids[sample.sampled], completion.token_ids)
    np.testing.assert_array_equal(sample.rollout_logprobs[sample.sampled], completion.logprobs)
    assert sample.num_sampled == 20 and sample.oldest_version == 0
    assert sample.kept is not None and sample.routed is not None
    assert not sample.kept.sizes[:11].any() and sample.kept.sizes[11:].all()
    assert sample.routed.tolist() == [True] * 30 + [False]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_an_engine_that_sleeps_gives_its_memory_back(tiny_config, make_request):
    """To the operating system, that is, from a model of 80 MB and of many small tensors beside two large ones."""
    torch.manual_seed(0)
    model = DeepseekV32(dataclasses.replace(tiny_config, vocab_size=20_000, hidden_size=512))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = TorchEngine(model, max_num_seqs=16, max_context=96)
    requests = [make_request(name, length=60) for name in "ab"]
    awake = engine.generate(requests)
    num_bytes, of_weights = engine.num_bytes, sum(tensor.nbytes for tensor in weights.values())
    assert num_bytes > of_weights > 80e6
    before = resident_mb()

    engine.sleep(keep_weights=True)
    assert engine.num_bytes == of_weights
    engine.wake()
    assert engine.num_bytes == num_bytes

    engine.sleep()
    assert engine.num_bytes == 0
    assert before - resident_mb() > 0.95 * of_weights / 1e6
    engine.submit(make_request("c"))
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        engine.step()
    engine.abort()

    engine.stage(weights)
    assert engine.commit(1) == checksums(weights.items())
    assert engine.num_bytes == num_bytes
    for one, other in zip(engine.generate(requests), awake, strict=True):
        assert_same(one, other)
