"""One episode: replies and tools in turn, until a final answer or the end of a budget.

An episode is one append-only sequence of tokens as long as only results of tools are appended. A user's message and
context management start another one; all of them are trained, with one reward (`rl.sample.Sample.earlier`).
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rl.choices import ContextStrategy
from rl.config import EnvironmentUse, Sampling
from rl.errors import DataError
from rl.sample import NDArray, Prompt, Sample, Status, ToolCall, ToolResult, Turn
from rollout.context import SUMMARY_HEADING, SUMMARY_REQUEST, num_dropped, rounds_of
from rollout.conversation import Conversation, MalformedReply, Message, Reply, split_reply
from rollout.engine import Completion, Finish, Request, check_window
from rollout.environments.protocol import Environment, EnvironmentFailed, answer, encodable
from rollout.token_stream import TokenStream

Complete = Callable[[Request], Awaitable[Completion]]
"""One engine's generation, always the same one for an episode: it may still hold the cache of earlier turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Which episode it is: a prompt, its sibling's number and seed, and the name its requests begin with."""

    prompt: Prompt
    index: int
    seed: int
    name: str  # unique among the requests that engines hold


class Episode:
    """Runs one attempt; call :meth:`run` once."""

    def __init__(
        self,
        attempt: Attempt,
        environment: Environment,
        use: EnvironmentUse,
        *,
        complete: Complete,
        conversation: Conversation,
        sampling: Sampling,
        max_context: int,
    ) -> None:
        prompt = attempt.prompt
        self._attempt = attempt
        self._environment = environment
        self._use = use
        self._complete = complete
        self._conversation = conversation
        self._sampling = sampling
        self._max_context = max_context
        self._tools: list[Mapping[str, Any]] = []
        # What is in the context now: the task and the rounds after it, as messages and as tokens.
        self._task: tuple[Message, ...] = tuple(prompt.messages)
        self._rounds: list[list[Message]] = []
        self._task_ids = np.zeros(0, np.int32)
        self._carried: list[NDArray] = []  # rounds that the sequence's prompt holds
        self._stream = TokenStream(self._task_ids)
        self._sealed: list[Sample] = []
        self._turns: list[Turn] = []
        self._num_sampled = 0
        self._num_errors = 0
        self._numbers = itertools.count()
        self._ends_at = float("inf")

    async def run(self) -> Sample:
        """The finished sample. Status FAILED says that the environment broke, with what there was until then.

        So does a prompt that leaves no room for a reply beside the tools' descriptions, which can differ by prompt.
        Raises DataError naming the prompt when it cannot be encoded.
        """
        self._ends_at = time.monotonic() + self._use.max_seconds
        status, state, fault = Status.FAILED, None, ""
        try:
            await self._limited(self._environment.start())
            self._tools = [*shown_tools(self._environment, self._use), *self._attempt.prompt.tools]
            self._begin(self._encode(self._task))
            self._check_window()
            status = await self._turn_by_turn()
            state = await self._limited(self._final_state())
        except EnvironmentFailed as error:
            status, fault = Status.FAILED, str(error)
        return self._sample(status, state, fault)

    def _check_window(self) -> None:
        try:
            check_window(f"prompt {self._attempt.prompt.id} with its tools", len(self._stream), self._max_context)
        except DataError as error:
            raise EnvironmentFailed(str(error)) from error

    async def _turn_by_turn(self) -> Status:
        while True:
            completion = await self._generate()
            if completion.finish != Finish.STOP:
                self._record(self._text(completion))
                return self._cut_short(completion.finish)
            if not await self._respond(self._text(completion)):
                return Status.FINISHED
            if self._is_spent() or not await self._make_room():
                return Status.TRUNCATED

    def _cut_short(self, finish: Finish) -> Status:
        """Of an episode whose last reply has no end: aborted by somebody, or at the end of a budget."""
        is_late = time.monotonic() >= self._ends_at and self._num_sampled > 0
        return Status.ABORTED if finish == Finish.ABORT and not is_late else Status.TRUNCATED

    async def _respond(self, text: str) -> bool:
        """Lets tools or the user answer a reply; False when it was the last one."""
        thinking = self._attempt.prompt.thinking
        try:
            reply = self._conversation.parse_reply(text, thinking=thinking)
            malformed = ""
        except MalformedReply as error:
            reply, malformed = split_reply(text, thinking=thinking), str(error)
            if not error.in_calls:
                self._record(text, malformed=malformed)
                return False
        if malformed:
            results = [ToolResult(text=f"error: the tool call cannot be read: {malformed}", failed=True)]
        elif reply.calls:
            results = await self._call(reply.calls)
        else:
            return await self._hear(text, reply)
        self._num_errors += sum(result.failed for result in results)
        self._record(text, reply.calls, results, malformed)
        shown = [result.text for result in results]
        appended = self._conversation.encode_results(
            self._messages, reply.calls, shown, thinking=thinking, tools=self._tools
        )
        self._stream.append_text(appended)
        self._rounds.append([_said(reply), *({"role": "tool", "content": one} for one in shown if reply.calls)])
        return True

    async def _call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """All calls of a reply at the same time. Raises EnvironmentFailed when one does not answer in time.

        That is the time of all calls one after another, as tools may have them wait for each other, but no more than
        is left of the episode's.
        """
        one = self._use.tool_timeout_s
        limit = max(one, min(one * len(calls), self._ends_at - time.monotonic()))
        try:
            async with asyncio.timeout(limit):
                results = await asyncio.gather(*(answer(self._environment, call) for call in calls))
        except TimeoutError:
            names = ", ".join(sorted({call.name for call in calls}))
            raise EnvironmentFailed(f"{names} did not answer within {limit:g} s") from None
        return [replace(result, text=_cut(result.text, self._use.max_result)) for result in results]

    async def _hear(self, text: str, reply: Reply) -> bool:
        """The user's word on a final answer starts another sequence, without the reasoning so far."""
        said = await self._limited(self._environment.next_user_message(reply.answer))
        said = None if said is None else encodable(said)
        self._record(text, user=said or "")
        if said is None:
            return False
        self._rounds.append([_said(reply), {"role": "user", "content": said}])
        token_ids = self._next_turn(self._messages)
        self._task = tuple(self._messages)
        self._seal()
        self._begin(token_ids)
        return True

    async def _generate(self) -> Completion:
        """The next reply, appended to the stream."""
        number = next(self._numbers)
        budget = self._sampling.max_tokens
        if self._use.max_tokens is not None:
            budget = min(budget, self._use.max_tokens - self._num_sampled)
        seed = np.random.SeedSequence([self._attempt.seed, number]).generate_state(1, np.uint32)
        request = Request(
            id=f"{self._attempt.name} (reply {number})",
            token_ids=self._stream.token_ids,
            sampling=replace(self._sampling, max_tokens=budget),
            seed=int(seed[0]) if number else self._attempt.seed,
            stop_token_ids=self._conversation.stop_token_ids,
            ends_at=self._ends_at,
        )
        completion = await self._complete(request)
        self._stream.append_reply(completion)
        self._num_sampled += len(completion.token_ids)
        return completion

    async def _make_room(self) -> bool:
        """Applies the context strategy where the context is nearly full; False when there is no room for a reply."""
        strategy, room = self._use.context, self._max_context
        # Where a user's message has just begun a sequence, nothing of it can be dropped.
        if self._stream.replies and len(self._stream) > self._use.context_threshold * room:
            if strategy == ContextStrategy.summary and not await self._summarise():
                return False
            if strategy in (ContextStrategy.discard_75, ContextStrategy.discard_all):
                self._discard(strategy)
        return len(self._stream) < room and not self._is_spent()

    def _discard(self, strategy: ContextStrategy) -> None:
        """Restarts the episode from the task and its latest rounds."""
        rounds = [*self._carried, *rounds_of(self._stream)]
        dropped = num_dropped(strategy, len(rounds))
        kept = self._rounds[dropped:]
        self._seal()
        self._begin(self._task_ids, rounds[dropped:])
        self._rounds = kept

    async def _summarise(self) -> bool:
        """Restarts the episode from the task and the policy's own summary; False when there is none."""
        request = self._summary_request()
        if request is None:
            self._discard(ContextStrategy.discard_all)
            return True
        self._seal()
        self._stream = TokenStream(request)
        completion = await self._generate()
        text = self._text(completion)
        self._record(text)
        if completion.finish != Finish.STOP:
            return False
        summary = split_reply(text, thinking=self._attempt.prompt.thinking).answer
        asking = max(i for i, message in enumerate(self._task) if message["role"] in ("user", "developer"))
        asked = self._task[asking]
        restarted = (*self._task[:asking], {**asked, "content": f"{asked['content']}{SUMMARY_HEADING}{summary}"})
        self._seal()
        self._begin(self._encode(restarted))
        return True

    def _summary_request(self) -> NDArray | None:
        """The prompt that asks for a summary, of as many rounds as leave room for it: the last ones may have jumped
        beyond the window. None when not even the first does."""
        for count in range(len(self._rounds), 0, -1):
            rounds = itertools.chain.from_iterable(self._rounds[:count])
            request = self._next_turn([*self._task, *rounds, {"role": "user", "content": SUMMARY_REQUEST}], count)
            if len(request) < self._max_context:
                return request
        return None

    def _begin(self, task_ids: NDArray, carried: Sequence[NDArray] = ()) -> None:
        """Starts a sequence from the task and rounds that are carried over."""
        self._task_ids, self._carried, self._rounds = task_ids, list(carried), []
        self._stream = TokenStream(np.concatenate([task_ids, *carried]))

    def _seal(self) -> None:
        """Closes the sequence so far; another one must follow."""
        part, reply = len(self._sealed), self._turns[-1].reply
        self._sealed.append(
            self._stream.sample(self._attempt.prompt, index=self._attempt.index, part=part, reply=reply)
        )

    @property
    def _messages(self) -> list[Message]:
        return [*self._task, *itertools.chain.from_iterable(self._rounds)]

    async def _final_state(self) -> Any:
        state = self._environment.final_state()
        return await state if inspect.isawaitable(state) else state

    def _sample(self, status: Status, state: Any, fault: str) -> Sample:
        fields: dict[str, Any] = {
            "status": status,
            "reply": self._turns[-1].reply if self._turns else "",
            "turns": tuple(self._turns),
            "final_state": state,
            "fault": fault,
        }
        if self._sealed and not self._stream.replies:  # it ended before the last restart bore a reply
            *earlier, last = self._sealed
            return replace(last, part=None, earlier=tuple(earlier), **fields)
        index = self._attempt.index
        return self._stream.sample(self._attempt.prompt, index=index, earlier=tuple(self._sealed), **fields)

    def _record(
        self,
        text: str,
        calls: Sequence[ToolCall] = (),
        results: Sequence[ToolResult] = (),
        malformed: str = "",
        user: str = "",
    ) -> None:
        self._turns.append(Turn(reply=text, calls=tuple(calls), results=tuple(results), malformed=malformed, user=user))

    def _is_spent(self) -> bool:
        use = self._use
        return (
            len(self._turns) >= use.max_turns
            or (use.max_tokens is not None and self._num_sampled >= use.max_tokens)
            or (use.max_tool_errors is not None and self._num_errors > use.max_tool_errors)
            or time.monotonic() > self._ends_at
        )

    async def _limited(self, waiting: Awaitable[Any]) -> Any:
        """Of the environment: its time limit, and whatever it raises, cost this episode and no other."""
        try:
            async with asyncio.timeout(self._use.tool_timeout_s):
                return await waiting
        except TimeoutError:
            raise EnvironmentFailed(f"no answer within {self._use.tool_timeout_s:g} s") from None
        except (EnvironmentFailed, asyncio.CancelledError):
            raise
        except Exception as error:
            raise EnvironmentFailed(f"{type(error).__name__}: {error}") from error

    def _encode(self, messages: Sequence[Message]) -> NDArray:
        prompt = self._attempt.prompt
        try:
            return self._conversation.encode(messages, thinking=prompt.thinking, tools=self._tools)
        except DataError as error:
            raise DataError(f"prompt {prompt.id}: {error}") from error

    def _next_turn(self, messages: Sequence[Message], num_replies: int | None = None) -> NDArray:
        """The prompt after one more user message, the last of ``messages``, behind so many of the replies."""
        spans = self._stream.replies
        end = len(self._stream) if num_replies in (None, len(spans)) else spans[num_replies].begin
        replies = [(span.begin, span.end) for span in spans[:num_replies]]
        return self._conversation.encode_next_turn(
            self._stream.token_ids[:end], replies, messages, thinking=self._attempt.prompt.thinking, tools=self._tools
        )

    def _text(self, completion: Completion) -> str:
        return self._conversation.decode(completion.token_ids)


def shown_tools(environment: Environment, use: EnvironmentUse) -> Sequence[Mapping[str, Any]]:
    """The environment's tools as prompts describe them."""
    return environment.tools if use.describe_tools else ()


def _said(reply: Reply) -> Message:
    """A reply as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.answer}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.calls]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return message


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"
