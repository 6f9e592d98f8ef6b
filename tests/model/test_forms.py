"""One function, several ways to compute it: whole, packed, cached."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import CacheView, DeepseekV32, LatentCache, Routing
from tests.model.shapes import SHAPES, attention, gradients, make_config, make_model, relative_error, tokens

FORMS = ["base", "yarn and groups", "odd sizes", "only dense layers", "nothing left out"]


def decode(
    module: DeepseekV32, cache: LatentCache, ids: torch.Tensor, slots: torch.Tensor, prompts: list[int]
) -> torch.Tensor:
    """Logits of right-padded ids [B, T]: the prompts in one ragged prefill, the rest token by token."""
    num_rows, num_tokens = ids.shape
    longest = max(prompts)
    positions = torch.arange(longest).expand(num_rows, -1).clone()
    lengths = torch.tensor(prompts)
    positions[positions >= lengths.unsqueeze(1)] = -1
    view = CacheView(cache=cache, slots=slots, lengths=lengths)
    first = module.backbone(ids[:, :longest], positions=positions, cache=view).hidden
    hidden = torch.zeros(num_rows, num_tokens, first.shape[-1])
    hidden[:, :longest] = first
    for place in range(min(prompts), num_tokens):
        # Sequences still within their prompt sit this step out, as padding.
        current = torch.where(lengths <= place, place, -1).unsqueeze(1)
        view = CacheView(cache=cache, slots=slots, lengths=lengths.clamp(min=place + 1))
        step = module.backbone(ids[:, place : place + 1], positions=current, cache=view).hidden
        hidden[:, place] = torch.where(current >= 0, step[:, 0], hidden[:, place])
    return module.lm_head(hidden)


@pytest.mark.parametrize("shape", FORMS)
def test_ragged_prefill_and_decode_are_the_full_forward(shape: str) -> None:
    module = make_model(make_config(**SHAPES[shape]))
    ids = tokens(4, 29)
    cache = LatentCache(module.config, num_slots=6, max_len=40)
    with torch.no_grad():
        wanted = module(ids)
        found = decode(module, cache, ids, torch.tensor([4, 0, 5, 2]), [11, 3, 17, 8])
    assert (found - wanted).abs().max() < 1e-4


def test_a_reused_slot_shows_nothing_of_its_past() -> None:
    module = make_model(make_config())
    cache = LatentCache(module.config, num_slots=2, max_len=32)
    slots = torch.tensor([1, 0])
    with torch.no_grad():
        decode(module, cache, tokens(2, 30, seed=5), slots, [9, 12])
        ids = tokens(2, 20, seed=6)
        assert (decode(module, cache, ids, slots, [5, 2]) - module(ids)).abs().max() < 1e-4


def test_prefill_in_two_pieces_is_prefill_in_one() -> None:
    module = make_model(make_config())
    ids = tokens(2, 24)
    slots = torch.arange(2)
    cache = LatentCache(module.config, num_slots=2, max_len=24)
    parts = []
    for start, end in ((0, 10), (10, 24)):
        view = CacheView(cache=cache, slots=slots, lengths=torch.full((2,), end))
        positions = torch.arange(start, end).expand(2, -1)
        parts.append(module.backbone(ids[:, start:end], positions=positions, cache=view).hidden)
    wanted = module.backbone(ids).hidden
    assert (torch.cat(parts, dim=1) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("lengths", "positions", "message"),
    [([9], [[8]], "does not fit"), ([4], [[4]], "lengths must count")],
)
def test_a_cache_refuses_what_it_cannot_hold(lengths: list[int], positions: list[list[int]], message: str) -> None:
    module = make_model(make_config())
    view = CacheView(
        cache=LatentCache(module.config, num_slots=1, max_len=8),
        slots=torch.tensor([0]),
        lengths=torch.tensor(lengths),
    )
    with pytest.raises(ValueError, match=message):
        module.backbone(tokens(1, 1), positions=torch.tensor(positions), cache=view)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 24), min_size=1, max_size=7).filter(any))
def test_packed_is_unpacked(lengths: list[int]) -> None:
    module = make_model(make_config())
    row = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = module.backbone(row, cu_seqlens=cu_seqlens, record_routes=True)
    assert packed.routes is not None
    alone = [module.backbone(part, record_routes=True) for part in row.split(lengths, dim=1) if part.shape[1]]
    assert (packed.hidden - torch.cat([one.hidden for one in alone], dim=1)).abs().max() < 1e-4
    assert torch.equal(packed.routes, torch.cat([one.routes for one in alone if one.routes is not None], dim=1))


def test_packed_gradients_are_unpacked_gradients() -> None:
    module = make_model(make_config())
    lengths = [5, 17, 9, 1, 20]
    row = tokens(1, sum(lengths))
    direction = torch.randn(1, sum(lengths), module.config.hidden_size)
    output = module.backbone(row, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), indexer_loss="sparse")
    assert output.indexer_loss is not None
    ((output.hidden * direction).sum() + output.indexer_loss).backward()
    packed = gradients(module)
    module.zero_grad()
    for part, along in zip(row.split(lengths, dim=1), direction.split(lengths, dim=1), strict=True):
        alone = module.backbone(part, indexer_loss="sparse")
        assert alone.indexer_loss is not None
        ((alone.hidden * along).sum() + alone.indexer_loss).backward()
    unpacked = gradients(module)
    assert packed.keys() == unpacked.keys()
    assert max(relative_error(packed[name], unpacked[name]) for name in packed) < 1e-4


@pytest.mark.parametrize("bounds", [[0, 4, 9], [1, 4, 10], [0, 6, 4, 10], [0]])
def test_cu_seqlens_that_do_not_describe_the_row_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        make_model(make_config())(tokens(1, 10), cu_seqlens=torch.tensor(bounds))


def test_arguments_that_do_not_go_together_are_refused() -> None:
    module = make_model(make_config())
    view = CacheView(
        cache=LatentCache(module.config, num_slots=1, max_len=8), slots=torch.tensor([0]), lengths=torch.tensor([3])
    )
    with pytest.raises(ValueError, match="takes positions"):
        module.backbone(tokens(1, 3), cache=view)
    with pytest.raises(ValueError, match="single row"):
        module.backbone(tokens(2, 3), cu_seqlens=torch.tensor([0, 3]))


def test_positions_turn_the_angles_only() -> None:
    """RoPE is relative, so a constant offset changes nothing; another spacing does."""
    module = make_model(make_config())
    ids = tokens(1, 15)
    wanted = module(ids)
    assert (module(ids, positions=torch.arange(7, 22).unsqueeze(0)) - wanted).abs().max() < 1e-4
    assert (module(ids, positions=torch.arange(0, 30, 2).unsqueeze(0)) - wanted).abs().max() > 1e-2


def test_indexer_runs_on_request_even_when_nothing_is_left_out() -> None:
    """What ZeRO-3 relies on: with always_index, the same modules run whatever the lengths."""
    module = make_model(make_config(index_topk=4096))
    ran: list[int] = []
    for layer in range(3):
        attention(module, layer).indexer.register_forward_hook(lambda *_: ran.append(1))
    wanted = module(tokens(1, 9))
    assert not ran
    module.always_index = True
    assert torch.equal(module(tokens(1, 9)), wanted)
    assert len(ran) == 3


def test_cached_forward_replays_routes_too() -> None:
    module = make_model(make_config())
    ids = tokens(1, 12)
    experts = torch.randint(8, (1, 12, 2, 2))
    routes = Routing(experts=experts, recorded=torch.ones(1, 12, dtype=torch.bool))
    cache = LatentCache(module.config, num_slots=1, max_len=12)
    view = CacheView(cache=cache, slots=torch.tensor([0]), lengths=torch.tensor([12]))
    cached = module.backbone(ids, positions=torch.arange(12).unsqueeze(0), cache=view, routes=routes).hidden
    assert (cached - module.backbone(ids, routes=routes).hidden).abs().max() < 1e-4
