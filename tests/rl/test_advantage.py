import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantage import group_advantages

rewards_of_a_group = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


@given(rewards_of_a_group)
def test_is_the_reward_minus_the_group_mean(rewards):
    mean = statistics.fmean(rewards)
    np.testing.assert_allclose(group_advantages(np.array(rewards)), [r - mean for r in rewards], atol=1e-12)


@given(rewards_of_a_group)
def test_division_by_the_population_std(rewards):
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    expected = [(r - mean) / (std + 1e-6) for r in rewards]
    np.testing.assert_allclose(group_advantages(np.array(rewards), divide_by_std=True), expected, atol=1e-6)


@given(st.floats(-1e3, 1e3), st.integers(1, 50), st.booleans())
def test_equal_rewards_leave_exactly_nothing(reward, size, divide_by_std):
    assert not group_advantages(np.full(size, reward), divide_by_std=divide_by_std).any()


def test_rounding_noise_is_not_blown_up():
    noisy = np.array([0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2])
    assert np.abs(group_advantages(noisy, divide_by_std=True)).max() < 1e-6


def test_empty_group_has_no_advantages():
    assert group_advantages(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("rewards", [np.array([1.0, np.nan]), np.array([np.inf, 0.0]), np.ones((2, 2))])
def test_refuses_what_is_not_one_finite_number_each(rewards):
    with pytest.raises(ValueError, match="one finite number"):
        group_advantages(rewards)
