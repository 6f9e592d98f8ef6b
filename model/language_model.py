"""A causal language model as the learner and the engines see it, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.attention import IndexerLoss
from model.cache import CacheView, SlotCache
from model.indexer import IndexArithmetic
from model.key_selection import KeySelection
from model.moe import Routing
from model.outline import ModelOutline


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneOutput:
    """What `LanguageModel.backbone` returns."""

    hidden: torch.Tensor  # [B, T, hidden_size] after the final norm
    routes: torch.Tensor | None  # int64 [B, T, moe_layers, top_k], when record_routes was set
    indexer_loss: torch.Tensor | None  # scalar, summed over query tokens and layers, when asked for


class LanguageModel(nn.Module, ABC):
    """Embedding, layers and final norm behind `backbone`, and a bias-free `lm_head` that logits are computed with.

    `always_index`: run the indexer's projections, if there are any, even in a forward that leaves no key out. ZeRO-3
    needs it where ranks may disagree on that, because they must all gather the same parameters in the same order.
    `index_arithmetic`: how the indexer selects in packed sequences, so that a learner can follow an engine.
    """

    outline: ModelOutline
    lm_head: nn.Linear
    always_index: bool = False
    index_arithmetic: IndexArithmetic = "plain"

    @abstractmethod
    def backbone(
        self,
        input_ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: CacheView | None = None,
        routes: Routing | None = None,
        record_routes: bool = False,
        indexer_loss: IndexerLoss | None = None,
        selection: KeySelection | None = None,
    ) -> BackboneOutput:
        """Everything but the head, over input_ids int [B, T].

        Whole sequences (no cache): a row is a sequence, or, with cu_seqlens (int [S + 1], and B = 1), several packed
        ones that do not attend to each other. Attention is causal by order; `positions` (int [B, T]) only sets the
        rotary angles and defaults to the place within the sequence.

        With a cache: `positions` is required, -1 marks padding (not written, output meaningless); every query is first
        written and then sees its slot's entries up to its own position. No gradient.

        `indexer_loss` (whole sequences, models with an indexer) adds the indexer's KL to the attention's own
        distribution, which alone trains the indexer and trains nothing else. "sparse" (TR Eq. 4): over the selected
        keys, attention as ever. "dense" (Eq. 3), the warm-up stage: over all keys, and this forward's attention also
        uses all of them.

        `selection` (models with an indexer) gives queries of whole sequences the keys they attend to, and takes what
        the indexer chooses by itself; the indexer's loss is then over the keys that are given.

        Raises ValueError for arguments that do not go together.
        """

    @property
    @abstractmethod
    def index_topk(self) -> int | None:
        """The most keys that a query attends to, chosen by a lightning indexer; None in a model without one."""

    @property
    def has_indexer(self) -> bool:
        """Whether attention selects its keys by a lightning indexer."""
        return self.index_topk is not None

    @abstractmethod
    def new_cache(self, num_slots: int, max_len: int) -> SlotCache:
        """`num_slots` sequences of at most `max_len` tokens each, in the dtype and on the device of the head."""

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """The contents of the checkpoint's config.json, but for the dtype."""

    @abstractmethod
    def checkpoint_names(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor in memory as the (name, tensor) pairs of a checkpoint, where experts are tensors of their own."""

    @abstractmethod
    def recompute_activations(self) -> None:
        """Keeps only the input of each layer for the backward pass, which computes the layer again (same bits)."""

    def fill_constants(self) -> None:
        """Computes the buffers that checkpoints do not hold, in a model that was on the meta device."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters and persistent buffers, tied ones once, in the order of `outline.tensors`."""
        live = self.state_dict(keep_vars=True)
        return ((name, live[name]) for name in self.outline.tensors)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        routes: Routing | None = None,
    ) -> torch.Tensor:
        """Next-token logits [B, T, vocab_size] of input_ids [B, T]; the arguments are those of `backbone`."""
        output = self.backbone(input_ids, positions=positions, cu_seqlens=cu_seqlens, routes=routes)
        return self.lm_head(output.hidden)
