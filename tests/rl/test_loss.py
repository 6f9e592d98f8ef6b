"""grpo_loss against exact expectations over a small vocabulary and against a loop in plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.loss import grpo_loss
from rl.metrics import merge

F64 = torch.float64


def pack(sequences, dtype=F64):
    """Joins sequences, given as dicts of equally long lists, into the packed arguments of grpo_loss."""
    names = ("learner", "rollout", "advantage", "ref", "beta", "sampled")
    flat = {name: [value for sequence in sequences for value in sequence[name]] for name in names}
    lengths = [len(sequence["learner"]) for sequence in sequences]
    tensors = {name: torch.tensor(flat[name], dtype=dtype) for name in names[:-1]}
    tensors["sampled"] = torch.tensor(flat["sampled"], dtype=torch.bool)
    tensors["cu_seqlens"] = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return tensors


def loss_and_grad(packed, **options):
    learner = packed["learner"].clone().requires_grad_()
    loss, metrics = grpo_loss(
        learner,
        packed["rollout"],
        packed["advantage"],
        packed["sampled"],
        packed["cu_seqlens"],
        ref_logprobs=packed["ref"],
        kl_beta=packed["beta"],
        **options,
    )
    (grad,) = torch.autograd.grad(loss, learner)
    return loss.item(), grad, metrics


def loop(sequences, *, clip_low, clip_high, off_policy_delta, num_samples, aggregation, num_tokens):
    """The objective on the design page, token by token, with its derivative worked out by hand.

    Sequences with the same ``episode`` are one o_i; one without is an episode of its own.
    """
    episodes = {}
    for number, seq in enumerate(sequences):
        episodes.setdefault(seq.get("episode", f"alone {number}"), []).append(seq)
    whole = {id(seq): drifts_of(parts) for parts in episodes.values() for seq in parts}
    loss, grad = 0.0, []
    for seq in sequences:
        drifts = whole[id(seq)]
        mask = 1.0
        if drifts and off_policy_delta is not None and seq["advantage"][0] < 0:
            mask = 0.0 if sum(drifts) / len(drifts) > off_policy_delta else 1.0
        for t in range(len(seq["learner"])):
            if not seq["sampled"][t]:
                grad.append(0.0)
                continue
            weight = 1 / (num_samples * len(drifts)) if aggregation == "sequence_mean" else 1 / num_tokens
            a, r = seq["advantage"][t], math.exp(seq["learner"][t] - seq["rollout"][t])
            bounded = min(max(r, 1 - clip_low), 1 + clip_high)
            d = seq["ref"][t] - seq["learner"][t]
            loss -= weight * (min(r * a, bounded * a) * mask - seq["beta"][t] * r * (math.exp(d) - d - 1))
            slope = r * a if r * a <= bounded * a else 0.0
            grad.append(-weight * (slope * mask + seq["beta"][t] * r * d))
    return loss, grad


def drifts_of(sequences):
    """Of all sampled tokens of an episode."""
    streams = [zip(seq["rollout"], seq["learner"], seq["sampled"], strict=True) for seq in sequences]
    return [rollout - learner for stream in streams for rollout, learner, sampled in stream if sampled]


def random_sequences(seed, lengths, spread=0.3):
    rng = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        learner = -rng.exponential(1.0, length)
        sequences.append(
            {
                "learner": learner.tolist(),
                "rollout": (learner + spread * rng.standard_normal(length) + 0.1).tolist(),
                "advantage": [float(rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 2.0))] * length,
                "ref": (learner + rng.standard_normal(length)).tolist(),
                "beta": [float(rng.choice([0.0, 0.04, 0.5]))] * length,
                "sampled": (rng.random(length) < 0.6).tolist(),
            }
        )
    return sequences


def counts(sequences):
    per_sequence = [sum(sequence["sampled"]) for sequence in sequences]
    return {"num_samples": max(1, sum(n > 0 for n in per_sequence)), "num_tokens": max(1, sum(per_sequence))}


batches = st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=7))
options = st.fixed_dictionaries(
    {
        "clip_low": st.floats(0.05, 0.6),
        "clip_high": st.floats(0.05, 0.6),
        "off_policy_delta": st.none() | st.floats(0.0, 0.4),
        "aggregation": st.sampled_from(["sequence_mean", "token_mean"]),
    }
)


class TestKlGradient:
    """E_{o ~ mu}[grad KL_o] must be the gradient of KL(pi || ref) = sum_o pi(o) (log pi(o) - log ref(o)).

    Every outcome of the vocabulary is a one-token sequence and its kl_beta is its rollout probability mu(o), so the
    loss is the expectation, without sampling error.
    """

    @staticmethod
    def policies(seed, vocabulary, on_policy):
        generator = torch.Generator().manual_seed(seed)
        theta, mu, ref = torch.randn(3, vocabulary, generator=generator, dtype=F64) * 1.5
        return theta.requires_grad_(), torch.log_softmax(theta.detach() if on_policy else mu, 0), ref.log_softmax(0)

    @staticmethod
    def gradient(expectation, theta):
        return torch.autograd.grad(expectation, theta, retain_graph=True)[0]

    @pytest.mark.parametrize("on_policy", [True, False])
    @given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 12))
    @settings(max_examples=50)
    def test_is_exact_in_expectation(self, on_policy, seed, vocabulary):
        theta, mu, ref = self.policies(seed, vocabulary, on_policy)
        pi = theta.log_softmax(0)
        loss, _ = grpo_loss(
            pi,
            mu,
            torch.zeros(vocabulary, dtype=F64),
            torch.ones(vocabulary, dtype=torch.bool),
            torch.arange(vocabulary + 1),
            ref_logprobs=ref,
            kl_beta=mu.exp(),
            num_samples=1,
        )
        exact = (pi.exp() * (pi - ref)).sum()
        assert abs(loss.item() - exact.item()) <= 1e-9
        assert (self.gradient(loss, theta) - self.gradient(exact, theta)).abs().max() <= 1e-9

    @pytest.mark.parametrize("on_policy", [True, False])
    def test_a_detached_ratio_would_be_wrong(self, on_policy):
        theta, mu, ref = self.policies(7, 10, on_policy)
        pi = theta.log_softmax(0)
        exact = self.gradient((pi.exp() * (pi - ref)).sum(), theta)
        ratio = (pi - mu).exp().detach()
        detached = self.gradient((mu.exp() * ratio * ((ref - pi).exp() - (ref - pi) - 1)).sum(), theta)
        assert (detached - exact).norm() > 0.1 * exact.norm()

    def test_near_the_reference_in_float32(self):
        learner = torch.full((1,), -1.0)
        arguments = (learner, learner, torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.tensor([0, 1]))
        loss, _ = grpo_loss(*arguments, ref_logprobs=learner + 1e-3, kl_beta=1.0, num_samples=1)
        assert loss.item() == pytest.approx(0.5e-6, rel=1e-2)  # exp(d) - d - 1 -> d^2 / 2, lost without expm1


class TestOffPolicyMask:
    """M_i is one decision about all sampled tokens of a sequence."""

    @staticmethod
    def sequence(drifts, advantage, *, sampled=None, beta=0.0):
        length = len(drifts)
        return {
            "learner": [-1.0 - drift for drift in drifts],
            "rollout": [-1.0] * length,
            "advantage": [advantage] * length,
            "ref": [-2.2] * length,
            "beta": [beta] * length,
            "sampled": sampled or [True] * length,
        }

    def masked(self, sequence, delta):
        """Whether the surrogate's gradient vanished on the whole sequence; it may not on a part of it."""
        _, grad, metrics = loss_and_grad(pack([sequence]), off_policy_delta=delta, num_samples=1, clip_low=0.99)
        alive = grad[torch.tensor(sequence["sampled"])] != 0
        assert alive.all() or not alive.any()
        assert float(metrics["mask/off_policy"]) == float(not alive.any())
        return not alive.any()

    @pytest.mark.parametrize(
        ("drifts", "advantage", "expected"),
        [
            ([0.3, 0.3], -1.0, True),
            ([0.3, 0.3], 1.0, False),  # only bad samples are ever masked
            ([-0.3, -0.3], -1.0, False),  # one-sided: the learner likes it more than the engine did
            ([0.5, -0.5], -1.0, False),  # signed: opposite drifts cancel
            ([1.0, -0.1, -0.1], -1.0, True),  # one token can condemn all, also those that drifted the other way
            ([1.0, -0.9, 0.0], -1.0, False),
        ],
    )
    def test_by_definition(self, drifts, advantage, expected):
        assert self.masked(self.sequence(drifts, advantage), delta=0.2) == expected

    def test_none_masks_nothing(self):
        assert not self.masked(self.sequence([2.0, 2.0], -1.0), delta=None)

    def test_spans_turns_and_ignores_what_lies_between(self):
        # Prompt, reply, tool output, reply. The replies alone mean 0.5 and 0.0, together 0.25; everything means 8.
        drifts = [0.0, 0.5, 0.5, 30.0, 25.0, 0.0, 0.0]
        sampled = [False, True, True, False, False, True, True]
        sequence = self.sequence(drifts, -1.0, sampled=sampled)
        assert self.masked(sequence, delta=0.2)
        assert not self.masked(sequence, delta=0.3)

    def test_neighbours_in_the_pack_are_judged_apart(self):
        bad, good = self.sequence([0.5, 0.5], -1.0), self.sequence([0.0, 0.1, 0.0], -1.0)
        _, grad, metrics = loss_and_grad(pack([good, bad, good]), off_policy_delta=0.2, num_samples=3, clip_low=0.99)
        assert (grad != 0).tolist() == [True] * 3 + [False] * 2 + [True] * 3
        assert float(metrics["mask/off_policy"]) == pytest.approx(1 / 3)

    def test_kl_stays_on_masked_sequences(self):
        masked = self.sequence([0.5, 0.5], -1.0, beta=0.1)
        loss, grad, _ = loss_and_grad(pack([masked]), off_policy_delta=0.2, num_samples=1)
        indifferent = {**masked, "advantage": [0.0, 0.0]}
        kl_loss, kl_grad, _ = loss_and_grad(pack([indifferent]), num_samples=1)
        assert loss == kl_loss != 0 and torch.equal(grad, kl_grad) and grad.all()


def test_on_policy_ratio_is_one_and_gradient_is_reinforce():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=generator, dtype=F64, requires_grad=True)
    tokens = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1, 3])
    sampled = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    cu_seqlens, advantages = torch.tensor([0, 3, 7, 9]), torch.tensor([0.5] * 3 + [-1.5] * 4 + [1.0] * 2, dtype=F64)
    logprobs = logits.log_softmax(-1)[torch.arange(9), tokens]
    loss, metrics = grpo_loss(
        logprobs, logprobs.detach(), advantages, sampled, cu_seqlens, off_policy_delta=0.0, num_samples=3
    )
    assert float(metrics["ratio/mean"]) == 1 and float(metrics["ratio/clipped"]) == 0
    assert float(metrics["mismatch/logprob_abs"]) == float(metrics["mismatch/kl"]) == 0

    sequences = [slice(0, 3), slice(3, 7), slice(7, 9)]
    terms = [advantages[rows][0] * logprobs[rows][sampled[rows]].mean() for rows in sequences]
    reinforce = -torch.stack(terms).mean()
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(reinforce, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@given(batches, options)
@settings(max_examples=150, deadline=None)
def test_equals_the_loop(batch, options):
    sequences = random_sequences(*batch)
    options = {**options, **counts(sequences)}
    loss, grad, _ = loss_and_grad(pack(sequences), **options)
    expected_loss, expected_grad = loop(sequences, **options)
    assert loss == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(grad.numpy(), expected_grad, rtol=1e-9, atol=1e-12)


@given(batches, options, st.data())
@settings(max_examples=75, deadline=None)
def test_any_split_into_micro_batches_adds_up(batch, options, data):
    sequences = random_sequences(*batch)
    options = {**options, **counts(sequences)}
    loss, grad, metrics = loss_and_grad(pack(sequences), **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sequences)), max_size=4)))
    parts = [sequences[start:end] for start, end in zip([0, *cuts], [*cuts, len(sequences)], strict=True)]
    losses, grads, tallies = zip(*(loss_and_grad(pack(part), **options) for part in parts), strict=True)
    assert sum(losses) == pytest.approx(loss, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-12, atol=1e-15)
    merged = merge(tallies)
    assert merged.keys() == metrics.keys()
    for name, mean in metrics.items():
        assert merged[name].count == mean.count
        assert merged[name].total == pytest.approx(mean.total, rel=1e-9, abs=1e-12)
    # What is reported is what was optimised.
    assert float(metrics["loss/policy"]) + float(metrics["loss/kl"]) == pytest.approx(loss, rel=1e-9, abs=1e-12)


@given(st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=7)), options, st.data())
@settings(max_examples=75, deadline=None)
def test_an_episode_is_decided_once_however_its_sequences_are_split(batch, options, data):
    """Sequences drawn into episodes, and these into micro-batches, in any order: the loop over whole episodes."""
    sequences = random_sequences(*batch)
    for seq in sequences:
        seq["episode"] = data.draw(st.integers(0, len(sequences) // 2))
        leader = next(other for other in sequences if other.get("episode") == seq["episode"])
        for name in ("advantage", "beta"):
            seq[name] = leader[name][:1] * len(seq["learner"])
    whole = {seq["episode"]: drifts_of([s for s in sequences if s["episode"] == seq["episode"]]) for seq in sequences}
    lengths = [len(drifts) for drifts in whole.values()]
    options = {**options, "num_samples": max(1, sum(n > 0 for n in lengths)), "num_tokens": max(1, sum(lengths))}
    expected_loss, expected_grad = loop(sequences, **options)

    of_sequences = [data.draw(st.integers(0, 2)) for _ in sequences]
    total, grads, tallies = 0.0, {}, []
    for micro in set(of_sequences):
        part = [number for number, other in enumerate(of_sequences) if other == micro]
        drifts = [whole[sequences[number]["episode"]] for number in part]
        loss, grad, metrics = loss_and_grad(
            pack([sequences[number] for number in part]),
            **options,
            episodes=torch.tensor([sequences[number]["episode"] for number in part]),
            episode_tokens=torch.tensor([len(one) for one in drifts]),
            episode_drifts=torch.tensor([sum(one) / max(1, len(one)) for one in drifts], dtype=F64),
        )
        total += loss
        tallies.append(metrics)
        pieces = grad.split([len(sequences[number]["learner"]) for number in part])
        grads |= dict(zip(part, pieces, strict=True))
    assert total == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
    joined = torch.cat([grads[number] for number in range(len(sequences))])
    np.testing.assert_allclose(joined.numpy(), expected_grad, rtol=1e-9, atol=1e-12)

    delta, advantages = options["off_policy_delta"], {seq["episode"]: seq["advantage"] for seq in sequences}
    masked = [
        delta is not None and advantages[episode][0] < 0 and sum(drifts) / len(drifts) > delta
        for episode, drifts in whole.items()
        if drifts
    ]
    metrics = merge(tallies)
    assert metrics["mask/off_policy"].total == pytest.approx(sum(masked))
    assert metrics["mask/off_policy"].count == pytest.approx(len(masked))
    # What is reported is what was optimised.
    reported = float(metrics["loss/policy"]) + float(metrics["loss/kl"])
    assert reported == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_sequences_of_one_micro_batch_share_their_mask_without_being_told():
    one, other = TestOffPolicyMask.sequence([0.5], -1.0), TestOffPolicyMask.sequence([0.0, 0.0], -1.0)
    packed = pack([one, other, one])
    options = {"off_policy_delta": 0.2, "num_samples": 2, "clip_low": 0.99, "episodes": torch.tensor([7, 2, 2])}
    _, grad, metrics = loss_and_grad(packed, **options)
    # Alone 0.5 a token; with the first sequence's two tokens 0.17, below the bound.
    assert (grad != 0).tolist() == [False, True, True, True]
    assert float(metrics["mask/off_policy"]) == 0.5


@given(batches, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.sampled_from([torch.float32, F64]))
@settings(max_examples=75, deadline=None)
def test_unsampled_positions_are_never_read(batch, garbage, dtype):
    packed = pack(random_sequences(*batch), dtype)
    options = {"off_policy_delta": 0.1, "num_samples": 3}
    loss, grad, metrics = loss_and_grad(packed, **options)
    spoilt = {
        name: torch.where(packed["sampled"], stream, garbage) if stream.is_floating_point() else stream
        for name, stream in packed.items()
    }
    assert not torch.equal(spoilt["learner"], packed["learner"]) or packed["sampled"].all()
    spoilt_loss, spoilt_grad, spoilt_metrics = loss_and_grad(spoilt, **options)
    assert spoilt_loss == loss and spoilt_metrics == metrics
    assert torch.equal(spoilt_grad, grad) and not grad[~packed["sampled"]].any()


def test_padding_after_the_last_sequence_changes_nothing():
    sequences = random_sequences(3, [4, 6])
    packed = pack(sequences)
    loss, grad, metrics = loss_and_grad(packed, num_samples=2, off_policy_delta=0.1)
    padding = {name: torch.nn.functional.pad(stream, (0, 5)) for name, stream in packed.items() if name != "cu_seqlens"}
    padded = loss_and_grad({**padding, "cu_seqlens": packed["cu_seqlens"]}, num_samples=2, off_policy_delta=0.1)
    assert padded[0] == loss and padded[2] == metrics
    assert torch.equal(padded[1], torch.nn.functional.pad(grad, (0, 5)))


def test_nothing_sampled_is_a_zero_loss_that_still_backpropagates():
    sequence = {**random_sequences(1, [5])[0], "sampled": [False] * 5}
    loss, grad, metrics = loss_and_grad(pack([sequence]), num_samples=4)
    assert loss == 0 and not grad.any()
    assert all(mean.total == 0 and mean.count == 0 for mean in metrics.values())


def test_metrics_by_hand():
    # Ratios 1.5, 0.5 | 1.5, 0.5 under advantages +1 | -1 and clipping at 0.8 and 1.2.
    up, down = math.log(1.5), math.log(0.5)
    sequences = [
        {
            "learner": [-1 + up, -1 + down],
            "rollout": [-1.0, -1.0],
            "advantage": [advantage] * 2,
            "ref": [-1.0, -1.0],
            "beta": [beta] * 2,
            "sampled": [True, True],
        }
        for advantage, beta in ((1.0, 0.0), (-1.0, 0.5))
    ]
    _, _, metrics = loss_and_grad(pack(sequences), num_samples=2, off_policy_delta=0.1)
    number = {name: float(mean) for name, mean in metrics.items()}
    # Eq. 8: (1.2 + 0.5) / 2 for the good sample; the bad one is masked, as its mean drift -(up + down) / 2 is 0.14.
    assert number["loss/policy"] == pytest.approx(-(1.2 + 0.5) / 2 / 2)
    kl = [math.exp(d) * (math.exp(-d) + d - 1) for d in (up, down)]
    assert number["loss/kl"] == pytest.approx(0.5 * sum(kl) / 2 / 2)
    assert number["kl/reference"] == pytest.approx(sum(kl) / 2)
    assert number["ratio/mean"] == pytest.approx(1.0)
    assert number["ratio/clipped"] == 0.5  # 1.5 with the good sample, 0.5 with the bad one
    assert number["mask/off_policy"] == 0.5
    assert number["mismatch/logprob_abs"] == pytest.approx((up - down) / 2)
    assert number["mismatch/kl"] == pytest.approx(((1.5 - up - 1) + (0.5 - down - 1)) / 2)


def test_mismatch_kl_is_the_exact_kl_in_expectation():
    generator = torch.Generator().manual_seed(5)
    rollout, learner = torch.randn(2, 6, generator=generator, dtype=F64).log_softmax(-1)
    repeats = (rollout.exp() * 200_000).round().long()  # every outcome as often as the engine would sample it
    tokens = torch.arange(6).repeat_interleave(repeats)
    arguments = (learner[tokens], rollout[tokens], torch.zeros(len(tokens)), torch.ones(len(tokens), dtype=torch.bool))
    _, metrics = grpo_loss(*arguments, torch.tensor([0, len(tokens)]), num_samples=1)
    exact = (rollout.exp() * (rollout - learner)).sum()
    assert float(metrics["mismatch/kl"]) == pytest.approx(exact.item(), rel=1e-3)


def test_low_precision_logprobs_are_summed_in_float32():
    packed = pack(random_sequences(2, [6, 6]), torch.bfloat16)
    loss, _ = grpo_loss(
        packed["learner"],
        packed["rollout"],
        packed["advantage"],
        packed["sampled"],
        packed["cu_seqlens"],
        num_samples=2,
    )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_beta": 0.1}, "ref_logprobs is needed"),
        ({"kl_beta": torch.tensor([0.0, 0.1])}, "ref_logprobs is needed"),
        ({"aggregation": "token_mean"}, "num_tokens"),
        ({"aggregation": "mean"}, "sequence_mean or token_mean"),
        ({"num_samples": 0}, "num_samples"),
        ({"episodes": torch.zeros(2)}, r"episodes has shape \[2\], but cu_seqlens\[1:\] has \[1\]"),
        ({"ref_logprobs": torch.zeros(3)}, r"ref_logprobs has shape \[3\], but learner_logprobs has \[2\]"),
    ],
)
def test_refuses(change, message):
    arguments = (torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=message):
        grpo_loss(*arguments, **{"num_samples": 1, **change})


def test_kl_of_zero_everywhere_needs_no_reference():
    arguments = (torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))
    loss, metrics = grpo_loss(*arguments, kl_beta=torch.zeros(2), num_samples=1)
    assert loss.item() == -1 and metrics["kl/reference"].count == 0
