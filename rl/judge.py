"""The judge of a run, where the recipe asks for one of its own: engines of their own behind a small endpoint.

    python -m rl.judge RECIPE.yaml [key.path=value ...]     # serves the recipe's judge until Ctrl-C, for calibration

The endpoint speaks as much of OpenAI's chat completions as :mod:`rewards.judge` does, to those who know its token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.tokenizer import load_tokenizer
from rewards.judge import JudgeAddress
from rl.cluster import join_cluster, settled
from rl.config import Judge, Model, Placement, Recipe, Sampling
from rl.environ import conceal_environment
from rl.errors import RecipeError, UserError
from rl.fault_log import FaultLog
from rl.recipe import load_recipe
from rl.sample import Prompt, Status
from rl.secrets import redact
from rollout.conversation import Conversation, split_reply
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


Complete = Callable[[Sequence[Mapping[str, Any]], int], Awaitable[Completion]]
"""(messages, seed) to the reply. Raises ValueError for messages that cannot be answered."""


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
    if judge.path is None:
        yield None
        return
    pool = await EnginePool.start(
        _judging(recipe), judge.path, faults=faults, settled=settled, called="the judge's engine"
    )
    try:
        conversation = Conversation(load_tokenizer(judge.path))
        async with serve(_completer(judge, pool, conversation), host=host) as (url, token):
            yield _address(judge, url=url, model=Path(judge.path).name, api_key=token, structured=False)
    finally:
        pool.close()


def endpoint(judge: Judge) -> JudgeAddress:
    """The address of a judge that runs elsewhere. Raises RecipeError for an ``api_key`` that the environment lacks."""
    assert judge.url is not None
    if judge.api_key is not None and judge.api_key not in os.environ:
        raise RecipeError(f"judge.api_key: the environment has no variable {judge.api_key}; export it")
    key = os.environ[judge.api_key] if judge.api_key is not None else ""
    return _address(judge, url=judge.url, model=judge.model or "", api_key=key, structured=judge.structured)


def _address(judge: Judge, *, url: str, model: str, api_key: str, structured: bool) -> JudgeAddress:
    return JudgeAddress(
        url=url,
        model=model,
        api_key=api_key,
        structured=structured,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        timeout_s=judge.timeout_s,
        attempts=judge.attempts,
        concurrency=judge.concurrency,
        usd_per_million_input=judge.usd_per_million_input,
        usd_per_million_output=judge.usd_per_million_output,
    )


def _judging(recipe: Recipe) -> Recipe:
    """The recipe as the judge's engines read it."""
    judge = recipe.judge
    return replace(
        recipe,
        model=Model(path=judge.path, dtype=judge.dtype, max_context=judge.max_context),
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


def _completer(judge: Judge, pool: EnginePool, conversation: Conversation) -> Complete:
    sampling = Sampling(temperature=judge.temperature, top_p=1.0, max_tokens=judge.max_tokens)

    async def complete(messages: Sequence[Mapping[str, Any]], seed: int) -> Completion:
        prompt = Prompt(id="judge", domain="judge", messages=tuple(messages), thinking=judge.thinking)
        token_ids = conversation.encode(messages, thinking=judge.thinking)
        (sample,) = await pool.generate_group(prompt, token_ids, sampling, [seed])
        return Completion(
            text=split_reply(sample.reply, thinking=judge.thinking).answer,
            finished=sample.status is Status.FINISHED,
            prompt_tokens=len(token_ids),
            completion_tokens=sample.num_sampled,
        )

    return complete


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
        said = await complete(asked["messages"], int(asked.get("seed") or 0) & _SEED)
    except (ValueError, LookupError, TypeError) as error:  # DataError is a ValueError
        return 400, _error(str(error))
    finish = "stop" if said.finished else "length"
    return 200, {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": said.text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.completion_tokens},
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


async def _serve_until_interrupted(arguments: Sequence[str]) -> None:
    if not arguments:
        raise RecipeError("name a recipe: python -m rl.judge RECIPE.yaml [key.path=value ...]")
    recipe = load_recipe(arguments[0], list(arguments[1:]))
    if recipe.judge.path is None:
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
