"""One training sequence of an episode while it grows: an append-only stream of tokens with everything beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.sample import Kept, NDArray, Prompt, Sample
from rl.selections import Selections
from rollout.engine import Completion


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [begin, end) that one reply sampled."""

    begin: int
    end: int


class TokenStream:
    """Starts as an encoded prompt; replies and results of tools are appended, and nothing ever changes.

    A reply is generated from all the tokens before it, so its completion also says how those were routed. A position
    keeps the route with which it was first fed: its own log-probabilities were computed with that one. The last token
    of a reply is fed only when the next reply is generated, and gets its route then. So it is with selections.
    """

    def __init__(self, token_ids: NDArray) -> None:
        """token_ids: int32 [P]."""
        self._ids = [token_ids.astype(np.int32, copy=False)]
        self._logprobs = [np.zeros(len(token_ids), np.float32)]
        self._versions = [np.full(len(token_ids), -1, np.int32)]
        self._kept_ids: list[NDArray] = []
        self._kept_sizes = [np.zeros(len(token_ids), np.int64)]
        self._truncated = False  # whether any reply has kept sets
        self._routes: NDArray | None = None  # [T, moe_layers, top_k] of as many tokens as were ever routed
        self._routed = np.zeros(0, bool)
        self._selections: Selections | None = None  # of as many tokens as were ever fed
        self._length = len(token_ids)
        self.num_prompt = len(token_ids)
        self.replies: list[Span] = []

    def __len__(self) -> int:
        return self._length

    @property
    def token_ids(self) -> NDArray:
        """int32 [T], all so far."""
        if len(self._ids) > 1:
            self._ids = [np.concatenate(self._ids)]
        return self._ids[0]

    @property
    def num_sampled(self) -> int:
        return sum(span.end - span.begin for span in self.replies)

    def append_text(self, token_ids: NDArray) -> None:
        """Appends tokens that the policy did not choose, int32 [R]."""
        count = len(token_ids)
        self._ids.append(token_ids.astype(np.int32, copy=False))
        self._logprobs.append(np.zeros(count, np.float32))
        self._versions.append(np.full(count, -1, np.int32))
        self._kept_sizes.append(np.zeros(count, np.int64))
        self._length += count

    def append_reply(self, completion: Completion) -> None:
        """Appends what was generated from exactly the tokens so far."""
        begin, count = self._length, len(completion.token_ids)
        self._ids.append(completion.token_ids.astype(np.int32, copy=False))
        self._logprobs.append(completion.logprobs)
        self._versions.append(completion.versions)
        if completion.kept is None:
            self._kept_sizes.append(np.zeros(count, np.int64))
        else:
            self._truncated = True
            self._kept_ids.append(completion.kept.ids)
            self._kept_sizes.append(completion.kept.sizes)
        self._length += count
        self.replies.append(Span(begin, begin + count))
        self._take_routes(completion)
        self._take_selections(completion)

    def sample(self, prompt: Prompt, **fields: Any) -> Sample:
        """The stream as a sample; `fields` are the sample's own, such as ``index`` and ``status``."""
        sampled = np.zeros(self._length, bool)
        for span in self.replies:
            sampled[span.begin : span.end] = True
        kept = None
        if self._truncated:
            ids = np.concatenate(self._kept_ids).astype(np.int32, copy=False)
            kept = Kept(ids=ids, offsets=np.concatenate([[0], np.cumsum(np.concatenate(self._kept_sizes))]))
        routes = routed = None
        if self._routes is not None:
            missing = self._length - len(self._routes)
            routes = np.concatenate([self._routes, np.zeros((missing, *self._routes.shape[1:]), self._routes.dtype)])
            routed = np.concatenate([self._routed, np.zeros(missing, bool)])
        return Sample(
            prompt=prompt,
            token_ids=self.token_ids,
            sampled=sampled,
            rollout_logprobs=np.concatenate(self._logprobs).astype(np.float32, copy=False),
            versions=np.concatenate(self._versions),
            kept=kept,
            routes=routes,
            routed=routed,
            selections=None if self._selections is None else self._selections.extended(self._length),
            **fields,
        )

    def _take_routes(self, completion: Completion) -> None:
        if completion.routes is None or completion.routed is None:
            return
        if len(completion.routes) != self._length:
            raise ValueError(f"a reply was routed over {len(completion.routes)} tokens, but there are {self._length}")
        if self._routes is None:
            self._routes = np.zeros((0, *completion.routes.shape[1:]), completion.routes.dtype)
        known = np.concatenate([self._routed, np.zeros(self._length - len(self._routed), bool)])
        routes = completion.routes.copy()
        routes[: len(self._routes)][self._routed] = self._routes[self._routed]
        self._routes, self._routed = routes, known | completion.routed

    def _take_selections(self, completion: Completion) -> None:
        found = completion.selections
        if found is None:
            return
        if len(found) != self._length:
            raise ValueError(f"a reply's selections are of {len(found)} tokens, but there are {self._length}")
        self._selections = found if self._selections is None else self._selections.extended(len(found)).filled(found)
