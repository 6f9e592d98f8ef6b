"""Between our requests and completions and vLLM's sampling parameters and outputs; knows vLLM by its shapes only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model.outline import ModelOutline
from rl.errors import DataError, RunStopped
from rl.sample import Kept, NDArray
from rl.selections import Selections
from rollout.engine import Completion, Finish, Request, check_window, truncates
from rollout.step_records import Record

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM raises lower temperatures to the former without a word, and refuses higher ones than the latter."""

_MAX_SEED = (1 << 63) - 1
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORT}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a vLLM engine records of the model it runs."""

    vocab_size: int
    num_experts: int
    moe_layers: tuple[int, ...]  # layers with routed experts; vLLM has a row for every layer, zeros for the others
    experts_per_token: int
    kept: bool  # whether it was built to return kept sets
    max_context: int
    num_layers: int = 0
    index_topk: int | None = None  # where it returns what sparse attention selected: behind a row's experts, as bits

    @classmethod
    def of(cls, model: ModelOutline, *, kept: bool, max_context: int, index_topk: int | None = None) -> Recording:
        return cls(
            vocab_size=model.vocab_size,
            num_experts=model.num_experts,
            moe_layers=model.moe_layers,
            experts_per_token=model.experts_per_token,
            kept=kept,
            max_context=max_context,
            num_layers=model.num_layers,
            index_topk=index_topk,
        )

    @property
    def route_dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint8 if self.num_experts <= 256 else np.uint16

    @cached_property
    def routed_layers(self) -> slice | list[int]:
        """``moe_layers``, as what takes them out of an array of all layers."""
        layers = self.moe_layers
        follow_each_other = layers == tuple(range(layers[0], layers[0] + len(layers)))
        return slice(layers[0], layers[-1] + 1) if follow_each_other else list(layers)

    @property
    def _expert_bytes(self) -> int:
        return self.experts_per_token * np.dtype(self.route_dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """What the forward pass of a token records: experts of every layer, and keys as words of 32."""
        words = 0 if self.index_topk is None else -(-self.max_context // 32)
        return self.num_layers * (self._expert_bytes + 4 * words) if self.moe_layers else 0


def check_request(request: Request, recording: Recording) -> None:
    """Raises DataError, naming the request, for what vLLM would misread or refuse."""
    check_window(f"request {request.id}: the prompt", len(request.token_ids), recording.max_context)
    foreign = (request.token_ids < 0) | (request.token_ids >= recording.vocab_size)
    if foreign.any():
        raise DataError(
            f"request {request.id}: token id {request.token_ids[foreign][0]} is outside the model's vocabulary of "
            f"{recording.vocab_size}; the tokenizer and the model do not belong together"
        )
    temperature = request.sampling.temperature
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise DataError(
            f"request {request.id}: sampling.temperature is {temperature}, but vLLM samples at {MIN_TEMPERATURE} to "
            f"{MAX_TEMPERATURE:g} only (0 takes the likeliest token)"
        )


def sampling_arguments(request: Request, recording: Recording) -> dict[str, Any]:
    """The keyword arguments of vLLM's SamplingParams.

    An engine that returns kept sets refuses temperature 0 and ``top_k`` 0. The likeliest token is the only one that
    top-k 1 keeps, and a top-k of the whole vocabulary keeps every token, so neither is lost.
    """
    sampling = request.sampling
    if sampling.temperature == 0:
        drawing = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    else:
        drawing = {
            "temperature": sampling.temperature,
            "top_k": min(sampling.top_k or recording.vocab_size, recording.vocab_size),
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
    return {
        **drawing,
        "max_tokens": min(sampling.max_tokens, recording.max_context - len(request.token_ids)),
        "seed": request.seed & _MAX_SEED,  # vLLM reads -1 as "no seed"
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": True,  # config.json's own token would stop a request that does not name it
        "logprobs": 0,  # of the sampled token only
        "flat_logprobs": True,
        "detokenize": False,
    }


def to_completion(output: Any, record: Record, request: Request, recording: Recording) -> Completion:
    """Of a finished ``vllm.outputs.CompletionOutput``, and what was recorded of it.

    Raises ValueError when the two are not of the same tokens, RunStopped for log-probabilities that are no numbers.
    """
    token_ids, num_tokens = record.token_ids, len(output.token_ids)
    if token_ids.tolist() != list(output.token_ids):
        raise ValueError(f"request {request.id}: what was recorded of it are not vLLM's {num_tokens} tokens")
    kept = None
    if recording.kept and truncates(request.sampling):
        kept = record.kept
        if kept is None or len(kept) != num_tokens:
            raise ValueError(f"request {request.id}: there are not as many kept sets as its {num_tokens} tokens")
    _check_finite(record.logprobs, token_ids, kept, request)
    kept = kept and _with_whole_sets(kept, recording.vocab_size)
    routes, routed, selections = _rows(record, recording)
    return Completion(
        token_ids=token_ids,
        logprobs=record.logprobs,
        versions=_versions(output.weight_versions, num_tokens, request.id) if num_tokens else np.zeros(0, np.int32),
        kept=kept,
        routes=routes,
        routed=routed,
        selections=selections,
        finish=_FINISH[output.finish_reason],
    )


def _with_whole_sets(kept: Kept, vocab_size: int) -> Kept:
    """With the ids of sets that hold all of them, which engines leave out."""
    if kept.sizes.all():
        return kept
    spans = itertools.pairwise(kept.offsets.tolist())
    every = np.arange(vocab_size, dtype=np.int32)
    return Kept.from_rows([kept.ids[start:end] if end > start else every for start, end in spans])


def _check_finite(logprobs: NDArray, token_ids: NDArray, kept: Kept | None, request: Request) -> None:
    """Of what was drawn they are finite; NaN: the model's outputs were NaN, -inf: sampling had ruled the token out."""
    finite = np.isfinite(logprobs)
    if finite.all():
        return
    wrong = np.flatnonzero(~finite)
    first = int(wrong[0])
    among = "" if kept is None else f", out of {kept.sizes[first]} that sampling kept"
    raise RunStopped(
        f"request {request.id}: {len(wrong)} of vLLM's {len(logprobs)} log-probabilities are not finite, first "
        f"{logprobs[first]} of reply token {first} (id {token_ids[first]}{among}) after a prompt of "
        f"{len(request.token_ids)}; "
        "see whether it comes with rollout.sleep=false, rollout.cuda_graphs=false or rollout.dsa=keel too"
    )


def _versions(spans: Sequence[Any] | None, num_tokens: int, name: str) -> NDArray:
    """int32 [C] of vLLM's spans (version, start, end), which follow each other without a gap."""
    spans = spans or []
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != num_tokens or [span.start for span in spans] != edges[:-1]:
        raise ValueError(f"request {name}: vLLM's weight versions do not cover its {num_tokens} tokens")
    parts = [np.full(span.end - span.start, int(span.version), np.int32) for span in spans]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rows(record: Record, recording: Recording) -> tuple[NDArray | None, NDArray | None, Selections | None]:
    """routes [P + C, moe_layers, top_k], routed [P + C] and the keys that follow them (`rollout.vllm_dsa`)."""
    if not recording.moe_layers:
        return None, None, None
    length, width = len(record.recorded), recording._expert_bytes
    rows = record.rows.reshape(length, recording.num_layers, -1)
    experts = np.ascontiguousarray(rows[:, recording.routed_layers, :width]).view(recording.route_dtype)
    selections = None
    if (top_k := recording.index_topk) is not None:
        recorded = record.recorded & (np.arange(length) >= top_k)
        selections = Selections.of_bits(rows[recorded][..., width:], recorded, top_k)
    return experts, record.recorded, selections
