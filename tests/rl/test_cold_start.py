"""The order of demonstrations, and those that cannot be used. The stage itself runs in test_train."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import build_byte_tokenizer
from rl.cold_start import encode_demonstrations, shuffled_batches
from rl.data import load_data
from rl.errors import DataError
from rollout.conversation import Conversation
from tests.rl.tiny_runs import REWARDS, tiny_recipe
from trainer.supervised import EncodedDemonstration

END = "<｜end▁of▁sentence｜>"


def demonstrations(number: int) -> list[EncodedDemonstration]:
    tokens = np.arange(3, dtype=np.int32)
    return [EncodedDemonstration(id=str(n), token_ids=tokens, trained=tokens > 0) for n in range(number)]


@given(number=st.integers(1, 12), batch_size=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_epoch_holds_every_demonstration_once(number: int, batch_size: int, seed: int):
    num_batches = -(-3 * number // batch_size)
    batches = list(islice(shuffled_batches(demonstrations(number), batch_size, seed=seed), num_batches))
    assert all(len(batch) == batch_size for batch in batches)
    drawn = [one.id for batch in batches for one in batch]
    for epoch in range(3):
        assert sorted(drawn[epoch * number : (epoch + 1) * number], key=int) == [str(n) for n in range(number)]


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs():
    def order(seed: int) -> list[str]:
        return [one.id for batch in islice(shuffled_batches(demonstrations(20), 20, seed=seed), 2) for one in batch]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:20] != order(1)[20:]


def test_demonstrations_train_the_reply_alone(tmp_path: Path):
    recipe = tiny_recipe(
        tmp_path, "supervised.steps=1", f"supervised.demonstrations.function={REWARDS}:says_the_prompt"
    )
    tokenizer = build_byte_tokenizer()
    assert tokenizer.eos_token == END
    encoded = encode_demonstrations(recipe, load_data(recipe), Conversation(tokenizer))
    assert len(encoded) == 24
    for one in encoded:
        trained = tokenizer.decode(one.token_ids[one.trained])
        assert isinstance(trained, str)
        assert trained.endswith(END)
        assert trained.removesuffix(END) in tokenizer.decode(one.token_ids[~one.trained])


def test_a_demonstration_that_does_not_fit_is_named(tmp_path: Path):
    recipe = tiny_recipe(
        tmp_path,
        "supervised.steps=1",
        f"supervised.demonstrations.function={REWARDS}:says_the_prompt",
        "model.max_context=12",
    )
    with pytest.raises(DataError, match=r"demonstration for sums/\d+ has \d+ tokens .* window holds 12"):
        encode_demonstrations(recipe, load_data(recipe), Conversation(build_byte_tokenizer()))
