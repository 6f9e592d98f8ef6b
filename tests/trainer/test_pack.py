from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.choices import Aggregation
from rl.loss import grpo_loss
from rl.metrics import merge
from rl.sample import Group, Kept, Prompt, Sample, Scored
from rl.selections import Selections
from trainer.pack import Microbatch, Minibatch, WeightedSample, pack, pack_step

MOE_LAYERS, TOP_K = 2, 3


def random_sample(rng: np.random.Generator, prompt: Prompt, index: int, length: int) -> Sample:
    """Every stream encodes which token it belongs to, so that a misalignment cannot go unseen."""
    token_ids = rng.integers(0, 1000, size=length).astype(np.int32)
    sampled = rng.random(length) < 0.6
    sampled[0] = False
    recorded = rng.random() < 0.5
    kept = Kept.from_rows(
        [np.array([t, t + 1] if s else [], np.int32) for t, s in zip(token_ids, sampled, strict=True)]
    )
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=token_ids,
        sampled=sampled,
        rollout_logprobs=np.where(sampled, -token_ids / 1000 - 1, 0).astype(np.float32),
        versions=np.zeros(length, np.int32),
        routes=np.broadcast_to((token_ids % 251)[:, None, None], (length, MOE_LAYERS, TOP_K)).astype(np.uint8)
        if recorded
        else None,
        routed=np.arange(length) < length - 1 if recorded and rng.random() < 0.5 else None,
        selections=random_selections(rng, length) if rng.random() < 0.5 else None,
        kept=kept if rng.random() < 0.5 else None,
    )


def random_selections(rng: np.random.Generator, length: int, top_k: int = 2) -> Selections:
    recorded = (np.arange(length) >= top_k) & (rng.random(length) < 0.7)
    keys = [np.sort(rng.choice(t + 1, top_k, replace=False)) for t in np.flatnonzero(recorded)]
    return Selections.of(np.array(keys, np.int64).reshape(-1, 1, top_k), recorded)


def random_groups(rng: np.random.Generator, sizes: list[list[int]]) -> list[Group]:
    groups = []
    for g, lengths in enumerate(sizes):
        prompt = Prompt(id=f"p{g}", domain="ab"[g % 2], token_ids=np.zeros(1, np.int32))
        samples = [random_sample(rng, prompt, i, length) for i, length in enumerate(lengths)]
        groups.append(Group(prompt=prompt, scored=tuple(Scored(sample=s, reward=0.0) for s in samples)))
    return groups


def rows_of(micro: Microbatch) -> dict[str, slice]:
    bounds = zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True)
    return {name: slice(a, b) for name, (a, b) in zip(micro.sample_ids, bounds, strict=True)}


def microbatches(steps: list[Minibatch]) -> list[Microbatch]:
    return [micro for step in steps for rank in step.ranks for micro in rank]


group_sizes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), max_size=6)


@settings(max_examples=150, deadline=None)
@given(group_sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_every_sample_is_packed_once_and_stays_aligned(sizes, ranks, minibatches, micro_tokens, seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, sizes)
    advantages = [rng.normal(size=len(group.scored)) for group in groups]
    steps = pack(
        groups,
        advantages,
        kl_betas={"a": 0.0, "b": 0.5},
        ranks=ranks,
        minibatches=minibatches,
        micro_tokens=micro_tokens,
        rng=rng,
    )
    expected = {
        scored.sample.id: (scored.sample, advantage, 0.5 if group.prompt.domain == "b" else 0.0)
        for group, row in zip(groups, advantages, strict=True)
        for scored, advantage in zip(group.scored, row, strict=True)
        if scored.sample.num_sampled
    }
    packed = [name for micro in microbatches(steps) if micro.sampled.any() for name in micro.sample_ids]
    assert sorted(packed) == sorted(expected)

    for micro in microbatches(steps):
        if not micro.sampled.any():
            continue
        assert len(micro) <= micro_tokens or len(micro.sample_ids) == 1
        for name, row in rows_of(micro).items():
            sample, advantage, kl_beta = expected[name]
            length = row.stop - row.start
            np.testing.assert_array_equal(micro.token_ids[row], sample.token_ids)
            np.testing.assert_array_equal(micro.positions[row], np.arange(length))
            np.testing.assert_array_equal(micro.sampled[row], sample.sampled)
            np.testing.assert_array_equal(micro.rollout_logprobs[row], sample.rollout_logprobs)
            np.testing.assert_array_equal(micro.advantages[row], np.full(length, advantage, np.float32))
            np.testing.assert_array_equal(micro.kl_beta[row], np.full(length, kl_beta, np.float32))
            check_recordings(micro, row, sample)


def check_recordings(micro: Microbatch, row: slice, sample: Sample) -> None:
    selections = dict(zip(micro.sample_ids, micro.selections, strict=True)) if micro.selections else {}
    assert selections.get(sample.id) is sample.selections
    if sample.routes is None:
        assert micro.routed is None or not micro.routed[row].any()
    else:
        assert micro.routes is not None and micro.routed is not None
        np.testing.assert_array_equal(micro.routes[row], sample.routes)
        np.testing.assert_array_equal(micro.routed[row], True if sample.routed is None else sample.routed)
    if sample.kept is None:
        assert micro.kept is None or not micro.kept.sizes[row].any()
    else:
        assert micro.kept is not None
        offsets = micro.kept.offsets
        np.testing.assert_array_equal(micro.kept.sizes[row], sample.kept.sizes)
        np.testing.assert_array_equal(micro.kept.ids[offsets[row.start] : offsets[row.stop]], sample.kept.ids)


@settings(max_examples=100, deadline=None)
@given(group_sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_the_whole_step_and_ranks_run_in_step(sizes, ranks, minibatches, micro_tokens, seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, sizes)
    zeros = [np.zeros(len(group.scored)) for group in groups]
    betas = {"a": 0.0, "b": 0.0}
    steps = pack(
        groups, zeros, kl_betas=betas, ranks=ranks, minibatches=minibatches, micro_tokens=micro_tokens, rng=rng
    )
    assert len(steps) <= minibatches
    siblings = {group.prompt.id: {s.sample.id for s in group.scored if s.sample.num_sampled} for group in groups}
    for step in steps:
        assert len(step.ranks) == ranks
        assert len({len(rank) for rank in step.ranks}) == 1
        assert step.num_samples == len(step.sample_ids) > 0
        assert step.num_tokens == sum(int(micro.sampled.sum()) for micro in microbatches([step]))
        assert step.num_positions == sum(len(micro) for micro in microbatches([step]) if micro.sampled.any())
        for prompt_id in {name.split("#")[0] for name in step.sample_ids}:
            assert siblings[prompt_id] <= set(step.sample_ids)
        for rank in range(ranks):
            share = step.share(rank)
            assert share.ranks == (step.ranks[rank],)
            assert (share.num_samples, share.num_tokens) == (step.num_samples, step.num_tokens)


def waiting(step: Minibatch, span: float) -> float:
    """Time of a step over what it would be if no rank ever waited: in every round all wait for the slowest."""

    def seconds(micro: Microbatch) -> float:
        lengths = np.diff(micro.cu_seqlens)
        return float((lengths + lengths.astype(float) ** 2 / span).sum())

    costs = np.array([[seconds(micro) for micro in rank] for rank in step.ranks])
    return float(costs.max(axis=0).sum() / costs.mean(axis=0).sum())


def skewed(seed: int, num: int) -> list[WeightedSample]:
    """Many short answers and a few that are very long."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(6.0, 1.2, size=num), 2, 8000).astype(int)
    return [WeightedSample(sample=plain_sample(rng, length)) for length in lengths]


def plain_sample(rng: np.random.Generator, length: int) -> Sample:
    return Sample(
        prompt=Prompt(id=str(rng.integers(1 << 40)), domain="a", token_ids=np.zeros(1, np.int32)),
        token_ids=np.zeros(length, np.int32),
        sampled=np.arange(length) > 0,
        rollout_logprobs=np.zeros(length, np.float32),
        versions=np.zeros(length, np.int32),
    )


def test_ranks_hardly_wait_for_each_other_when_lengths_are_skewed():
    span = 6000.0
    for seed in range(3):
        samples = skewed(seed, 1024)
        step = pack_step(samples, ranks=8, micro_tokens=16384, attention_span=span)
        assert waiting(step, span) < 1.02
        # Equal tokens alone leave the ranks with the long answers behind.
        unaware = pack_step(samples, ranks=8, micro_tokens=16384, attention_span=1e12)
        assert waiting(unaware, span) > 1.04


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 300), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 200))
def test_rows_keep_to_the_bound_and_no_rank_idles_needlessly(lengths, ranks, micro_tokens):
    rng = np.random.default_rng(0)
    samples = [WeightedSample(sample=plain_sample(rng, length)) for length in lengths]
    step = pack_step(samples, ranks=ranks, micro_tokens=micro_tokens)
    for micro in (micro for rank in step.ranks for micro in rank if micro.sampled.any()):
        assert len(micro) <= micro_tokens or len(micro.sample_ids) == 1
        assert list(np.diff(micro.cu_seqlens)) == sorted(np.diff(micro.cu_seqlens), reverse=True)
    idling = sum(not micro.sampled.any() for rank in step.ranks for micro in rank)
    assert idling < ranks or len(lengths) < ranks


def test_the_generator_decides_which_groups_share_a_step():
    groups = random_groups(np.random.default_rng(0), [[9, 9]] * 8)
    zeros = [np.zeros(2) for _ in groups]

    def split(seed: int) -> list[set[str]]:
        rng = np.random.default_rng(seed)
        steps = pack(groups, zeros, kl_betas={"a": 0, "b": 0}, ranks=1, minibatches=2, micro_tokens=64, rng=rng)
        return [set(step.sample_ids) for step in steps]

    assert split(1) == split(1)
    assert split(1) != split(2)


def test_context_is_what_a_later_sampled_token_looks_back_on():
    sample = Sample(
        prompt=Prompt(id="p", domain="a", token_ids=np.zeros(1, np.int32)),
        token_ids=np.arange(6, dtype=np.int32),
        sampled=np.array([0, 1, 0, 1, 0, 0], bool),
        rollout_logprobs=np.zeros(6, np.float32),
        versions=np.zeros(6, np.int32),
    )
    group = Group(prompt=sample.prompt, scored=(Scored(sample=sample, reward=0.0),))
    rng = np.random.default_rng(0)
    (step,) = pack([group], [np.zeros(1)], kl_betas={"a": 0}, ranks=2, minibatches=1, micro_tokens=64, rng=rng)
    contexts = {rank[0].sample_ids[0]: rank[0].context.tolist() for rank in step.ranks}
    assert contexts == {"p#0": [True, True, True, False, False, False], "idle": [False, False]}


def random_episode(rng: np.random.Generator, prompt: Prompt, index: int, lengths: list[int]) -> Sample:
    parts = [random_sample(rng, prompt, index, length) for length in lengths]
    earlier = tuple(dataclasses.replace(part, part=place) for place, part in enumerate(parts[:-1]))
    return dataclasses.replace(parts[-1], earlier=earlier)


episode_lengths = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(episode_lengths, st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_an_episode_lies_in_one_row_or_its_rounds_are_open(lengths, ranks, micro_tokens, seed):
    rng = np.random.default_rng(seed)
    prompt = Prompt(id="p", domain="a", token_ids=np.zeros(1, np.int32))
    episodes = [random_episode(rng, prompt, index, each) for index, each in enumerate(lengths)]
    episodes = [sample for sample in episodes if sample.num_generated]
    advantages = rng.choice([-1.0, 0.0, 1.0], len(episodes))
    weighted = [WeightedSample(sample=s, advantage=a) for s, a in zip(episodes, advantages, strict=True)]
    step = pack_step(weighted, ranks=ranks, micro_tokens=micro_tokens)
    assert step.num_samples == len(episodes)
    rows = [
        (number, micro)
        for rank in step.ranks
        for number, micro in enumerate(rank)
        if micro.sampled.any()
    ]  # fmt: skip
    for _, micro in rows:
        assert len(micro) <= micro_tokens or len(micro.sample_ids) == 1
    is_open = set()
    for number, (sample, advantage) in enumerate(zip(episodes, advantages, strict=True)):
        parts = {part.id for part in sample.sequences if part.num_sampled}
        holders = [(place, micro) for place, micro in rows if number in micro.episodes]
        held = [name for _, micro in holders for name in np.array(micro.sample_ids)[micro.episodes == number]]
        assert sorted(held) == sorted(parts)
        assert all((m.episode_tokens[m.episodes == number] == sample.num_generated).all() for _, m in holders)
        size = sum(len(part) for part in sample.sequences if part.num_sampled)
        assert (len(holders) == 1) == (size <= micro_tokens or len(parts) == 1)
        if len(holders) > 1 and advantage < 0:
            is_open |= {place for place, _ in holders}
    assert set(step.open_rounds) == is_open
    assert step.share(0).open_rounds == step.open_rounds


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("micro_tokens", [25, 1000], ids=["apart", "together"])
def test_an_episode_in_several_sequences_counts_once(aggregation, micro_tokens):
    """The packed loss against the objective written out over episodes of one to three sequences, mask included."""
    rng = np.random.default_rng(3)
    prompt = Prompt(id="p", domain="a", token_ids=np.zeros(1, np.int32))
    # Nats a token, by sequence. Alone, one of the second episode would be trained, and one of the fourth masked.
    shifts = ((9.0,), (0.5, 0.1), (9.0, 9.0, 9.0), (0.0, 0.0, 0.4), (0.3, 0.3))
    advantages = np.array([1.0, -0.5, 0.7, -0.8, -0.2])
    episodes = [random_episode(rng, prompt, index, [20] * len(each)) for index, each in enumerate(shifts)]
    group = Group(prompt=prompt, scored=tuple(Scored(sample=sample, reward=0.0) for sample in episodes))
    (step,) = pack(
        [group], [advantages], kl_betas={"a": 0.3}, ranks=2, minibatches=1, micro_tokens=micro_tokens, rng=rng
    )
    names = {part.id for sample in episodes for part in sample.sequences}
    assert len(names) == 11 and set(step.sample_ids) == names and step.num_samples == 5
    assert bool(step.open_rounds) == (micro_tokens == 25)

    learner = {
        part.id: part.rollout_logprobs - shift + rng.normal(0, 0.01, len(part))
        for sample, each in zip(episodes, shifts, strict=True)
        for part, shift in zip(sample.sequences, each, strict=True)
    }
    drifts = [
        float(np.concatenate([(s.rollout_logprobs - learner[s.id])[s.sampled] for s in sample.sequences]).mean())
        for sample in episodes
    ]
    total, masks = 0.0, []
    for micro in microbatches([step]):
        loss, metrics = grpo_loss(
            torch.tensor(np.concatenate([learner.get(name, np.zeros(2)) for name in micro.sample_ids])),
            torch.tensor(micro.rollout_logprobs),
            torch.tensor(micro.advantages),
            torch.tensor(micro.sampled),
            torch.tensor(micro.cu_seqlens),
            ref_logprobs=torch.tensor(
                np.concatenate([learner.get(name, np.zeros(2)) + 0.1 for name in micro.sample_ids])
            ),
            kl_beta=torch.tensor(micro.kl_beta),
            num_samples=step.num_samples,
            num_tokens=step.num_tokens,
            aggregation=str(aggregation),
            off_policy_delta=0.2,
            episodes=torch.tensor(micro.episodes),
            episode_tokens=torch.tensor(micro.episode_tokens),
            episode_drifts=torch.tensor([drifts[number] for number in micro.episodes]) if step.open_rounds else None,
        )
        total += float(loss)
        masks.append(metrics)

    expected = 0.0
    for sample, advantage, masked in zip(episodes, advantages, (False, True, False, False, True), strict=True):
        assert masked == (advantage < 0 and drifts[sample.index] > 0.2)
        terms = []
        for part in sample.sequences:
            ratio = np.exp(learner[part.id] - part.rollout_logprobs)[part.sampled]
            surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage) * (not masked)
            terms += (0.3 * ratio * (np.exp(0.1) - 0.1 - 1) - surrogate).tolist()
        expected += sum(terms) / (5 * len(terms) if aggregation == Aggregation.sequence_mean else step.num_tokens)
    assert total == pytest.approx(expected, rel=1e-5)
    rate = merge(masks)["mask/off_policy"]
    assert (rate.total, rate.count) == (pytest.approx(2), pytest.approx(5))


def test_mismatches_are_named():
    groups = random_groups(np.random.default_rng(0), [[9, 9]])
    keywords = {"ranks": 1, "minibatches": 1, "micro_tokens": 64, "rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match="p0 has 3 advantages for 2 samples"):
        pack(groups, [np.zeros(3)], kl_betas={"a": 0.0}, **keywords)
    with pytest.raises(ValueError, match="domain a of prompt p0"):
        pack(groups, [np.zeros(2)], kl_betas={}, **keywords)
