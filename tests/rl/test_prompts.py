import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import Domain
from rl.errors import DataError, RecipeError
from rl.procedural import library
from rl.prompts import PromptStream, load_prompts, load_split, question, split
from rl.sample import Prompt

ARITHMETIC = Path(__file__).parents[2] / "recipes/data/arithmetic.jsonl"


def write(path: Path, *rows: object) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def load(source, **settings) -> list[Prompt]:
    return load_prompts("math", Domain(prompts=source, **settings))


def prompts(*texts: str, domain: str = "math") -> list[Prompt]:
    return [
        Prompt(id=f"{domain}/{number}", domain=domain, messages=({"role": "user", "content": text},))
        for number, text in enumerate(texts)
    ]


def test_jsonl(tmp_path):
    tool = {"name": "search"}
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "1"},
    ]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "2+2?", "answer": 4, "source": "mine"},
        b"",
        {"id": "x", "messages": chat, "answer": {"rubric": "kind"}, "tools": [tool]},
    )
    first, second = load(path, thinking=False, system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert (first.id, first.domain, first.answer, first.thinking) == ("math/0", "math", 4, False)
    assert first.messages == (system, {"role": "user", "content": "2+2?"})
    assert (second.id, second.answer, second.tools) == ("math/x", {"rubric": "kind"}, (tool,))
    assert second.messages == (system, *chat)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"prompt": "2+2?",}', "is not JSON (Illegal trailing comma before end of object at column 18"),
        (b'{"prompt": "2+2?"', "is not JSON (Expecting ',' delimiter at column 18)"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b'{"prompt": "a", "answer": ["\\ud83d"]}', "holds half of a surrogate pair (\\ud800 to \\udfff)"),
        (b'{"prompt": "a", "answer": ' + b"7" * 5000 + b"}", "cannot be read (Exceeds the limit"),
        ({"answer": "4"}, "has neither prompt nor messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "has both prompt and messages"),
        ({"prompt": "a", "anwser": "4"}, "unknown field 'anwser'; did you mean 'answer'?"),
        ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": " "}, "prompt must be a text that is not empty"),
        ({"prompt": 7}, "prompt must be a text"),
        ({"messages": []}, "at least one"),
        ({"messages": ["hi"]}, "messages[0] must be an object with role and content, not a text"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0] has role 'human'; use one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a text as content, not nothing"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must end with the user's turn"),
        ({"prompt": "a", "tools": {"name": "f"}}, "tools must be a list"),
        ({"prompt": "a", "id": "same"}, "id 'same' is already taken by"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, problem):
    path = write(tmp_path / "p.jsonl", {"prompt": "fine", "id": "same"}, b"", row)
    with pytest.raises(DataError) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(f"{path} line 3: ") and "\n" not in message
    assert problem.split(" (")[0] in message


def test_whole_surrogate_pairs_and_escaped_backslashes_are_characters(tmp_path):
    path = write(tmp_path / "p.jsonl", b'{"prompt": "\\ud83d\\ude00"}', b'{"prompt": "\\\\ud800"}')
    contents = [prompt.messages[0]["content"] for prompt in load(path)]
    assert contents == ["\N{GRINNING FACE}", "\\ud800"]


def test_two_system_messages_are_an_error(tmp_path):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    path = write(tmp_path / "p.jsonl", {"messages": chat})
    assert load(path)[0].messages == tuple(chat)
    with pytest.raises(DataError, match=r"line 1: has a system message of its own while domains\.math\.system is set"):
        load(path, system="c")


def test_parquet(tmp_path):
    chat = [{"role": "user", "content": "hi", "name": None}]
    table = pa.table({"prompt": ["2+2?", None], "messages": [None, chat], "answer": ["4", None]})
    pq.write_table(table, tmp_path / "p.parquet")
    first, second = load(str(tmp_path / "p.parquet"))
    assert first.messages == ({"role": "user", "content": "2+2?"},) and first.answer == "4"
    assert second.messages == ({"role": "user", "content": "hi"},) and second.answer is None

    pq.write_table(pa.table({"prompt": ["a", ""]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet row 2: prompt must be a text"):
        load(str(tmp_path / "bad.parquet"))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "p.csv").write_bytes(b"a,b\n")
    for name, problem in {
        "missing.jsonl": "does not exist",
        "p.parquet": "is not readable Parquet",
        "empty.jsonl": "holds no rows",
        "p.csv": r"must end in \.jsonl or \.parquet",
        "": "is a directory",
    }.items():
        with pytest.raises(DataError, match=problem):
            load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (7, "must be a file or"),
        ({"flie": "a.jsonl"}, "no key 'flie'; did you mean 'file'?"),
        ({"template": "{question}"}, "must name a file"),
        ({"reasoning_gym": "chain_sums"}, "no task 'chain_sums'; did you mean 'chain_sum'?"),
        ({"reasoning_gym": "chain_sum", "args": {"min_term": 2}}, "no argument 'min_term'; did you mean 'min_terms'?"),
        ({"reasoning_gym": "chain_sum", "args": {"size": 2}}, "no argument 'size'"),
        ({"reasoning_gym": "chain_sum", "args": {"min_terms": 0}}, "min_terms must be positive"),
        ({"reasoning_gym": "chain_sum", "args": {"min_terms": "two"}}, "does not accept"),
        ({"reasoning_gym": "chain_sum", "size": 0}, "size must be a whole number from 1 on"),
        ({"reasoning_gym": "chain_sum", "seeds": 1}, "no key 'seeds'; did you mean 'seed'?"),
        ({"reasoning_gym": "chain_sum", "template": "solve:"}, "with {question} in it"),
        ({"reasoning_gym": "chain_sum", "template": "{expresion}"}, "{expresion}; did you mean 'expression'?"),
    ],
)
def test_sources_that_cannot_be(source, problem):
    with pytest.raises(RecipeError) as raised:
        load(source)
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_procedural_prompts_are_the_library_s():
    source = {"reasoning_gym": "gcd", "size": 20, "seed": 5, "args": {"max_numbers": 3}}
    wanted = list(library().create_dataset("gcd", size=20, seed=5, max_numbers=3))
    loaded = load(source)
    assert [prompt.messages[0]["content"] for prompt in loaded] == [entry["question"] for entry in wanted]
    assert [prompt.answer for prompt in loaded] == wanted
    assert load(source) == loaded


def test_templates(tmp_path):
    source = {"reasoning_gym": "chain_sum", "size": 3, "template": "{expression} = \\boxed{}?"}
    for prompt in load(source):
        assert prompt.messages[0]["content"] == f"{prompt.answer['metadata']['expression']} = \\boxed{{}}?"
    path = write(tmp_path / "p.jsonl", {"prompt": "What is {x}?"})
    (prompt,) = load({"file": path, "template": "{question}\nAnswer in \\boxed{}."})
    assert prompt.messages[0]["content"] == "What is {x}?\nAnswer in \\boxed{}."


def test_small_tasks_repeat_themselves_but_prompts_do_not():
    loaded = load({"reasoning_gym": "chain_sum", "size": 500, "args": {"max_terms": 2, "max_digits": 1}})
    texts = [question(prompt) for prompt in loaded]
    assert len(set(texts)) == len(texts) < 200


def test_reasoning_gym_works_without_pycosat():
    script = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'pycosat' else find(name, package)\n"
        "from rl.procedural import entries\n"
        "print(next(entries('chain_sum', size=1, seed=0, args={}))['answer'])\n"
        "assert type(sys.modules['pycosat']).__name__ == '_AbsentSolver'\n"
        "try:\n    next(entries('zebra_puzzles', size=1, seed=0, args={}))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    answer, sentence = done.stdout.strip().splitlines()
    assert int(answer) and sentence.startswith("RecipeError this reasoning_gym task solves puzzles with pycosat")


def test_the_shipped_data():
    loaded = load(str(ARITHMETIC))
    assert len(loaded) == 50 == len({question(prompt) for prompt in loaded})
    training, evaluation = load_split("math", Domain(prompts=str(ARITHMETIC)), 10, seed=0)
    assert (len(training), len(evaluation)) == (40, 10)


texts = st.lists(st.sampled_from([f"q{n}" for n in range(12)] + ["q0 ", " q1"]), min_size=2, max_size=40)


@settings(deadline=None)
@given(texts, st.integers(0, 11), st.integers(0, 9))
def test_no_question_is_in_both_halves(names, num_eval, seed):
    members = prompts(*names)
    different = len({name.strip() for name in names})
    if num_eval and different - num_eval < 1:
        with pytest.raises(RecipeError, match="too few to hold out"):
            split(members, num_eval, seed=seed)
        return
    training, evaluation = split(members, num_eval, seed=seed)
    asked, held_out = ({question(prompt) for prompt in half} for half in (training, evaluation))
    assert len(evaluation) == len(held_out) == num_eval
    assert not asked & held_out
    assert asked | held_out == {question(prompt) for prompt in members}
    assert training == [prompt for prompt in members if question(prompt) in asked]
    assert split(members, num_eval, seed=seed) == (training, evaluation)


def test_seeds_hold_out_different_prompts():
    members = prompts(*(f"q{n}" for n in range(100)))
    halves = {tuple(prompt.id for prompt in split(members, 10, seed=seed)[1]) for seed in range(5)}
    assert len(halves) == 5


def test_evaluation_prompts_of_their_own(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"prompt": f"q{n}"} for n in range(6)))
    apart = write(tmp_path / "eval.jsonl", *({"prompt": f"q{n}"} for n in range(4, 9)))
    domain = Domain(prompts=train, eval_prompts=apart)
    training, evaluation = load_split("math", domain, 3, seed=0)
    assert [prompt.messages[0]["content"] for prompt in training] == ["q0", "q1", "q2", "q3"]
    assert len(evaluation) == 3 and all(prompt.id.startswith("math/eval/") for prompt in evaluation)
    assert len(load_split("math", domain, 50, seed=0)[1]) == 5
    with pytest.raises(RecipeError, match="every one of its prompts"):
        load_split("math", Domain(prompts=train, eval_prompts=train), 2, seed=0)


sizes = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 7), st.floats(0.1, 10)), min_size=1)


def stream_of(domains: dict[str, tuple[int, float]], seed: int) -> PromptStream:
    members = {name: prompts(*map(str, range(size)), domain=name) for name, (size, _) in domains.items()}
    return PromptStream(members, {name: weight for name, (_, weight) in domains.items()}, seed=seed)


@settings(deadline=None)
@given(sizes, st.integers(0, 5), st.integers(0, 60), st.integers(1, 60))
def test_a_resumed_stream_continues_exactly(domains, seed, before, after):
    stream = stream_of(domains, seed)
    for _ in range(before):
        stream.next()
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = stream_of(domains, seed)
    resumed.load_state_dict(state)
    assert [stream.next().id for _ in range(after)] == [resumed.next().id for _ in range(after)]
    assert stream.state_dict() == resumed.state_dict()


@settings(deadline=None)
@given(sizes, st.integers(0, 5))
def test_every_prompt_once_an_epoch_and_domains_by_weight(domains, seed):
    stream = stream_of(domains, seed)
    drawn = [stream.next() for _ in range(200)]
    counts = Counter(prompt.domain for prompt in drawn)
    total = sum(weight for _, weight in domains.values())
    for name, (size, weight) in domains.items():
        assert abs(counts[name] - 200 * weight / total) < len(domains)
        ids = [prompt.id for prompt in drawn if prompt.domain == name]
        epochs = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)


def test_epochs_and_seeds_shuffle_afresh():
    domains = {"math": (50, 1.0)}
    stream = stream_of(domains, 0)
    first, second = ([stream.next().id for _ in range(50)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    other = stream_of(domains, 1)
    assert [other.next().id for _ in range(50)] != first


def test_a_stream_is_not_resumed_with_other_prompts():
    state = stream_of({"math": (5, 1.0)}, 0).state_dict()
    with pytest.raises(DataError, match="drawn from 5 of math, the recipe now gives 6 of math"):
        stream_of({"math": (6, 1.0)}, 0).load_state_dict(state)
    with pytest.raises(DataError, match="drawn with seed 0, the recipe has 1"):
        stream_of({"math": (5, 1.0)}, 1).load_state_dict(state)


def test_streams_that_cannot_be():
    with pytest.raises(RecipeError, match=r"domains\.math\.weight must be a number above 0, not -1"):
        stream_of({"math": (5, -1)}, 0)
    with pytest.raises(RecipeError, match="has no prompts"):
        stream_of({"math": (0, 1.0)}, 0)
    with pytest.raises(RecipeError, match="has no domains"):
        stream_of({}, 0)
