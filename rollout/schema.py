"""Replies in a promised form: which tokens may come next so that a reply becomes a JSON object by its schema."""

from __future__ import annotations

from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from transformers import PreTrainedTokenizerBase

from rl.sample import NDArray

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The form that judges are shown (json.dumps's), and no other: a model could fill its budget with blanks."""


class SchemaReader:
    """Makes guides for the replies of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """``vocab_size``: of the logits, which may be larger than the tokenizer's."""
        self._vocab_size = vocab_size
        self._tokenizer: Any = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)  # pyright: ignore[reportArgumentType]

    def guide(self, schema: str) -> SchemaGuide:
        """For one reply. Raises ValueError for a schema that cannot be followed."""
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ValueError(f"the JSON schema cannot be read: {error}") from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the JSON schema cannot be followed: {matcher.get_error().splitlines()[0]}")
        return SchemaGuide(matcher, self._vocab_size)


class SchemaGuide:
    """How far one reply has come. After the object only the tokenizer's end-of-sentence token may follow."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._allowed = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size

    def forbid(self, logits: NDArray) -> None:
        """Sets the logits [V] of tokens that cannot come next to -inf."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._allowed)
        allowed = np.unpackbits(self._allowed[0].view(np.uint8), bitorder="little")[: self._vocab_size]
        logits[allowed == 0] = -np.inf

    def take(self, token_id: int) -> None:
        """Notes what came next."""
        self._matcher.consume_token(token_id)
