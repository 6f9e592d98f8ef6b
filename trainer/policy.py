"""What the learner computes on a micro-batch: the log-probability of every sampled token, and the entropy there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import kernels
from model import KeySelection, LanguageModel, Routing
from trainer.domain_gradients import DomainGradients
from trainer.pack import Microbatch
from trainer.selections import key_selection


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """A micro-batch on the learner's device; R of its N tokens were sampled."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    cu_seqlens: Tensor  # int64 [S + 1]
    sampled: Tensor  # bool [N]
    routes: Routing | None  # of [1, N] tokens
    selection: KeySelection | None  # None where it is not kept; notes what the latest forward would have selected
    kept_ids: Tensor | None  # int32 [M]
    kept_offsets: Tensor | None  # int64 [R + 1], rows of the sampled tokens only

    @classmethod
    def of(
        cls,
        micro: Microbatch,
        device: torch.device | str,
        *,
        keep_routing: bool = True,
        keep_sampling_mask: bool = True,
        index_topk: int | None = None,
    ) -> PackedTokens:
        """Moves a micro-batch; recordings that the objective does not replay stay behind.

        ``index_topk`` is the model's where it replays selections, and None where it does not.
        """

        def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            # Arrays that Ray delivered are read-only views of its object store; torch asks for its own.
            return torch.tensor(array, dtype=dtype, device=device)

        routes = kept_ids = kept_offsets = None
        if keep_routing and micro.routes is not None and micro.routed is not None:
            experts = tensor(micro.routes, torch.long).unsqueeze(0)
            routes = Routing(experts=experts, recorded=tensor(micro.routed, torch.bool).unsqueeze(0))
        if keep_sampling_mask and micro.kept is not None:
            sizes = micro.kept.sizes
            kept_ids = tensor(micro.kept.ids[np.repeat(micro.sampled, sizes)], torch.int32)
            kept_offsets = tensor(np.concatenate([[0], np.cumsum(sizes[micro.sampled])]), torch.long)
        return cls(
            token_ids=tensor(micro.token_ids, torch.long),
            positions=tensor(micro.positions, torch.long),
            cu_seqlens=tensor(micro.cu_seqlens, torch.long),
            sampled=tensor(micro.sampled, torch.bool),
            routes=routes,
            selection=None if index_topk is None else key_selection(micro, index_topk, device),
            kept_ids=kept_ids,
            kept_offsets=kept_offsets,
        )


class PolicyOutput(NamedTuple):
    """A tuple, because ZeRO-3 finds the tensors to hook only in tuples, lists and dicts."""

    logprobs: Tensor  # fp32 [N], 0 where not sampled
    entropy: Tensor  # fp32 [N], nats over the kept set, without gradient; 0 where not sampled
    indexer_loss: Tensor | None  # scalar, summed over tokens and layers


class Policy(nn.Module):
    """The model with its log-probabilities in one ``forward``, so that every parameter is used under ZeRO's hooks."""

    def __init__(self, model: LanguageModel, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.domain_gradients: DomainGradients | None = None

    def forward(
        self,
        tokens: PackedTokens,
        *,
        replay_routes: bool = True,
        indexer_loss: Literal["dense", "sparse"] | None = None,
    ) -> PolicyOutput:
        """Entry t of the output is about choosing token t, which the hidden state of token t - 1 decides.

        Log-probabilities are those of softmax(logits / temperature) over the token's kept set. Selections are replayed
        where they were recorded, and so are routes, unless ``replay_routes`` is False.

        Raises:
            ValueError: a sampled token lies outside its own kept set.
        """
        output = self.model.backbone(
            tokens.token_ids.unsqueeze(0),
            positions=tokens.positions.unsqueeze(0),
            cu_seqlens=tokens.cu_seqlens,
            routes=tokens.routes if replay_routes else None,
            indexer_loss=indexer_loss,
            selection=tokens.selection,
        )
        rows = tokens.sampled.nonzero().squeeze(1)
        # A sequence's first token is never sampled, so t - 1 lies in the same sequence. With no sampled token at all
        # this still gives the head a (zero) gradient: ranks must agree on which parameters have one.
        hidden = output.hidden[0, rows - 1]
        if self.domain_gradients is not None:
            self.domain_gradients.observe(hidden)
        logprobs, entropy = kernels.kept_logprobs(
            hidden,
            self.model.lm_head.weight,
            tokens.token_ids[rows],
            tokens.kept_ids,
            tokens.kept_offsets,
            temperature=self.temperature,
        )
        blank = logprobs.new_zeros(tokens.token_ids.shape[0])
        return PolicyOutput(
            logprobs=blank.index_copy(0, rows, logprobs),
            entropy=blank.index_copy(0, rows, entropy.detach()),
            indexer_loss=output.indexer_loss,
        )
