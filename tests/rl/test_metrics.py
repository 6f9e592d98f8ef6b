import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rl.metrics import Mean, merge, values


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=5))
def test_any_split_has_the_mean_of_the_whole(numbers, cuts):
    parts = np.split(np.array(numbers), sorted(min(cut, len(numbers)) for cut in cuts))
    merged = merge({"x": Mean(float(part.sum()), float(len(part)))} for part in parts)
    assert merged["x"].count == len(numbers)
    np.testing.assert_allclose(float(merged["x"]), np.mean(numbers), rtol=1e-9, atol=1e-9)


def test_names_that_only_some_measured_keep_their_own_weight():
    merged = merge([{"a": Mean(1.0, 2.0)}, {"b": Mean(3.0, 1.0)}, {"a": Mean(5.0, 1.0)}])
    assert values(merged) == {"a": 2.0, "b": 3.0}


def test_the_mean_of_nothing_is_zero():
    assert float(Mean(0.0, 0.0)) == 0.0 and merge([]) == {}
