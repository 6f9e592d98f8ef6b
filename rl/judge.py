"""The judge of a run, where the recipe asks for one of its own: engines of their own behind a small endpoint.

    python -m rl.judge RECIPE.yaml [key.path=value ...]     # serves the recipe's judge until Ctrl-C, for calibration

The endpoint speaks as much of OpenAI's chat completions as :mod:`rewards.judge` does, to those who know its token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.tokenizer import load_tokenizer
from rewards.judge import JudgeAddress
from rl.choices import Placement
from rl.cluster import join_cluster, settled
from rl.config import Judge, Model, Recipe, Sampling
from rl.environ import conceal_environment
from rl.errors import RecipeError, UserError
from rl.fault_log import FaultLog
from rl.initial_model import create_initial_model, initial_config
from rl.placement import serves_judge
from rl.recipe import load_recipe
from rl.sample import NDArray
from rl.secrets import redact
from rollout.conversation import Conversation, split_reply
from rollout.engine import Finish, Request, check_window
from rollout.pool import EnginePool

LARGEST_REQUEST = 16 << 20
"""Bytes of a request's body."""

_SEED = 0x7FFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model said to a conversation."""

    text: str
    finished: bool  # rather than cut off
    prompt_tokens: int
    completion_tokens: int


Schema = Mapping[str, Any]
"""A JSON schema."""

Complete = Callable[[Sequence[Mapping[str, Any]], int, Schema | None], Awaitable[Completion]]
"""(messages, seed, the reply's schema) to the reply. Raises ValueError for messages that cannot be answered."""


@asynccontextmanager
async def start_judge(
    recipe: Recipe, *, host: str = "127.0.0.1", faults: FaultLog | None = None
) -> AsyncIterator[JudgeAddress | None]:
    """The recipe's judge for as long as the block runs: none, an endpoint, or engines that are started here.

    ``host`` is the address of this machine under which workers reach it.
    """
    judge = recipe.judge
    if judge.url is not None:
        yield endpoint(judge)
        return
    if not serves_judge(recipe):
        yield None
        return
    with _model_directory(recipe) as path:
        served = _judging(recipe, path)
        pool = await EnginePool.start(
            served, path, faults=faults, settled=settled, called="the judge's engine", structured=judge.structured
        )
        try:
            conversation = Conversation(load_tokenizer(path))
            async with serve(Completer(judge, pool, conversation), host=host) as (url, token):
                yield _address(judge, url=url, model=path.name, api_key=token)
        finally:
            pool.close()


@contextlib.contextmanager
def _model_directory(recipe: Recipe) -> Iterator[Path]:
    """The judge's model; one with random weights is there for as long as the block runs."""
    judge = recipe.judge
    if judge.init is None:
        assert judge.path is not None
        yield Path(judge.path)
        return
    with tempfile.TemporaryDirectory(prefix="keel-judge-") as folder:
        path = Path(folder) / "judge"
        config = initial_config(judge.init, judge.max_context, place="judge.init")
        create_initial_model(config, path, seed=recipe.seed)
        yield path


def endpoint(judge: Judge) -> JudgeAddress:
    """The address of a judge that runs elsewhere. Raises RecipeError for an ``api_key`` that the environment lacks."""
    assert judge.url is not None
    if judge.api_key is not None and judge.api_key not in os.environ:
        raise RecipeError(f"judge.api_key: the environment has no variable {judge.api_key}; export it")
    key = os.environ[judge.api_key] if judge.api_key is not None else ""
    return _address(judge, url=judge.url, model=judge.model or "", api_key=key)


def _address(judge: Judge, *, url: str, model: str, api_key: str) -> JudgeAddress:
    return JudgeAddress(
        url=url,
        model=model,
        api_key=api_key,
        structured=judge.structured,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        timeout_s=judge.timeout_s,
        attempts=judge.attempts,
        concurrency=judge.concurrency,
        usd_per_million_input=judge.usd_per_million_input,
        usd_per_million_output=judge.usd_per_million_output,
    )


def _judging(recipe: Recipe, path: Path) -> Recipe:
    """The recipe as the judge's engines read it."""
    judge = recipe.judge
    return replace(
        recipe,
        model=Model(path=str(path), dtype=judge.dtype, max_context=judge.max_context),
        sampling=Sampling(temperature=judge.temperature, top_p=1.0, max_tokens=judge.max_tokens),
        rollout=replace(
            recipe.rollout,
            engine=judge.engine,
            engines=judge.engines,
            tensor_parallel=judge.tensor_parallel,
            max_num_seqs=judge.max_num_seqs,
            threads=judge.threads,
        ),
        placement=Placement.split,
        objective=replace(recipe.objective, keep_selection=False),
        judge=Judge(),
    )


class Completer:
    """Replies of the judge's engines. A schema binds the reply, and not the thought before it."""

    def __init__(self, judge: Judge, pool: EnginePool, conversation: Conversation) -> None:
        self._thinking = judge.thinking
        self._structured = judge.structured
        self._sampling = Sampling(temperature=judge.temperature, top_p=1.0, max_tokens=judge.max_tokens)
        self._pool = pool
        self._conversation = conversation
        self._numbers = itertools.count()

    async def __call__(self, messages: Sequence[Mapping[str, Any]], seed: int, schema: Schema | None) -> Completion:
        prompt = self._conversation.encode(messages, thinking=self._thinking)
        check_window("what the judge is asked", len(prompt), self._pool.max_context)
        name, end = f"the judge's reply {next(self._numbers)}", self._conversation.end_of_thought
        bound = schema is not None and self._structured and not (self._thinking and end is None)
        request = self._request(name, prompt, seed)
        with self._pool.seat(1) as complete:
            if bound and self._thinking:
                assert end is not None
                thinking = replace(request, id=f"{name}: thought", stop_token_ids=(*request.stop_token_ids, end))
                thought = (await complete(thinking)).token_ids
                num_spent = len(thought)
                if not self._leaves_room(prompt, thought, end):
                    return Completion(text="", finished=False, prompt_tokens=len(prompt), completion_tokens=num_spent)
                left = replace(self._sampling, max_tokens=self._sampling.max_tokens - num_spent)
                request = replace(request, token_ids=np.concatenate([prompt, thought]), sampling=left)
            reply = await complete(replace(request, schema=json.dumps(schema) if bound else None))
        text = self._conversation.decode(reply.token_ids)
        return Completion(
            text=text if bound else split_reply(text, thinking=self._thinking).answer,
            finished=reply.finish is Finish.STOP,
            prompt_tokens=len(prompt),
            completion_tokens=len(request.token_ids) - len(prompt) + len(reply.token_ids),
        )

    def _request(self, name: str, token_ids: NDArray, seed: int) -> Request:
        stops = self._conversation.stop_token_ids
        return Request(id=name, token_ids=token_ids, sampling=self._sampling, seed=seed, stop_token_ids=stops)

    def _leaves_room(self, prompt: NDArray, thought: NDArray, end: int) -> bool:
        """Whether a thought is closed, and a reply can follow it."""
        num_tokens = len(prompt) + len(thought)
        room = len(thought) < self._sampling.max_tokens and num_tokens < self._pool.max_context
        return room and len(thought) > 0 and thought[-1] == end


@asynccontextmanager
async def serve(complete: Complete, *, host: str = "127.0.0.1") -> AsyncIterator[tuple[str, str]]:
    """Serves completions on a free port for as long as the block runs; (base URL, token)."""
    token = secrets.token_urlsafe(24)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            status, answer = await _answer(reader, complete, token)
            body = json.dumps(answer).encode()
            head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, host, 0, limit=1 << 16)
    try:
        yield f"http://{host}:{server.sockets[0].getsockname()[1]}/v1", token
    finally:
        server.close()


async def _answer(reader: asyncio.StreamReader, complete: Complete, token: str) -> tuple[int, dict[str, Any]]:
    """Status and body for one request."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError:
        return 431, _error("the request's head is too long")
    line, *lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    size = int(headers.get("content-length", "0") or 0)
    if not secrets.compare_digest(headers.get("authorization", ""), f"Bearer {token}"):
        return 401, _error("the token is missing or wrong")
    if not line.startswith("POST /v1/chat/completions "):
        return 404, _error("there is only POST /v1/chat/completions")
    if size > LARGEST_REQUEST:
        return 413, _error("the request is too large")
    try:
        asked = json.loads(await reader.readexactly(size))
        said = await complete(asked["messages"], int(asked.get("seed") or 0) & _SEED, _schema_of(asked))
    except (ValueError, LookupError, TypeError) as error:  # DataError is a ValueError
        return 400, _error(str(error))
    finish = "stop" if said.finished else "length"
    return 200, {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": said.text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.completion_tokens},
    }


def _schema_of(asked: Mapping[str, Any]) -> Schema | None:
    given = asked.get("response_format") or {}
    return given["json_schema"]["schema"] if given.get("type") == "json_schema" else None


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


async def _serve_until_interrupted(arguments: Sequence[str]) -> None:
    if not arguments:
        raise RecipeError("name a recipe: python -m rl.judge RECIPE.yaml [key.path=value ...]")
    recipe = load_recipe(arguments[0], list(arguments[1:]))
    if not serves_judge(recipe):
        raise RecipeError("judge.path names no model to serve")
    join_cluster(recipe)
    _cancel_on_sigterm()
    async with start_judge(recipe) as address:
        assert address is not None
        print(f"export JUDGE_KEY={address.api_key}")
        print(f"--judge-url {address.url} --judge-model {address.model} --judge-key JUDGE_KEY", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


def _cancel_on_sigterm() -> None:
    """SIGTERM ends the process like Ctrl-C. Comes after ``ray.init``, which sets its own."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def main() -> int:
    """The command line; returns the exit status."""
    conceal_environment()
    try:
        asyncio.run(_serve_until_interrupted(sys.argv[1:]))
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"keel: {redact(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
