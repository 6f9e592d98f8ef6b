"""The types refuse what would otherwise become a shape error far away."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.sample import Group, Kept, Prompt, Sample, Scored
from rl.selections import Selections, bytes_per_token

PROMPT = Prompt(id="math/17", domain="math", messages=({"role": "user", "content": "2+2?"},))


def make(**changes):
    """Two prompt tokens, two sampled ones, a tool's token, and a last sampled one."""
    fields = {
        "prompt": PROMPT,
        "index": 3,
        "token_ids": np.array([5, 6, 7, 8, 9, 7], np.int32),
        "sampled": np.array([0, 0, 1, 1, 0, 1], bool),
        "rollout_logprobs": np.array([0, 0, -0.5, -1.0, 0, -0.1], np.float32),
        "versions": np.array([-1, -1, 4, 4, -1, 2], np.int32),
    }
    return Sample(**{**fields, **changes})


ROWS = [[], [], [1, 7], [8], [], [2, 7, 9]]


def selections(keys=((0, 1), (1, 2), (0, 4)), *, length=6, first=2):
    """Of two layers that keep 2 tokens; the last position is never fed."""
    recorded = (np.arange(length) >= first) & (np.arange(length) < first + len(keys))
    return Selections.of(np.repeat(np.array(keys)[: recorded.sum(), None], 2, axis=1), recorded)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 400), top_k=st.integers(1, 30), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_selections_come_back_from_bits_and_from_positions(length, top_k, seed, share):
    rng = np.random.default_rng(seed)
    recorded = (np.arange(length) >= top_k) & (rng.random(length) < share)
    rows = [[np.sort(rng.choice(t + 1, top_k, replace=False)) for _ in range(3)] for t in np.flatnonzero(recorded)]
    keys = np.array(rows, np.int64).reshape(-1, 3, top_k)
    made = Selections.of(keys, recorded)
    np.testing.assert_array_equal(made.keys, keys)
    assert made.fault() is None and len(made) == length
    assert made.rows.nbytes == len(keys) * 3 * min(-(-length // 8), 2 * top_k)
    assert made.rows.nbytes <= len(keys) * bytes_per_token(3, top_k, length)
    half = recorded & (np.arange(length) % 2 == 0)
    part = Selections.of(keys[half[recorded]], half)
    whole = part.filled(made)
    np.testing.assert_array_equal(whole.keys, keys)
    np.testing.assert_array_equal(whole.recorded, recorded)
    longer = made.extended(length + 500)
    np.testing.assert_array_equal(longer.keys, keys)
    assert len(longer) == length + 500 and longer.fault() is None


def test_at_the_size_of_v32_a_token_takes_a_quarter_of_a_megabyte():
    assert bytes_per_token(61, 2048, 1 << 16) == 61 * 2048 * 2
    assert bytes_per_token(61, 2048, 1 << 17) == 61 * 2048 * 4
    assert bytes_per_token(61, 2048, 1 << 14) == 61 * 2048
    assert bytes_per_token(61, 2048, 2048) == 0


def kept(rows=ROWS):
    return Kept.from_rows([np.array(row, np.int32) for row in rows])


def test_a_sample_knows_its_name_and_counts():
    sample = make(kept=kept(), routes=np.zeros((6, 2, 2), np.uint8), routed=np.ones(6, bool))
    assert (sample.id, len(sample), sample.num_sampled, sample.oldest_version) == ("math/17#3", 6, 3, 2)
    nothing = make(sampled=np.zeros(6, bool), rollout_logprobs=np.zeros(6, np.float32))
    assert nothing.num_sampled == 0 and nothing.oldest_version == -1
    with pytest.raises(FrozenInstanceError):
        sample.index = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_an_episode_counts_over_all_of_its_sequences():
    first = make(part=0, versions=np.array([-1, -1, 1, 4, -1, 2], np.int32))
    episode = make(earlier=(first, make(part=1)))
    assert [sequence.id for sequence in episode.sequences] == ["math/17#3.0", "math/17#3.1", "math/17#3"]
    assert (episode.num_sampled, episode.num_generated, episode.oldest_version) == (3, 9, 1)
    with pytest.raises(ValueError, match="math/17#3: its earlier sequences are not numbered from 0"):
        make(earlier=(first, first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_logprobs": np.zeros(5, np.float32)}, "math/17#3: rollout_logprobs has 5 entries for 6 tokens"),
        ({"versions": np.zeros(7, np.int32)}, "versions has 7 entries for 6 tokens"),
        ({"sampled": np.zeros(1, bool)}, "sampled has 1 entries for 6 tokens"),
        ({"routes": np.zeros((5, 2, 2), np.uint8)}, "routes has 5 entries for 6 tokens"),
        ({"kept": kept(ROWS[:5])}, "kept has 5 entries for 6 tokens"),
        ({"routed": np.ones(6, bool)}, "routed is given without routes"),
        ({"selections": selections(length=5)}, "math/17#3: selections has 5 entries for 6 tokens"),
        (
            {"selections": replace(selections(), rows=selections().rows[1:])},
            r"math/17#3: selections has rows of shape \(2, 2, 1\) for 3 recorded positions, each 1 wide",
        ),
        ({"selections": selections([[0, 1], [1, 2], [0, 3]], first=1)}, "row for position 1, which sees 2 tokens"),
        ({"selections": selections([[0, 1], [0, 0], [0, 3]])}, "keeps 1 tokens for position 3 in layer 0, not 2"),
        ({"selections": selections([[0, 3], [0, 1], [0, 4]])}, "keeps a later token for position 2"),
        (
            {"selections": replace(selections(), rows=selections().keys[:, :, ::-1])},
            "math/17#3: selections does not ascend for position 2",
        ),
        ({"sampled": np.ones(6, bool)}, "the first token has no context"),
        ({"rollout_logprobs": np.full(6, -1, np.float32)}, "must be 0 where nothing was sampled"),
        ({"rollout_logprobs": np.array([0, 0, -0.5, -np.inf, 0, 0], np.float32)}, "not finite"),
        ({"rollout_logprobs": np.array([0, 0, np.nan, 0, 0, 0], np.float32)}, "not finite"),
        ({"kept": kept([[], [], [1, 7], [7], [], [7]])}, "token 3 lies outside its own kept set"),
    ],
)
def test_a_sample_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("changes", [{"messages": ()}, {"token_ids": np.zeros(1, np.int32)}])
def test_a_prompt_has_messages_or_tokens(changes):
    with pytest.raises(ValueError, match="prompt math/17: give either"):
        replace(PROMPT, **changes)


@given(st.lists(st.frozensets(st.integers(0, 9), max_size=6), max_size=8), st.data())
def test_kept_rows_say_what_they_contain(sets, data):
    tokens = np.array([data.draw(st.integers(0, 9)) for _ in sets], np.int32)
    built = kept([sorted(row) for row in sets])
    assert len(built) == len(sets)
    assert built.sizes.tolist() == [len(row) for row in sets]
    assert built.contains(tokens).tolist() == [int(token) in row for token, row in zip(tokens, sets, strict=True)]
    assert (built.ids.dtype, built.offsets.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("offsets", [[], [1, 2], [0, 1], [0, 3, 2]])
def test_kept_refuses_offsets_that_do_not_partition_the_ids(offsets):
    with pytest.raises(ValueError, match="offsets"):
        Kept(ids=np.zeros(2, np.int32), offsets=np.array(offsets, np.int64))


def test_a_reward_must_be_finite():
    with pytest.raises(ValueError, match="math/17#3: reward nan is not finite"):
        Scored(sample=make(), reward=float("nan"))


def test_a_group_of_siblings():
    newer = make(versions=np.array([-1, -1, 4, 4, -1, 4], np.int32))
    scored = (Scored(sample=newer, reward=1.0), Scored(sample=make(), reward=0.0))
    group = Group(prompt=PROMPT, scored=scored)
    assert group.rewards.tolist() == [1.0, 0.0] and not group.zero_variance and group.oldest_version == 2
    assert Group(prompt=PROMPT, scored=scored[:1]).zero_variance
    empty = Group(prompt=PROMPT, scored=(), failed=8)
    assert empty.zero_variance and empty.oldest_version == -1 and empty.rewards.shape == (0,)
