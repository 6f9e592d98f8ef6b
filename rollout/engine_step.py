"""One step of an engine, as what it recorded travels from vLLM's processes to `rollout.step_records`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rl.sample import NDArray

_DTYPES = {
    "starts": np.int64,
    "counts": np.int64,
    "sampled": np.uint8,
    "token_ids": np.int32,
    "logprobs": np.float32,
    "kept_sizes": np.int32,
    "kept_starts": np.int32,
    "kept_ids": np.int32,
    "rows": np.uint8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an engine: B requests, of which R tokens were fed and N were given a next token.

    A row is what a token's forward pass recorded, W bytes; a request's rows are of the tokens from ``starts`` on.
    """

    names: str  # of the B requests, divided by "\n"
    starts: NDArray  # int64 [B], the position of a request's first fed token
    counts: NDArray  # int64 [B], how many of it were fed; none where no rows are recorded
    sampled: NDArray  # uint8 [B], 1 for the requests that got a token
    token_ids: NDArray  # int32 [N]
    logprobs: NDArray  # float32 [N]
    kept_sizes: NDArray | None  # int32 [N]; None where kept sets are not recorded
    kept_starts: NDArray  # int32 [N], where a token's set begins among the next ones; of no meaning for an empty set
    kept_ids: NDArray  # int32, of these sets and maybe others
    rows: NDArray  # uint8 [R, W]
    block: int = 0  # tokens of a block of the engine's prefix cache
    generation: int = 0  # how often that cache was cleared before

    def to_plain(self) -> dict[str, Any]:
        """As text, bytes and integers, for whatever can carry these."""
        streams = {name: getattr(self, name) for name in _DTYPES}
        plain = {
            name: np.asarray(stream, _DTYPES[name]).tobytes() for name, stream in streams.items() if stream is not None
        }
        return {
            "names": self.names,
            "block": self.block,
            "generation": self.generation,
            "width": self.rows.shape[1],
            **plain,
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Self:
        streams = {n: np.frombuffer(plain[n], dtype) for n, dtype in _DTYPES.items() if n in plain}
        streams["rows"] = streams["rows"].reshape(int(streams["counts"].sum()), plain["width"])
        others = {name: plain[name] for name in ("names", "block", "generation")}
        return cls(**others, **{"kept_sizes": None, **streams})
