"""The sampler against a literal reading of its definition, row by row, and against the distribution itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import Sampling
from rollout.sampler import Draws, SamplingRows, sample, uniform


def kept_by_hand(logits: np.ndarray, sampling: Sampling) -> list[int]:
    """Sorts by (probability falling, id rising) and cuts, in Python floats."""
    if sampling.temperature == 0:
        return [max(range(len(logits)), key=lambda i: (logits[i], -i))]
    scaled = [float(z) / sampling.temperature for z in logits]
    weights = [math.exp(z - max(scaled)) for z in scaled]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = [i for i in order if weights[i] >= sampling.min_p]
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, mass, nucleus = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if sampling.top_p < 1 and mass >= sampling.top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    return sorted(nucleus)


def kept_row(draws: Draws, row: int) -> np.ndarray:
    return draws.kept_ids[draws.kept_offsets[row] : draws.kept_offsets[row + 1]]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    # Irrational-looking values keep a cut from falling exactly onto a boundary that fp32 and fp64 round apart.
    top_p=st.sampled_from([0.1017, 0.5031, 0.9511, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.0313, 0.4177]),
)


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(-6, 6), min_size=11, max_size=11), samplings, st.integers(-(2**70), 2**70)),
        min_size=1,
        max_size=6,
    ),
    position=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_kept_sets_are_the_definition_ties_included(rows, position):
    # Integer logits tie often, so boundaries fall between equal probabilities.
    logits = np.array([values for values, _, _ in rows], np.float32) / 2
    params = SamplingRows.of([s for _, s, _ in rows], [seed for _, _, seed in rows])
    draws = sample(logits, params, np.full(len(rows), position))
    for row, (_, sampling, _) in enumerate(rows):
        whole = sampling.temperature > 0 and sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
        expected = kept_by_hand(logits[row], sampling)
        assert kept_row(draws, row).tolist() == ([] if whole else expected)
        assert draws.token_ids[row] in expected
        restricted = torch.log_softmax(torch.tensor(logits[row][expected]) / (sampling.temperature or 1.0), dim=0)
        np.testing.assert_allclose(
            draws.logprobs[row], restricted[expected.index(draws.token_ids[row])], atol=2e-6, rtol=0
        )


def test_ties_at_every_boundary_go_to_the_lowest_ids():
    flat = np.zeros((4, 8), np.float32)
    # Two of eight equal tokens have exactly the mass 0.25, which is enough; 0.3 needs a third.
    samplings_ = [Sampling(top_k=3, top_p=1.0), Sampling(top_p=0.3), Sampling(top_p=0.25), Sampling(temperature=0.0)]
    draws = sample(flat, SamplingRows.of(samplings_, [1, 2, 3, 4]), np.zeros(4, np.int64))
    assert [kept_row(draws, row).tolist() for row in range(4)] == [[0, 1, 2], [0, 1, 2], [0, 1], [0]]
    assert draws.token_ids[3] == 0 and draws.logprobs[3] == 0


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_p=1.0), Sampling(temperature=0.7, top_p=0.9), Sampling(top_p=0.95, top_k=6, min_p=0.02)],
    ids=["whole", "top_p", "all"],
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_distribution(sampling, varies):
    """Pearson's chi-square over 40,000 fixed draws, against its 99.99 % quantile (Wilson-Hilferty)."""
    num_draws = 40_000
    logits = np.array([[1.5, 0.2, -1.0, 0.9, 0.0, 2.1, -0.5, 0.4, -2.0, 1.1, 0.7, -3.0]], np.float32)
    numbers = np.arange(num_draws)
    rows = SamplingRows.of([sampling], [7]).take(np.zeros(num_draws, np.int64))
    if varies == "seed":
        rows = SamplingRows.of([sampling] * num_draws, numbers.tolist())
    positions = numbers if varies == "position" else np.full(num_draws, 31)
    counts = np.bincount(sample(np.repeat(logits, num_draws, axis=0), rows, positions).token_ids, minlength=12)
    kept = kept_by_hand(logits[0], sampling)
    expected = np.zeros(12)
    expected[kept] = torch.softmax(torch.tensor(logits[0][kept]).double() / sampling.temperature, 0) * num_draws
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[kept].sum()
    freedom = len(kept) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_neighbouring_seeds_and_positions_are_independent():
    """Over 100,000 uniforms: lag-one correlations within four standard errors, fifty bins filled evenly within five."""
    count = 100_000
    numbers = np.arange(count)
    for draws in (uniform(numbers.astype(np.uint64), np.zeros(count)), uniform(np.full(count, 5, np.uint64), numbers)):
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / math.sqrt(count)
        assert abs(np.bincount((draws * 50).astype(int), minlength=50) - count / 50).max() < 5 * math.sqrt(count / 50)
    assert abs(np.corrcoef(uniform(np.full(count, 1), numbers), uniform(np.full(count, 2), numbers))[0, 1]) < 0.02


def test_a_row_does_not_depend_on_the_rows_beside_it():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(40, 131)).astype(np.float32) * 3
    settings_ = [Sampling(top_p=0.9), Sampling(top_p=1.0), Sampling(top_k=5), Sampling(temperature=0.0)]
    rows = SamplingRows.of([settings_[i % 4] for i in range(40)], list(range(40)))
    positions = generator.integers(0, 500, 40)
    whole = sample(logits, rows, positions)
    for chosen in ([3], [39, 0, 17, 2], list(range(40))[::-1]):
        part = sample(logits[chosen], rows.take(np.array(chosen)), positions[chosen])
        np.testing.assert_array_equal(part.token_ids, whole.token_ids[chosen])
        np.testing.assert_array_equal(part.logprobs, whole.logprobs[chosen])
        for row, original in enumerate(chosen):
            np.testing.assert_array_equal(kept_row(part, row), kept_row(whole, original))


def test_impossible_tokens_are_never_drawn_and_nan_is_an_error():
    logits = np.full((2, 9), -np.inf, np.float32)
    logits[:, 4] = [0.0, -80.0]
    rows = SamplingRows.of([Sampling(top_p=1.0), Sampling(top_p=0.9)], [0, 1])
    assert sample(logits, rows, np.zeros(2)).token_ids.tolist() == [4, 4]
    for bad in (np.nan, np.inf):
        logits[1, 2] = bad
        with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="row 1"):
            sample(logits, rows, np.zeros(2))
