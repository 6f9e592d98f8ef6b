"""Keep Selection in the model: the keys that sparse attention keeps, as an indexer chooses them or as given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from model.packing import Batch, SequenceGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenKeys:
    """What R of a batch's queries attend to, whatever their indexer would choose. Only indices: scores stay live."""

    queries: torch.Tensor  # int64 [R], places among the tokens of all sequences, one after another
    keys: torch.Tensor  # int16 or int32 [R, layers, index_topk], places within the query's sequence, ascending, then -1
    complete: bool  # whether no other query that sees more than index_topk keys matters: nothing looks back on it


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySelection:
    """What one forward attends to, and what its indexer says of it. Belongs to that forward alone."""

    given: GivenKeys | None = None
    own: dict[int, torch.Tensor] | None = None
    """A dict to be filled, by layer: the keys that the layer chooses by itself, places within the sequence, ascending,
    then -1; of packed sequences int32 [N, index_topk], against a cache int64 [B, Q, index_topk]. A forward that leaves
    nothing out chooses none."""
    identical: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """By layer and group of sequences, int64 []: how many of the given sets the layer would have chosen too. Of layers
    that had to choose at all: their own loss looks at the scores in any case, or some query's keys are not given."""

    @property
    def spares_choice(self) -> bool:
        """Whether nobody asks what the indexer would choose."""
        return self.given is not None and self.given.complete and self.own is None

    def keep(self, layer: int, places: torch.Tensor) -> None:
        """Notes what a layer chose by itself, where that is asked for."""
        if self.own is not None:
            self.own[layer] = places

    def settle(self, layer: int, chosen: torch.Tensor | None, batch: Batch, top_k: int) -> torch.Tensor:
        """What a layer attends to, int32 [N, top_k], rows of the packed row, where it chose `chosen` (the same).

        None is what it chose that did not need to.
        """
        selected = _first_keys(batch, top_k) if chosen is None else chosen
        if chosen is not None and self.own is not None:
            self.keep(layer, torch.where(chosen >= 0, chosen - batch.starts.unsqueeze(1), -1))
        given = self.given
        if given is None:
            return selected
        keys = given.keys[:, layer].int()
        keys = torch.where(keys >= 0, keys + batch.starts[given.queries].unsqueeze(1), -1)
        if chosen is not None:
            self.identical[layer, 0] = (chosen[given.queries] == keys).all(dim=1).sum()
        return selected.index_copy(0, given.queries, keys)

    def settle_mask(
        self, layer: int, chosen: torch.Tensor | None, group: SequenceGroup, batch: Batch, number: int
    ) -> torch.Tensor:
        """As `settle` for group `number` of padded sequences: bool [S or 1, T, T], which keys each query attends to."""
        mask = group.causal if chosen is None else chosen
        given = self.given
        if given is None:
            return mask
        sequence, token, row = _within(given, group, batch)
        keys = given.keys[row, layer].long()
        size = group.num_tokens
        marks = mask.new_zeros(len(row), size + 1).scatter_(1, torch.where(keys < 0, size, keys), True)[:, :size]
        if chosen is not None:
            self.identical[layer, number] = (chosen[sequence, token] == marks).all(dim=1).sum()
        mask = mask.expand(group.num_sequences, size, size).clone()
        mask[sequence, token] = marks
        return mask


def _first_keys(batch: Batch, top_k: int) -> torch.Tensor:
    """int32 [N, top_k]: the keys of queries that see no more than so many; of others, the first ones."""
    places = batch.starts.unsqueeze(1) + torch.arange(top_k, dtype=torch.int32, device=batch.starts.device)
    return torch.where(places < batch.ends.unsqueeze(1), places, -1)


def _within(given: GivenKeys, group: SequenceGroup, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries of a group whose keys are given, int64 [M] each: sequence, token, and row of `given`."""
    row = torch.full(batch.starts.shape, -1, dtype=torch.long, device=batch.starts.device)
    row[given.queries] = torch.arange(len(given.queries), device=row.device)
    packed = group.rows is not None
    rows = group.take(row.unsqueeze(0) if packed else row.view(group.num_sequences, group.num_tokens))
    # Padding repeats a sequence's last token, which may be among them.
    real = group.take(batch.positions) == torch.arange(group.num_tokens, device=row.device)
    sequence, token = ((rows >= 0) & real).nonzero(as_tuple=True)
    return sequence, token, rows[sequence, token]
