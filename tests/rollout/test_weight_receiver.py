"""How often a receiver opens what a sender exports, with the opening itself replaced: it needs a GPU."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.transport import StagingBuffers
from rollout import weight_receiver as module
from rollout.weight_receiver import WeightReceiver

updates = st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=5), min_size=1, max_size=4)


@given(updates)
def test_a_buffer_is_opened_once_and_held_while_it_is_offered(updates: list[list[int]]):
    """A second opening would be a second release, of which torch counts one: the sender would never get it back."""
    staging, receiver = StagingBuffers(2, torch.device("cpu")), WeightReceiver(torch.device("cpu"))
    opened: Counter[str] = Counter()

    def open_buffer(handle: str, device: torch.device) -> torch.Tensor:
        opened[handle] += 1
        return staging._buffers[staging._turn]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_buffer", open_buffer)
        for sizes in updates:  # an odd number of buckets begins the next update in the other buffer
            for size in sizes:
                sent = {"weight": torch.rand(size)}
                bucket, _ = staging.pack(sent)
                received = receiver.take([(bucket.to_json(), str(staging.number))])
                assert torch.equal(received["weight"], sent["weight"])
                assert len(receiver._opened) <= 2
    assert set(opened.values()) == {1}
