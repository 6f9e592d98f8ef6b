"""The rules of episodes, one by one on scripted ones."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from model.tokenizer import build_byte_tokenizer
from rl.choices import ContextStrategy
from rl.config import Sampling
from rl.sample import Sample, Status, ToolCall, ToolResult
from rollout.context import SUMMARY_REQUEST
from rollout.conversation import Conversation
from rollout.engine import Completion, Finish, Request
from rollout.environments.protocol import EnvironmentFailed
from tests.rollout.worlds import ASK, STRATEGIES, World, episode

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


class Script:
    """Says the given replies one after another; remembers what it was asked."""

    def __init__(self, conversation: Conversation, *replies: str, finish: Finish = Finish.STOP) -> None:
        self.conversation = conversation
        self.replies = list(replies)
        self.finish = finish
        self.requests: list[Request] = []

    async def __call__(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.replies.pop(0)
        last = not self.replies
        finish = self.finish if last else Finish.STOP
        ids = self.conversation.tokenizer.encode(
            text + (EOS if finish == Finish.STOP else ""), add_special_tokens=False
        )
        token_ids = np.array(ids, np.int32)
        return Completion(
            token_ids=token_ids,
            logprobs=np.full(len(token_ids), -0.5, np.float32),
            versions=np.full(len(token_ids), 3, np.int32),
            kept=None,
            routes=None,
            routed=None,
            finish=finish,
        )


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return Conversation(build_byte_tokenizer())


def call(*names: str, reasoning: str = "R") -> str:
    invokes = "".join(f'<｜DSML｜invoke name="{name}">\n\n</｜DSML｜invoke>\n' for name in names)
    return f"{reasoning}</think>\n\n<｜DSML｜function_calls>\n{invokes}</｜DSML｜function_calls>"


ONE_CALL = len(build_byte_tokenizer().encode(call("f") + EOS, add_special_tokens=False))


def results(*texts: str) -> str:
    lines = "".join(f"\n<result>{text}</result>" for text in texts)
    return f"\n\n<function_results>{lines}\n</function_results>\n\n"


def text_of(conversation: Conversation, token_ids: np.ndarray) -> str:
    text = conversation.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def said(conversation: Conversation, sample: Sample) -> str:
    """The sequence's text behind the tools block."""
    return text_of(conversation, sample.token_ids).rpartition("</functions>\n")[2]


def test_results_are_appended_and_reasoning_stays(conversation):
    world = World()
    script = Script(conversation, call("f"), call("g", "h", reasoning="R2"), "R3</think>42")
    sample = episode(world, script, conversation)
    assert said(conversation, sample) == (
        f"<｜User｜>Q1<｜Assistant｜><think>{call('f')}{EOS}{results('f says hi')}<think>"
        f"{call('g', 'h', reasoning='R2')}{EOS}{results('g says hi', 'h says hi')}<think>R3</think>42{EOS}"
    )
    sampled = text_of(conversation, sample.token_ids[sample.sampled])
    assert sampled == f"{call('f')}{EOS}{call('g', 'h', reasoning='R2')}{EOS}R3</think>42{EOS}"
    assert sample.status == Status.FINISHED and sample.earlier == () and sample.reply == "R3</think>42"
    assert [[one.name for one in turn.calls] for turn in sample.turns] == [["f"], ["g", "h"], []]
    assert sample.turns[1].results[1] == ToolResult(text="h says hi")
    assert sample.final_state == {"calls": 3}


def test_without_thinking_replies_begin_behind_the_closed_thought(conversation):
    script = Script(conversation, call("f").partition("</think>")[2], "42")
    sample = episode(World(), script, conversation, thinking=False)
    assert said(conversation, sample).endswith(f"{EOS}{results('f says hi')}</think>42{EOS}")


def test_a_user_message_drops_reasoning_and_starts_another_sequence(conversation):
    """Golden strings C and D: the first sequence ends with the answer, the next one has no thought of it left."""
    script = Script(conversation, call("f"), "R2</think>A1", call("g", reasoning="R3"), "R4</think>A2")
    sample = episode(World(users=["Q2"]), script, conversation)
    (first,) = sample.earlier
    assert said(conversation, first) == (
        f"<｜User｜>Q1<｜Assistant｜><think>{call('f')}{EOS}{results('f says hi')}<think>R2</think>A1{EOS}"
    )
    history = f"<｜User｜>Q1<｜Assistant｜>{call('f', reasoning='')}{EOS}{results('f says hi')}</think>A1{EOS}"
    assert said(conversation, sample) == (
        f"{history}<｜User｜>Q2<｜Assistant｜><think>{call('g', reasoning='R3')}{EOS}{results('g says hi')}"
        f"<think>R4</think>A2{EOS}"
    )
    assert (first.reply, sample.reply) == ("R2</think>A1", "R4</think>A2")
    assert (first.id, sample.id) == ("p#0.0", "p#0")
    assert [turn.user for turn in sample.turns] == ["", "Q2", "", ""]
    assert text_of(conversation, sample.token_ids[sample.sampled]).startswith("R3</think>")


def test_a_call_that_cannot_be_read_is_answered_with_the_reason(conversation):
    broken = call("f").replace("</｜DSML｜function_calls>", "")
    sample = episode(World(), Script(conversation, broken, "R</think>sorry"), conversation)
    reason = "<｜DSML｜invoke or </｜DSML｜function_calls> is missing"
    assert sample.turns[0].malformed == reason and sample.turns[0].calls == ()
    assert sample.turns[0].results[0].failed
    assert results(f"error: the tool call cannot be read: {reason}") in said(conversation, sample)
    assert sample.status == Status.FINISHED
    # A marker inside a result is text: the only DSML tokens are those of the tools block and of the reply itself.
    dsml = conversation.tokenizer.convert_tokens_to_ids("｜DSML｜")
    assert int((sample.token_ids[sample.sampled] == dsml).sum()) == int((sample.token_ids == dsml).sum()) - 11


def test_a_reply_that_never_closes_its_thought_is_the_last_one(conversation):
    sample = episode(World(), Script(conversation, "hmm"), conversation)
    assert sample.status == Status.FINISHED and "never closes" in sample.turns[0].malformed


def test_half_a_character_ends_no_episode(conversation):
    """Half of a surrogate pair: in a parameter it is no JSON, in what an environment says it is spelled out."""
    half = '<｜DSML｜parameter name="a" string="false">"\\ud83d"</｜DSML｜parameter>\n'
    script = Script(conversation, call("f").replace("\n\n</", f"\n{half}</"), call("g"), "R</think>A1", "R</think>A2")
    world = World(lambda call: "found \ud83d", users=["and \ude42"])
    sample = episode(world, script, conversation)
    assert "its value is not JSON" in sample.turns[0].malformed
    assert [called.name for called in world.called] == ["g"]
    assert sample.turns[1].results == (ToolResult(text="found \\ud83d"),)
    assert sample.turns[2].user == "and \\ude42"
    assert sample.status == Status.FINISHED


def test_calls_of_one_reply_run_at_the_same_time(conversation):
    running = []

    async def meet(call: ToolCall) -> str:
        running.append(call.name)
        while len(running) < 3:  # none returns before all have begun
            await asyncio.sleep(0)
        return call.name

    sample = episode(World(meet), Script(conversation, call("a", "b", "c"), "R</think>"), conversation)
    assert [result.text for result in sample.turns[0].results] == ["a", "b", "c"]


def test_what_a_tool_raises_is_a_result(conversation):
    def refuse(call: ToolCall) -> str:
        raise ZeroDivisionError("no")

    sample = episode(World(refuse), Script(conversation, call("f"), "R</think>"), conversation)
    assert sample.turns[0].results == (ToolResult(text="error: ZeroDivisionError: no", failed=True),)


@pytest.mark.parametrize(
    ("budget", "turns"),
    [({"max_turns": 2}, 2), ({"max_tool_errors": 1}, 2), ({"max_tokens": 80}, 2), ({"max_seconds": 1e-9}, 1)],
    ids=lambda value: str(value),
)
def test_a_spent_budget_truncates(conversation, budget, turns):
    world = World(lambda call: ToolResult(text="no", failed=True))
    assert 40 < ONE_CALL < 80
    sample = episode(world, Script(conversation, *[call("f")] * 9), conversation, **budget)
    assert sample.status == Status.TRUNCATED and len(sample.turns) == turns
    assert len(sample.turns[-1].results) == 1  # the last call was still carried out


@pytest.mark.parametrize(("ends_at", "status"), [(0.1, Status.TRUNCATED), (600.0, Status.ABORTED)])
def test_a_reply_is_cut_off_when_the_seconds_are_over(conversation, ends_at, status):
    """The engine aborts it then; one that somebody else aborted is no budget's end."""
    script = Script(conversation, "R</think>far too lo", finish=Finish.ABORT)

    async def complete(request: Request) -> Completion:
        await asyncio.sleep(min(0.3, request.ends_at - time.monotonic()))
        return await script(request)

    sample = episode(World(), complete, conversation, max_seconds=ends_at)
    assert sample.status == status and sample.reply == "R</think>far too lo" and sample.num_sampled > 0


def test_calls_that_wait_for_each_other_have_the_time_of_all(conversation):
    def talk(tool_timeout_s: float) -> Sample:
        turn = asyncio.Lock()

        async def one_by_one(call: ToolCall) -> str:
            async with turn:
                await asyncio.sleep(0.2)
                return call.name

        script = Script(conversation, call("a", "b", "c"), "R</think>")
        return episode(World(one_by_one), script, conversation, tool_timeout_s=tool_timeout_s)

    assert [result.text for result in talk(0.4).turns[0].results] == ["a", "b", "c"]
    assert talk(0.1).fault == "a, b, c did not answer within 0.3 s"


def test_the_token_budget_bounds_the_next_reply(conversation):
    script = Script(conversation, call("f"), "R</think>", finish=Finish.LENGTH)
    sample = episode(World(), script, conversation, max_tokens=200, sampling=Sampling(max_tokens=150))
    assert [request.sampling.max_tokens for request in script.requests] == [150, 200 - ONE_CALL]
    assert sample.status == Status.TRUNCATED


def test_a_context_without_room_ends_the_episode(conversation):
    script = Script(conversation, call("f"), "unused")
    sample = episode(World(lambda call: "x" * 3000), script, conversation, max_context=3500)
    assert sample.status == Status.TRUNCATED and len(script.requests) == 1
    sample = episode(World(), script, conversation, max_context=100)
    assert sample.status == Status.FAILED and len(script.requests) == 1
    assert re.match(r"prompt p with its tools has \d+ tokens and needs at least one more", sample.fault)


def test_long_results_lose_their_middle(conversation):
    script = Script(conversation, call("f"), "R</think>")
    sample = episode(World(lambda call: "a" * 300 + "b" * 300), script, conversation, max_result=100)
    assert sample.turns[0].results[0].text == f"{'a' * 50}\n... (500 characters left out) ...\n{'b' * 50}"


def test_a_tool_that_hangs_or_breaks_fails_its_own_episode(conversation):
    hung = episode(
        World(lambda call: asyncio.sleep(60)), Script(conversation, call("f")), conversation, tool_timeout_s=0.05
    )
    assert hung.status == Status.FAILED and hung.fault == "f did not answer within 0.05 s"

    def die(call: ToolCall) -> str:
        raise EnvironmentFailed("its process died")

    dead = episode(World(die), Script(conversation, call("f")), conversation)
    assert dead.status == Status.FAILED and dead.fault == "its process died"
    assert dead.num_sampled > 0  # what there was is kept for the report


def big(call: ToolCall) -> str:
    return "x" * 600


def test_discard_all_restarts_from_the_task(conversation):
    script = Script(conversation, call("f"), call("g"), call("h"), "R</think>done")
    sample = episode(
        World(big), script, conversation, max_context=2900, context=ContextStrategy.discard_all, context_threshold=0.8
    )
    assert [len(sequence.sampled) > 0 for sequence in sample.sequences] == [True, True]
    assert script.requests[2].token_ids.tolist() == script.requests[0].token_ids.tolist()
    assert sample.status == Status.FINISHED and len(sample.turns) == 4


def test_discard_75_keeps_the_latest_rounds(conversation):
    names = ["a", "b", "c", "d", "e"]
    script = Script(conversation, *map(call, names), "R</think>done")
    sample = episode(
        World(lambda call: "x" * 250), script, conversation, max_context=3100, context=ContextStrategy.discard_75
    )
    (first,) = sample.earlier
    rounds = len([name for name in names if f'"{name}"' in said(conversation, first)])
    kept = rounds - -(-3 * rounds // 4)
    assert kept == 1 and rounds == 4
    assert said(conversation, sample).startswith(f"<｜User｜>Q1<｜Assistant｜><think>{call('d')}{EOS}")
    assert sample.token_ids[sample.sampled].tolist() != []
    assert text_of(conversation, sample.token_ids[sample.sampled]).startswith(call("e"))


def test_a_summary_is_asked_for_and_takes_the_place_of_the_history(conversation):
    script = Script(conversation, call("f"), call("g"), "R</think>found 7", "R</think>7")
    sample = episode(World(big), script, conversation, max_context=3100, context=ContextStrategy.summary)
    asked, restarted = (text_of(conversation, request.token_ids) for request in script.requests[2:])
    assert "Write that summary now" in asked and "R</think>" not in asked.rpartition("</functions>")[2]
    assert restarted.rpartition("</functions>\n")[2] == (
        "<｜User｜>Q1\n\nYou have worked on this before, until the context was full. Your summary of that work:\n"
        "found 7<｜Assistant｜><think>"
    )
    assert [sequence.num_sampled > 0 for sequence in sample.sequences] == [True, True, True]
    assert sample.reply == "R</think>7"
    unchanged = replace(sample, earlier=())
    assert unchanged.num_generated < sample.num_generated


def test_a_summary_leaves_out_a_round_that_jumped_beyond_the_window(conversation):
    world = World(lambda call: "small" if call.name == "f" else "y" * 3000, shown=False)
    script = Script(conversation, call("f"), call("g"), "R</think>found 7", "R</think>7")
    sample = episode(world, script, conversation, max_context=1500, context=ContextStrategy.summary)
    function = {"name": "f", "arguments": {}}
    # What the encoding makes of the same conversation, where a user's message ends the thinking.
    expected = conversation.encode(
        [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "small"},
            {"role": "user", "content": SUMMARY_REQUEST},
        ],
        thinking=True,
    )
    assert script.requests[2].token_ids.tolist() == expected.tolist()
    assert sample.status == Status.FINISHED and sample.reply == "R</think>7" and len(sample.sequences) == 3


def test_a_first_round_beyond_the_window_is_dropped_where_there_is_nothing_to_summarise(conversation):
    script = Script(conversation, call("f"), "R</think>7")
    world = World(lambda call: "y" * 3000, shown=False)
    sample = episode(world, script, conversation, max_context=1500, context=ContextStrategy.summary)
    assert script.requests[1].token_ids.tolist() == script.requests[0].token_ids.tolist()
    assert sample.status == Status.FINISHED and len(sample.sequences) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_user_said_is_never_dropped(conversation, strategy):
    script = Script(conversation, "R</think>A1", "R</think>A2")
    world = World(users=["Q2" * 200], shown=False)
    sample = episode(world, script, conversation, max_context=1000, context=strategy, context_threshold=0.2)
    assert sample.status == Status.FINISHED and len(sample.sequences) == 2
    assert "Q2" * 200 in said(conversation, sample)


def test_a_summary_is_a_reply_of_the_budget(conversation):
    script = Script(conversation, call("f"), "R</think>found 7", "unused")
    world = World(big, shown=False)
    use = {"max_turns": 2, "context": ContextStrategy.summary, "context_threshold": 0.5}
    sample = episode(world, script, conversation, max_context=1200, **use)
    assert sample.status == Status.TRUNCATED and len(script.requests) == 2 and sample.reply == "R</think>found 7"
