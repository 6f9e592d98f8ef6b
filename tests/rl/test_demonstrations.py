import json
from pathlib import Path

import pytest

from rl.demonstrations import load_demonstrations
from rl.errors import DataError, RecipeError
from rl.sample import Prompt

TEACHER = """
def add(prompt, rng, *, style="plain"):
    a, b = map(int, prompt.answer.split("+"))
    return {"reasoning": f"{a} and {b} {style} {rng.integers(1000)}", "content": str(a + b)}

def silent(prompt, rng):
    return {"content": "4"}

def raises(prompt, rng):
    raise ValueError("cannot read the prompt")

def text(prompt, rng):
    return "4"
"""


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"teacher_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def prompts(number: int, thinking: bool = True) -> list[Prompt]:
    return [
        Prompt(
            id=f"math/{n}",
            domain="math",
            messages=({"role": "user", "content": f"{n}+1?"},),
            answer=f"{n}+1",
            thinking=thinking,
        )
        for n in range(number)
    ]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def test_a_function_is_called_over_the_training_prompts(teacher):
    source = {"function": f"{teacher}:add", "size": 7, "args": {"style": "plus"}}
    demonstrations = load_demonstrations(source, prompts(5), seed=3)
    assert len(demonstrations) == 7
    assert {d.prompt.id for d in demonstrations[:5]} == {f"math/{n}" for n in range(5)}
    for demonstration in demonstrations:
        a = int(demonstration.prompt.answer.split("+")[0])
        assert demonstration.reply["content"] == str(a + 1) and demonstration.reply["role"] == "assistant"
        assert demonstration.reply["reasoning_content"].startswith(f"{a} and 1 plus")
        assert demonstration.messages == (*demonstration.prompt.messages, demonstration.reply)
    assert load_demonstrations(source, prompts(5), seed=3) == demonstrations
    assert load_demonstrations(source, prompts(5), seed=4) != demonstrations
    assert len({d.reply["reasoning_content"].split()[-1] for d in demonstrations}) > 1
    assert len(load_demonstrations({"function": f"{teacher}:add"}, prompts(5), seed=3)) == 5


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"function": "{}:ad"}, "did you mean 'add'?"),
        ({"function": "{}:add", "args": {"stile": "x"}}, "argument 'stile'; did you mean 'style'?"),
        ({"function": "{}:add", "sise": 3}, "no key 'sise'; did you mean 'size'?"),
        ({"function": "{}:add", "size": 0}, "size must be a whole number"),
        ({"function": "{}:silent"}, "on prompt math/0: the policy thinks in this domain"),
        ({"function": "{}:raises"}, "raised ValueError: cannot read the prompt"),
        ({"function": "{}:text"}, "returned str, not a message"),
        ({"files": "a"}, "must be a file or"),
    ],
)
def test_functions_that_cannot_be_used(teacher, source, problem):
    if "function" in source:
        source = {**source, "function": source["function"].format(teacher)}
    with pytest.raises((RecipeError, DataError)) as raised:
        load_demonstrations(source, prompts(1), seed=0)
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_reasoning_only_where_the_policy_thinks(teacher):
    assert load_demonstrations({"function": f"{teacher}:silent"}, prompts(2, thinking=False), seed=0)
    with pytest.raises(DataError, match="does not think in this domain"):
        load_demonstrations({"function": f"{teacher}:add"}, prompts(2, thinking=False), seed=0)


def test_a_file(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"messages": [turn("user", "0+1?"), turn("assistant", "1", reasoning="easy")]},
        {"messages": [turn("system", "s"), turn("user", "hello"), turn("assistant", "hi")]},
    )
    first, second = load_demonstrations(path, [], seed=0)
    assert first.prompt.thinking and first.reply == turn("assistant", "1", reasoning_content="easy")
    assert not second.prompt.thinking and [m["role"] for m in second.prompt.messages] == ["system", "user"]
    (left,) = load_demonstrations(path, [], seed=0, held_out=prompts(3))
    assert left == second


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a"}, "has no messages"),
        ({"messages": [turn("user", "a")]}, "must end in an assistant message"),
        ({"messages": [turn("assistant", "a")]}, "must end in an assistant message"),
        ({"messages": [turn("user", "a"), turn("assistant", "")]}, "has no content"),
        ({"mesages": []}, "did you mean 'messages'?"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "d.jsonl", {"messages": [turn("user", "a"), turn("assistant", "b")]}, row)
    with pytest.raises(DataError) as raised:
        load_demonstrations(path, [], seed=0)
    assert str(raised.value).startswith(f"{path} line 2: ") and problem in str(raised.value)
