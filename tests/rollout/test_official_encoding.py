"""Encoding and parser against DeepSeek-V3.2's own script, on thousands of random conversations and replies.

The script is not part of this project. What it makes of every case is recorded in official_outcomes.txt, from the copy
that SGLang 0.5.23 ships; `python -m tests.rollout.official_script PATH_TO_THE_SCRIPT SOURCE` writes that file again.
Where vLLM is installed, its copy is run as well, on other cases. vLLM 0.32.0 ships the script without its parser.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from model.tokenizer import END_OF_SENTENCE, build_byte_tokenizer
from rl.errors import DataError
from rl.sample import NDArray
from rollout.conversation import Conversation, MalformedReply
from tests.rollout import official_script, random_conversations
from tests.rollout.official_script import NUM_CONVERSATIONS, NUM_REPLIES, REASONS, REFUSED, digest
from tests.rollout.random_conversations import Reply

CONVERSATIONS = [random_conversations.conversation(seed) for seed in range(NUM_CONVERSATIONS)]
REPLIES = [random_conversations.reply(seed) for seed in range(NUM_REPLIES)]
CASES_OF_VLLM = range(10_000, 13_000)


@pytest.fixture(scope="module")
def ours() -> Conversation:
    return Conversation(build_byte_tokenizer())


@pytest.fixture(scope="module")
def recorded() -> tuple[str, list[str], list[str]]:
    return official_script.recorded()


def encoded(ours: Conversation, case: random_conversations.Conversation) -> str:
    """The text of our encoding, or why there is none."""
    try:
        if case.messages[-1]["role"] == "assistant":
            token_ids, _ = ours.encode_demonstration(case.messages, thinking=case.thinking)
        else:
            token_ids = ours.encode(case.messages, thinking=case.thinking)
    except DataError as error:
        return f"{REFUSED}: {error}"
    return official_script.without_empty_lines(ours.spell(token_ids.tolist()))


def parsed(ours: Conversation, case: Reply) -> str:
    """What we read from a reply, or why nothing."""
    try:
        reply = ours.parse_reply(case.text + END_OF_SENTENCE * case.ended, thinking=case.thinking)
    except MalformedReply as error:
        return f"{REFUSED}: {error}"
    calls = [(call.name, call.arguments) for call in reply.calls]
    return official_script.spelled_reply(reply.reasoning or "", reply.answer, calls)


def differs(outcome: str, result: str) -> bool:
    """An outcome with a reason is what the script returns and we refuse."""
    expected = outcome if " " not in outcome else REFUSED
    return expected != (REFUSED if result.startswith(f"{REFUSED}: ") else digest(result))


def compare(cases: Sequence[object], outcomes: list[str], results: list[str]) -> None:
    wrong = [index for index in range(len(cases)) if differs(outcomes[index], results[index])]
    if wrong:
        first = wrong[0]
        pytest.fail(
            f"{len(wrong)} of {len(cases)} cases differ from DeepSeek's script. Number {first} is\n{cases[first]}\n"
            f"of which the script makes {outcomes[first]}, and we make\n{results[first]}"
        )


def continued(ours: Conversation, case: random_conversations.Conversation) -> NDArray | None:
    """The tokens up to the last reply, with what an episode appends for the results or the user message behind it."""
    num_behind = next((n for n, message in enumerate(reversed(case.messages)) if message["role"] == "assistant"), 0)
    before, behind = case.messages[:-num_behind], case.messages[-num_behind:]
    roles = {message["role"] for message in behind}
    try:
        token_ids, sampled = ours.encode_demonstration(before, thinking=case.thinking)
    except DataError:  # no reply, or one that this mode cannot have sampled
        return None
    if roles == {"tool"}:
        results = [message["content"] for message in behind]
        return np.concatenate([token_ids, ours.encode_results(before, (), results, thinking=case.thinking)])
    edges = np.flatnonzero(np.diff(sampled, prepend=False, append=False))
    replies = [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
    follow_directly = len(replies) != np.isin(token_ids[sampled], ours.stop_token_ids).sum()
    if follow_directly or len(behind) != 1 or roles != {"user"}:  # in no episode
        return None
    return ours.encode_next_turn(token_ids, replies, case.messages, thinking=case.thinking)


def test_the_recorded_cases_are_those_of_the_generator(recorded):
    assert recorded[0] == official_script.inputs_digest(CONVERSATIONS, REPLIES), "record the outcomes anew"


def test_conversations_are_encoded_as_by_the_official_script(ours, recorded):
    compare(CONVERSATIONS, recorded[1], [encoded(ours, case) for case in CONVERSATIONS])


def test_replies_are_read_and_refused_as_by_the_official_script(ours, recorded):
    compare(REPLIES, recorded[2], [parsed(ours, case) for case in REPLIES])


def test_the_recorded_cases_are_of_every_kind(recorded):
    """Enough that the script accepts, enough that it refuses, and every reason for being stricter than the script."""
    _, of_conversations, of_replies = recorded
    assert (len(of_conversations), len(of_replies)) == (NUM_CONVERSATIONS, NUM_REPLIES)
    for outcomes in (of_conversations, of_replies):
        assert outcomes.count(REFUSED) > 500
        assert len({outcome for outcome in outcomes if " " not in outcome}) > 1000
    reasons = Counter(reason for outcome in (*of_conversations, *of_replies) for reason in outcome.split()[1:])
    assert {reason for reason in REASONS if not reasons[reason]} == set()
    assert set(reasons) <= set(REASONS)
    roles = Counter(message["role"] for case in CONVERSATIONS for message in case.messages if message.get("tools"))
    assert min(roles["system"], roles["developer"]) > 300


def test_what_an_episode_appends_gives_the_official_prompt(ours, recorded):
    """Results and a further user message, appended to tokens without encoding these again."""
    num_tried = Counter()
    for case, outcome in zip(CONVERSATIONS, recorded[1], strict=True):
        if outcome == REFUSED or " " in outcome or case.messages[-1]["role"] not in ("user", "tool"):
            continue
        prompt = continued(ours, case)
        if prompt is not None:
            text = official_script.without_empty_lines(ours.spell(prompt.tolist()))
            assert digest(text) == outcome, f"{case}\ncontinues as\n{text}"
            num_tried[case.messages[-1]["role"]] += 1
    assert num_tried["tool"] > 500 and num_tried["user"] > 50


def test_the_words_about_tools_are_those_of_deepseeks_published_prompts(ours):
    """Up to the functions, as in encoding/test_output.txt of deepseek-ai/DeepSeek-V3.2, with its empty lines."""
    asked = [{"role": "system", "content": "", "tools": [{"function": {}}]}, {"role": "user", "content": ""}]
    text = ours.spell(ours.encode(asked, thinking=False).tolist())
    words = text[text.index("## Tools") : text.index("{}\n</functions>\n")]
    assert hashlib.sha256(words.encode()).hexdigest() == (
        "963a72ee9be43f07d21bec2348ed2d7e45185e4b502f2a4da35a540299dc2b03"
    )


def test_conversations_are_encoded_as_by_vllms_copy_of_the_script(ours):
    script = pytest.importorskip("vllm.tokenizers.deepseek_v32_encoding")
    cases = [random_conversations.conversation(seed) for seed in CASES_OF_VLLM]
    outcomes = [official_script.encoding_outcome(script, case) for case in cases]
    compare(cases, outcomes, [encoded(ours, case) for case in cases])
