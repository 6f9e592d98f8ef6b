"""Where prompts come from, which of them are held out for evaluation, and the order in which they are drawn.

A source is a file, ``data/math.jsonl`` or ``{file: data/math.parquet, template: "..."}``, whose rows have the fields

    prompt | messages   the question as a text, or a whole chat
    answer              whatever the domain's rewards need (optional)
    id                  a name that is unique in the file (optional; the row's number otherwise)
    tools               list of JSON functions the policy may call (optional)

or a procedural task, ``{reasoning_gym: chain_sum, size: 10000, seed: 0, args: {min_terms: 2}, template: "..."}``. Its
prompts are the library's question texts, and their answer is the library's whole entry, which its scorer needs.

A template rewrites the question. ``{question}`` stands for it and, for a procedural task, the entry's metadata have
their names: ``"{expression} ="`` shortens chain_sum. Braces without one word between them, as in ``\\boxed{}``, stay.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rl.config import Domain
from rl.errors import DataError, RecipeError, did_you_mean
from rl.procedural import entries
from rl.prompt_styles import styled
from rl.records import Record, read_records
from rl.sample import Prompt

_FIELDS = ("id", "prompt", "messages", "answer", "tools")
_FILE_KEYS = ("file", "template")
_TASK_DEFAULTS = {"reasoning_gym": None, "size": 10_000, "seed": 0, "args": {}}
_TASK_KEYS = (*_TASK_DEFAULTS, "template")
_ENDS = ("user", "developer", "tool")
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
_HOLD_OUT = 0xE7A1  # separates this use of the run's seed from others


def load_prompts(name: str, domain: Domain, source: Any = None, *, prefix: str | None = None) -> list[Prompt]:
    """All prompts of a domain, in the source's order. ``source`` defaults to ``domain.prompts``.

    Prompt ids are ``<prefix>/<id or number>``, where the prefix is the domain's name unless another is given.
    Raises RecipeError for a source that cannot be, DataError for a bad row.
    """
    source = domain.prompts if source is None else source
    prefix = name if prefix is None else prefix
    place = f"domains.{name}.prompts"
    if isinstance(source, str):
        source = {"file": source}
    if not isinstance(source, Mapping):
        raise RecipeError(f"{place} must be a file or {{reasoning_gym: task}}, not {source!r}")
    procedural = "reasoning_gym" in source
    _check_keys(source, _TASK_KEYS if procedural else _FILE_KEYS, place)
    template = _Template(source["template"], place) if source.get("template") is not None else None
    if procedural:
        rows = _procedural_rows(source, template, place)
    elif isinstance(source.get("file"), str):
        rows = _file_rows(source["file"], template)
    else:
        raise RecipeError(f"{place} must name a file or a reasoning_gym task")
    return [_prompt(name, domain, prefix, row) for row in rows]


def load_split(name: str, domain: Domain, num_eval: int, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts of a domain; no question is in both.

    Evaluation prompts come from ``domain.eval_prompts`` where it is set (at most ``num_eval`` of them; all of its
    questions leave the training prompts) and are held out of ``domain.prompts`` otherwise.
    """
    prompts = load_prompts(name, domain)
    if domain.eval_prompts is None or num_eval == 0:
        return split(prompts, num_eval, seed=seed)
    apart = load_prompts(name, domain, domain.eval_prompts, prefix=f"{name}/eval")
    asked = {question(prompt) for prompt in apart}
    training = [prompt for prompt in prompts if question(prompt) not in asked]
    if not training:
        raise RecipeError(f"domains.{name}: every one of its prompts is also one of its eval_prompts")
    _, evaluation = split(apart, min(num_eval, len(asked)), seed=seed, leave=0)
    return training, evaluation


def split(prompts: Sequence[Prompt], num_eval: int, *, seed: int, leave: int = 1) -> tuple[list[Prompt], list[Prompt]]:
    """Holds out ``num_eval`` different questions; training prompts keep their order and share no question with them.

    Told apart by the text of the question, so a duplicate under another id cannot leak. Raises RecipeError when fewer
    than ``leave`` different questions would remain to train on.
    """
    first = {}
    for prompt in prompts:
        first.setdefault(question(prompt), prompt)
    if num_eval and len(first) - num_eval < leave:
        raise RecipeError(
            f"domain {prompts[0].domain if prompts else '?'}: {len(first)} different prompts are too few to hold out "
            f"{num_eval} of them for evaluation; lower evaluation.num_prompts or add prompts"
        )
    questions = list(first)
    chosen = np.random.default_rng([seed, _HOLD_OUT]).permutation(len(questions))[:num_eval]
    held_out = {questions[index] for index in sorted(chosen)}
    training = [prompt for prompt in prompts if question(prompt) not in held_out]
    return training, [first[text] for text in questions if text in held_out]


def question(prompt: Prompt) -> str:
    """What identifies a prompt: its token ids, or its messages without the system's, white space evened out."""
    if prompt.token_ids is not None:
        return " ".join(map(str, prompt.token_ids))
    asked = (message for message in prompt.messages if message["role"] != "system")
    return "\n".join(f"{message['role']}: {' '.join(str(message.get('content')).split())}" for message in asked)


class PromptStream:
    """Draws prompts for ever: the domains in proportion to their weights, each domain's prompts in epochs.

    The next domain is the one furthest behind its share, so any stretch of the stream has nearly the recipe's mixture.
    An epoch holds every prompt of the domain once, in a fresh shuffle. The whole stream is a function of ``seed``, and
    its state is how many prompts each domain has given.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float], *, seed: int) -> None:
        for name, members in prompts.items():
            if not members:
                raise RecipeError(f"domains.{name} has no prompts to train on")
            if not weights[name] > 0 or weights[name] == float("inf"):
                raise RecipeError(f"domains.{name}.weight must be a number above 0, not {weights[name]}")
        if not prompts:
            raise RecipeError("the recipe has no domains; add one under domains")
        total = sum(weights[name] for name in prompts)
        self._prompts = {name: list(members) for name, members in prompts.items()}
        self._shares = {name: weights[name] / total for name in prompts}
        self._seed = seed
        self._drawn = dict.fromkeys(prompts, 0)
        self._shuffles: dict[str, tuple[int, np.ndarray]] = {}  # the order of each domain's current epoch

    def next(self) -> Prompt:
        """The next prompt."""
        num_drawn = sum(self._drawn.values()) + 1
        name = max(self._shares, key=lambda name: self._shares[name] * num_drawn - self._drawn[name])
        members = self._prompts[name]
        epoch, place = divmod(self._drawn[name], len(members))
        self._drawn[name] += 1
        return members[self._order(name, epoch)[place]]

    def __iter__(self) -> PromptStream:
        return self

    __next__ = next

    def restart(self) -> None:
        """Begins the stream again."""
        self._drawn = dict.fromkeys(self._drawn, 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and names, fit for JSON."""
        sizes = {name: len(members) for name, members in self._prompts.items()}
        return {"seed": self._seed, "drawn": dict(self._drawn), "sizes": sizes, "contents": dict(self._contents)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where the stream that wrote ``state`` stood; raises DataError if the prompts changed."""
        own = self.state_dict()
        if state["seed"] != own["seed"]:
            raise DataError(
                f"the checkpoint's prompts were drawn with seed {state['seed']}, the recipe has {own['seed']}"
            )
        if state["sizes"] != own["sizes"]:
            raise DataError(
                f"the checkpoint's prompts were drawn from {_counts(state['sizes'])}, "
                f"the recipe now gives {_counts(own['sizes'])}; resume with the same prompts"
            )
        if changed := [name for name, content in state["contents"].items() if content != own["contents"][name]]:
            raise DataError(
                f"domains.{changed[0]} has other prompts, or in another order, than when the checkpoint was written; "
                "resume with the same ones"
            )
        self._drawn = dict(state["drawn"])

    @cached_property
    def _contents(self) -> dict[str, int]:
        """A checksum of every domain's questions in their order."""
        texts = {name: "\0".join(f"{p.id}\0{question(p)}" for p in members) for name, members in self._prompts.items()}
        return {name: zlib.crc32(text.encode("utf-8", errors="replace")) for name, text in texts.items()}

    def _order(self, name: str, epoch: int) -> np.ndarray:
        known = self._shuffles.get(name)
        if known is None or known[0] != epoch:
            seed = [self._seed, zlib.crc32(name.encode()), epoch]
            known = (epoch, np.random.default_rng(seed).permutation(len(self._prompts[name])))
            self._shuffles[name] = known
        return known[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What a source says about one prompt."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    answer: Any
    tools: tuple[Mapping[str, Any], ...] = ()
    record: Record | None = None  # where it was read, for errors about it


class _Template:
    """A text with ``{names}`` in braces, filled from a question and its metadata."""

    def __init__(self, text: Any, place: str) -> None:
        if not isinstance(text, str) or not _FIELD.search(text):
            raise RecipeError(f"{place}.template must be a text with {{question}} in it, not {text!r}")
        self._text = text
        self._place = place

    def fill(self, values: Mapping[str, Any]) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name not in values:
                raise RecipeError(f"{self._place}.template: no value for {{{name}}}; {did_you_mean(name, values)}")
            return str(values[name])

        return _FIELD.sub(value, self._text)


def _procedural_rows(source: Mapping[str, Any], template: _Template | None, place: str) -> Iterator[_Row]:
    """Different questions only: small tasks repeat themselves, and a repeated one would be drawn more often."""
    task, size, seed, args = (source.get(key, default) for key, default in _TASK_DEFAULTS.items())
    if not isinstance(task, str) or not isinstance(args, Mapping):
        raise RecipeError(f"{place}: reasoning_gym must be the name of a task and args a mapping")
    for key, value in (("size", size), ("seed", seed)):
        if not isinstance(value, int) or value < (key == "size"):
            raise RecipeError(f"{place}.{key} must be a whole number from {int(key == 'size')} on, not {value!r}")
    seen = set()
    for index, entry in enumerate(entries(task, size=size, seed=seed, args=args)):
        values = {**entry["metadata"], "question": entry["question"]}
        text = template.fill(values) if template else entry["question"]
        if text not in seen:
            seen.add(text)
            yield _Row(id=str(index), messages=({"role": "user", "content": text},), answer=entry)


def _file_rows(path: str, template: _Template | None) -> Iterator[_Row]:
    taken: dict[str, str] = {}
    for index, record in enumerate(read_records(path)):
        record.check_spelling(_FIELDS)
        fields = record.fields
        name = str(fields.get("id", index))
        if name in taken:
            raise record.error(f"id '{name}' is already taken by {taken[name]}")
        taken[name] = record.place
        tools = fields.get("tools", [])
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise record.error("tools must be a list of JSON functions")
        messages = _messages(record, template)
        yield _Row(id=name, messages=messages, answer=fields.get("answer"), tools=tuple(tools), record=record)


def _messages(record: Record, template: _Template | None) -> tuple[Mapping[str, Any], ...]:
    fields = record.fields
    if ("prompt" in fields) == ("messages" in fields):
        problem = "has both prompt and messages; keep one" if "prompt" in fields else "has neither prompt nor messages"
        raise record.error(problem)
    if "messages" in fields:
        if template:
            raise record.error("a template rewrites a prompt, but this row has messages")
        messages = record.messages(fields["messages"])
        if messages[-1]["role"] not in _ENDS:
            raise record.error(f"messages must end with the user's turn, not with role {messages[-1]['role']}")
        return messages
    text = fields["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise record.error("prompt must be a text that is not empty")
    return ({"role": "user", "content": template.fill({"question": text}) if template else text},)


def _prompt(name: str, domain: Domain, prefix: str, row: _Row) -> Prompt:
    messages = row.messages
    if domain.system is not None:
        if row.record and any(message["role"] == "system" for message in messages):
            raise row.record.error(f"has a system message of its own while domains.{name}.system is set; keep one")
        messages = ({"role": "system", "content": domain.system}, *messages)
    return Prompt(
        id=f"{prefix}/{row.id}",
        domain=name,
        messages=styled(
            messages, domain.prompt_style, replies=domain.environment.max_turns if domain.environment else 1
        ),
        tools=row.tools,
        answer=row.answer,
        thinking=domain.thinking,
    )


def _check_keys(source: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in source:
        if key not in known:
            raise RecipeError(f"{place} has no key '{key}'; {did_you_mean(str(key), known)}")


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} of {name}" for name, size in sizes.items())
