"""Search over a local corpus: BM25, reading page by page, and finding a passage."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from rl.errors import RecipeError
from rl.records import read_records
from rl.sample import Prompt
from rollout.environments.protocol import Environment, ToolError, tool

PAGE = 4000
"""Characters of a document that one call shows."""
_SNIPPET = 240
_MOST_PASSAGES = 8
_SHIPPED = Path(__file__).parents[2] / "recipes" / "data" / "archipelago.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One entry of the corpus."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents and their index; read only, so that all episodes share one."""

    documents: tuple[Document, ...]
    places: Mapping[str, int]  # of documents, by id
    index: bm25s.BM25

    def best(self, query: str, count: int) -> list[Document]:
        """The documents that fit the query best, those without any of its words left out."""
        words = bm25s.tokenize(query, show_progress=False)
        found, scores = self.index.retrieve(words, k=min(count, len(self.documents)), show_progress=False)
        ranked = zip(np.atleast_2d(found)[0].tolist(), np.atleast_2d(scores)[0].tolist(), strict=True)
        return [self.documents[place] for place, score in ranked if score > 0]


@cache
def load_corpus(path: str) -> Corpus:
    """A JSONL or Parquet file of ``{id, title, text}``. Raises DataError for a bad row."""
    documents: list[Document] = []
    places: dict[str, int] = {}
    for record in read_records(path):
        record.check_spelling(("id", "title", "text"))
        fields = record.fields
        text = fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise record.error("text must be a text that is not empty")
        name = str(fields.get("id", len(documents)))
        if name in places:
            raise record.error(f"id '{name}' is taken already")
        places[name] = len(documents)
        documents.append(Document(id=name, title=str(fields.get("title") or name), text=text))
    index = bm25s.BM25()
    index.index(
        bm25s.tokenize([f"{one.title}\n{one.text}" for one in documents], show_progress=False), show_progress=False
    )
    return Corpus(documents=tuple(documents), places=places, index=index)


class Search(Environment):
    """Tools that search, open and find.

    Args:
        corpus: a JSONL or Parquet file of ``{id, title, text}``; without one, the small corpus that ships, which
            describes an archipelago that does not exist.
        results: the most results of one search.
    """

    isolated = False

    def __init__(self, prompt: Prompt, *, corpus: str | None = None, results: int = 5) -> None:
        self._corpus = load_corpus(corpus or str(_SHIPPED))
        self._results = results
        self._opened: list[str] = []
        self._num_searches = 0

    @classmethod
    def check(cls, *, corpus: str | None = None, results: int = 5, **_: Any) -> None:
        if results < 1:
            raise RecipeError(f"search: results is {results}; it must be 1 or more")
        load_corpus(corpus or str(_SHIPPED))

    @tool
    async def search(self, query: str) -> list[dict[str, str]]:
        """Finds documents by their words. Returns the id, the title and the beginning of a fitting passage of each.

        query: words to look for, such as names and subjects
        """
        if not query.strip():
            raise ToolError("the query is empty")
        self._num_searches += 1
        found = await asyncio.to_thread(self._corpus.best, query, self._results)
        return [{"id": one.id, "title": one.title, "passage": _passage(one.text, query)} for one in found]

    @tool
    def open(self, id: str, page: int = 1) -> str:
        """Shows a document.

        id: the document's id, as a search returned it
        page: which page of a long document, from 1 on
        """
        document = self._document(id)
        pages = max(1, -(-len(document.text) // PAGE))
        if not 1 <= page <= pages:
            raise ToolError(f"document {id} has the pages 1 to {pages}, and no page {page}")
        self._opened.append(id)
        text = document.text[(page - 1) * PAGE : page * PAGE]
        return f"{document.title} (page {page} of {pages})\n\n{text}"

    @tool
    def find(self, id: str, text: str) -> str:
        """Finds a text in a document, regardless of upper and lower case. Returns each place with what is around it.

        id: the document's id
        text: what to find
        """
        document = self._document(id)
        if not text.strip():
            raise ToolError("there is nothing to find in an empty text")
        places = [match.start() for match in re.finditer(re.escape(text), document.text, re.IGNORECASE)]
        if not places:
            return f"'{text}' does not occur in document {id}"
        shown = [_around(document.text, place, len(text)) for place in places[:_MOST_PASSAGES]]
        return f"{len(places)} places\n" + "\n".join(f"- {passage}" for passage in shown)

    def final_state(self) -> dict[str, Any]:
        return {"searches": self._num_searches, "opened": list(self._opened)}

    def _document(self, name: str) -> Document:
        place = self._corpus.places.get(name)
        if place is None:
            raise ToolError(f"there is no document with the id '{name}'; ids come from search")
        return self._corpus.documents[place]


def _passage(text: str, query: str) -> str:
    """What is around the first of the query's longer words that occurs; the beginning where none does."""
    words = sorted(re.findall(r"\w+", query), key=len, reverse=True)
    found = (re.search(re.escape(word), text, re.IGNORECASE) for word in words)
    first = next((match for match in found if match), None)
    return _around(text, first.start() if first else 0, 0)


def _around(text: str, place: int, length: int) -> str:
    begin, end = max(0, place - _SNIPPET // 2), place + length + _SNIPPET // 2
    shown = " ".join(text[begin:end].split())
    return f"{'...' if begin else ''}{shown}{'...' if end < len(text) else ''}"
