"""Between our requests and completions and vLLM's sampling parameters and outputs; knows vLLM by its shapes only.

Nothing here loops over tokens in Python: vLLM's lists of lists are flattened by iterators that run in C.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.outline import ModelOutline
from rl.errors import DataError, RunStopped
from rl.sample import Kept, NDArray
from rl.selections import Selections
from rollout.engine import Completion, Finish, Request, check_window, truncates

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM raises lower temperatures to the former without a word, and refuses higher ones than the latter."""

_MAX_SEED = (1 << 63) - 1
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORT}


@dataclass(frozen=True, slots=True, kw_only=True)
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


def to_completion(output: Any, request: Request, recording: Recording) -> Completion:
    """A finished ``vllm.outputs.CompletionOutput``.

    Raises ValueError when its streams do not fit its tokens, RunStopped for log-probabilities that are no numbers.
    """
    token_ids = np.array(output.token_ids, np.int32)
    num_tokens = len(token_ids)
    kept = None
    if recording.kept and truncates(request.sampling):
        kept = _kept(output.sampling_mask.token_ids if num_tokens else [], request.id, num_tokens)
    logprobs = _logprobs(output.logprobs, token_ids, request.id)
    _check_finite(logprobs, token_ids, kept, request)
    rows, selections = output.routed_experts, None
    if recording.index_topk is not None:
        rows, selections = _selections(rows, len(request.token_ids) + num_tokens, recording, recording.index_topk)
    routes, routed = _routes(rows, request, recording, num_tokens)
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        versions=_versions(output.weight_versions, num_tokens, request.id) if num_tokens else np.zeros(0, np.int32),
        kept=kept,
        routes=routes,
        routed=routed,
        selections=selections,
        finish=_FINISH[output.finish_reason],
    )


def _logprobs(flat: Any, token_ids: NDArray, name: str) -> NDArray:
    """Of a ``FlatLogprobs``, whose only entry a position is the sampled token."""
    if len(token_ids) == 0:
        return np.zeros(0, np.float32)
    if not np.array_equal(np.array(flat.token_ids, np.int32), token_ids):
        raise ValueError(f"request {name}: vLLM's log-probabilities are not those of the sampled tokens")
    return np.array(flat.logprobs, np.float32)


def _check_finite(logprobs: NDArray, token_ids: NDArray, kept: Kept | None, request: Request) -> None:
    """Of what was drawn they are finite; NaN: the model's outputs were NaN, -inf: sampling had ruled the token out."""
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if len(wrong) == 0:
        return
    first = int(wrong[0])
    among = "" if kept is None else f", out of {kept.sizes[first]} that sampling kept"
    raise RunStopped(
        f"request {request.id}: {len(wrong)} of vLLM's {len(logprobs)} log-probabilities are not finite, first "
        f"{logprobs[first]} of reply token {first} (id {token_ids[first]}{among}) after a prompt of "
        f"{len(request.token_ids)}; "
        "see whether it comes with rollout.sleep=false, rollout.cuda_graphs=false or rollout.dsa=keel too"
    )


def _kept(rows: Sequence[Sequence[int]], name: str, num_tokens: int) -> Kept:
    if len(rows) != num_tokens:
        raise ValueError(f"request {name}: vLLM returned {len(rows)} kept sets for {num_tokens} tokens")
    sizes = np.fromiter(map(len, rows), np.int64, count=num_tokens)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, count=int(offsets[-1]))
    return Kept(ids=ids, offsets=offsets)


def _versions(spans: Sequence[Any] | None, num_tokens: int, name: str) -> NDArray:
    """int32 [C] of vLLM's spans (version, start, end), which follow each other without a gap."""
    spans = spans or []
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != num_tokens or [span.start for span in spans] != edges[:-1]:
        raise ValueError(f"request {name}: vLLM's weight versions do not cover its {num_tokens} tokens")
    return np.repeat(np.array([int(span.version) for span in spans], np.int32), np.diff(edges))


def _routes(
    rows: NDArray | None, request: Request, recording: Recording, num_tokens: int
) -> tuple[NDArray | None, NDArray | None]:
    """routes [P + C, moe_layers, top_k] and routed [P + C]; what vLLM has no row for was not recorded."""
    if not recording.moe_layers:
        return None, None
    length = len(request.token_ids) + num_tokens
    shape = (length, len(recording.moe_layers), recording.experts_per_token)
    routes = np.zeros(shape, recording.route_dtype)
    num_rows = 0 if rows is None else min(len(rows), length)
    if rows is not None:
        routes[:num_rows] = rows[:num_rows, list(recording.moe_layers)]
    return routes, np.arange(length) < num_rows


def _selections(
    rows: NDArray | None, length: int, recording: Recording, top_k: int
) -> tuple[NDArray | None, Selections]:
    """The experts of rows uint8 [R, layers, bytes], and what else they say (`rollout.vllm_dsa.RoutesAndKeys`)."""
    num_rows, order = 0 if rows is None else min(len(rows), length), np.arange(length)
    recorded = (order >= top_k) & (order < num_rows)
    if rows is None:
        return None, Selections.of(np.zeros((0, recording.num_layers, top_k), np.uint16), recorded)
    width = recording.experts_per_token * np.dtype(recording.route_dtype).itemsize
    experts = np.ascontiguousarray(rows[..., :width]).view(recording.route_dtype)
    return experts, Selections.of_bits(rows[:num_rows, :, width:][recorded[:num_rows]], recorded, top_k)
