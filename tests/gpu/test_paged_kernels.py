"""Sparse attention against a paged cache at a model's sizes: the learner's selection, equal bits, CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import kernels
from kernels import reference
from model.rope import Rope, RotaryAngles
from tests.model.shapes import make_config

PAGE, TOP_K, LATENT, DIM = 64, 512, 512, 576
LENGTHS, ROWS = [3000, 700, 5, 4096], [600, 1, 5, 3]


CONFIG = make_config(qk_rope_head_dim=64, index_head_dim=128)


@dataclass
class Batch:
    queries: torch.Tensor
    index_queries: torch.Tensor
    weights: torch.Tensor
    cache: torch.Tensor
    key_pages: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    keys: list[torch.Tensor]  # of each sequence, in its own order

    def located(self) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.locate_rows(self.starts, self.lengths, len(self.queries))

    def run(
        self, part: slice, owners: torch.Tensor, seen: torch.Tensor, longest: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.index_queries[part], self.key_pages, self.weights[part], self.table
        places = kernels.select_paged_keys(*index, owners[part], seen[part], TOP_K, longest)
        rows = kernels.cache_rows(places, self.table, owners[part], PAGE, PAGE)
        return places, kernels.paged_sparse_attention(self.queries[part], self.cache, rows, 0.1, LATENT)


@pytest.fixture(scope="module", params=[(16, 32), (128, 64)], ids=["16 heads", "128 heads"])
def batch(request: pytest.FixtureRequest) -> Batch:
    heads, index_heads = request.param
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    counts = [-(-length // PAGE) for length in LENGTHS]
    order = torch.randperm(sum(counts), generator=generator, device="cuda").int()
    table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32, device="cuda")
    cache, key_pages = normal(sum(counts) * PAGE, DIM), normal(sum(counts), PAGE, 128)
    keys = []
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count], order[count:]
        keys.append(key_pages[table[row, :count].long()].flatten(0, 1)[: LENGTHS[row]])
    num_rows = sum(ROWS) + 2
    return Batch(
        queries=normal(num_rows, heads, DIM),
        index_queries=normal(num_rows, index_heads, 128),
        weights=normal(num_rows, index_heads).float(),
        cache=cache,
        key_pages=key_pages,
        table=table,
        starts=torch.tensor([0, *torch.tensor(ROWS).cumsum(0).tolist()], dtype=torch.int32, device="cuda"),
        lengths=torch.tensor(LENGTHS, dtype=torch.int32, device="cuda"),
        keys=keys,
    )


def test_pages_and_packed_rows_select_the_same_keys(batch: Batch) -> None:
    """`select_keys` is what the learner calls: not a bit of a score may differ, or ties would fall differently."""
    owners, seen = batch.located()
    places, _ = batch.run(slice(None), owners, seen, max(LENGTHS))
    for row, (first, count) in enumerate(zip(batch.starts.tolist(), ROWS, strict=False)):
        part = slice(first, first + count)
        begin = torch.zeros(count, dtype=torch.int32, device="cuda")
        learned = kernels.select_keys(
            batch.index_queries[part], batch.keys[row], batch.weights[part], begin, seen[part], TOP_K
        )
        assert torch.equal(learned, places[part])


def test_attention_over_the_selected_keys(batch: Batch) -> None:
    owners, seen = batch.located()
    places, found = batch.run(slice(None), owners, seen)
    rows = reference.cache_rows(places, batch.table, owners, PAGE, PAGE)
    assert torch.equal(rows, kernels.cache_rows(places, batch.table, owners, PAGE, PAGE))
    some = slice(560, 609)
    inputs = batch.queries[some].double(), batch.cache.double(), rows[some]
    wanted = reference.paged_sparse_attention(*inputs, 0.1, LATENT)
    error = (found[some].double() - wanted).norm() / wanted.norm()
    print(f"relative error {error:.1e}")
    assert error < 1e-2
    assert bool((found[-2:] == 0).all()) and bool((places[-2:] == -1).all())


def test_a_rows_bits_do_not_depend_on_the_batch(batch: Batch) -> None:
    owners, seen = batch.located()
    places, found = batch.run(slice(None), owners, seen)
    for part in (slice(0, 1), slice(3, 67), slice(599, 601), slice(100, 600), slice(605, 609)):
        for longest in (None, max(LENGTHS)):
            alone = batch.run(part, owners, seen, longest)
            assert torch.equal(alone[0], places[part]) and torch.equal(alone[1], found[part])


def test_rows_are_stored_where_their_slots_say(batch: Batch) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    pages = torch.zeros(9, 2 * PAGE, DIM, dtype=torch.bfloat16, device="cuda")[:, :PAGE]
    slots = torch.randperm(9 * PAGE, generator=generator, device="cuda")[:200]
    slots[::7] = -1
    rows = torch.randn(200, DIM, generator=generator, device="cuda").bfloat16()
    wanted = pages.clone()
    reference.store_rows(wanted, slots, rows)
    kernels.store_rows(pages, slots, rows)
    assert torch.equal(pages, wanted) and bool(pages.any())


@pytest.mark.parametrize("interleaved", [False, True], ids=["half split", "interleaved"])
def test_rotated_heads_are_the_models(interleaved: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(333, 16, 192, generator=generator, device="cuda").bfloat16()[..., 64:]
    x = x[..., 64:] if interleaved else x
    cos, sin = Rope(CONFIG)(torch.arange(333, device="cuda")[None] * 17).of_tokens(torch.Size([1, 333]))
    angles = RotaryAngles(cos, sin)
    turned = (angles.rotate_interleaved if interleaved else angles.rotate_half_split)(x[None, ..., :64])[0]
    out = torch.zeros(333, 16, 300, dtype=torch.bfloat16, device="cuda")[..., : x.shape[-1]]
    kernels.rotate_heads(out, x, cos[0], sin[0], interleaved=interleaved)
    assert torch.equal(out, torch.cat([turned, x[..., 64:]], dim=-1))


@pytest.mark.parametrize(("depth", "columns"), [(7168, 64), (768, 32)], ids=str)
def test_projections_in_fp32(depth: int, columns: int) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(700, depth, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(columns, depth, generator=generator, device="cuda").bfloat16()
    wanted, found = x.double() @ weight.double().T, kernels.project_in_fp32(x, weight)
    error = float((found.double() - wanted).norm() / wanted.norm())
    print(f"relative error {error:.1e}")
    assert error < 1e-5
    for part in (slice(0, 1), slice(5, 22), slice(100, 700)):
        assert torch.equal(kernels.project_in_fp32(x[part], weight), found[part])


def test_a_captured_step_serves_other_lengths(batch: Batch) -> None:
    """Owners and lengths change under the graph, as they do from one decode step to the next."""
    owners, seen = batch.located()
    part = slice(600, 609)
    held_owners, held_seen = owners.clone(), seen.clone()
    batch.run(part, held_owners, held_seen)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places, found = batch.run(part, held_owners, held_seen)
    for shorter in (0, 1, 500):
        held_seen.copy_((seen - shorter).clamp(min=0))
        graph.replay()
        wanted = batch.run(part, owners, held_seen)
        assert torch.equal(places, wanted[0]) and torch.equal(found, wanted[1])
