"""code_tests on programs that are right, wrong, slow, broken, and dishonest."""

import asyncio
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.code_tests import CodeTests, same_output
from rewards.protocol import Reward

SUM = {"cases": [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "1 1\n", "stdout": "2"}]}
CALLS = {
    "calls": [
        {"call": "add", "args": [1, 2], "returns": 3},
        {"call": "add", "args": [[1], [2]], "returns": [1, 2]},
        {"call": "add", "kwargs": {"a": 0.1, "b": 0.2}, "returns": 0.3},
    ]
}
TESTS = {
    "tests": """
import unittest
assert add(0, 0) == 0
def test_small(): assert add(1, 2) == 3
class Large(unittest.TestCase):
    def test_large(self): self.assertEqual(add(10**9, 1), 10**9 + 1)
"""
}


def score(make_sample, code: str, answer, language: str = "python", **settings) -> Reward:
    reward = CodeTests(language=settings.pop("by", "python"), **settings)
    return asyncio.run(reward(make_sample(f"Here it is:\n```{language}\n{code}\n```\n", answer=answer)))


@pytest.mark.parametrize(
    ("answer", "code", "passed"),
    [
        (SUM, "a, b = map(int, input().split())\nprint(a + b)", 1.0),
        (SUM, "print(7)", 0.5),
        (SUM, "print(input())", 0.0),
        (CALLS, "def add(a, b):\n    print('adding')\n    return a + b", 1.0),
        (CALLS, "def add(a, b): return tuple(a + b) if isinstance(a, list) else a + b", 1.0),
        (CALLS, "def add(a, b): return 3", 1 / 3),
        (TESTS, "def add(a, b): return a + b", 1.0),
        (TESTS, "def add(a, b): return 3 if a == 1 else a + b if a > 1 else 0", 1.0),
        (TESTS, "def add(a, b): return (a + b) % 1000", 0.0),
    ],
)
def test_share_of_tests_passed(make_sample, answer, code, passed):
    outcome = score(make_sample, code, answer, partial=True)
    assert outcome.value == outcome.parts["passed"] == pytest.approx(passed)
    assert score(make_sample, code, answer).value == float(passed == 1)


def test_slow_broken_and_missing_programs(make_sample):
    slow = score(make_sample, "while True: pass", SUM, case_s=0.3)
    assert (slow.value, slow.parts["timeouts"]) == (0.0, 1.0)
    crashed = score(make_sample, "import sys; print(7); sys.exit(1)", SUM)
    assert (crashed.value, crashed.parts["crashed"]) == (0.0, 1.0)
    greedy = score(make_sample, "x = []\nwhile True: x.append(bytearray(1 << 24))", SUM, memory_mb=64)
    assert (greedy.value, greedy.parts["crashed"]) == (0.0, 1.0)
    for reply in ("print(7)", "```\nprint(7)\n", "```rust\nfn main() {}\n```"):
        outcome = asyncio.run(CodeTests()(make_sample(reply, answer=SUM)))
        assert (outcome.value, outcome.parts["no_code"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (TESTS, "import os\nos._exit(0)"),
        (TESTS, "raise SystemExit(0)"),
        (TESTS, "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\ndef add(a, b): return 3"),
        (TESTS, "import os\nfor name in os.listdir('.') + ['/run/staged/' + n for n in os.listdir('.')]:\n"
                "    try: os.write(1, open(name, 'rb').read())\n    except OSError: pass\nos._exit(0)"),
        (CALLS, "import os\nfor fd in range(9):\n    try: os.write(fd, b'3')\n    except OSError: pass\nos._exit(0)"),
        (SUM, "import json\nprint(json.load(open('job.json')))"),
        (SUM, "import os\nprint(open(f'/proc/{os.getppid()}/mem', 'rb'))"),
        (SUM, "import glob\nfor name in glob.glob('/box/*') + glob.glob('*'): print(open(name).read())"),
    ],
)  # fmt: skip
def test_dishonest_programs(make_sample, answer, code):
    assert score(make_sample, code, answer).value == 0.0


def test_expected_values_are_not_inside(make_sample):
    """The program prints every file it can reach; the odd number that it should have printed is in none of them."""
    reward = CodeTests()
    sample = make_sample("```python\nprint(1)\n```", answer={"cases": [{"stdin": "x", "stdout": "814726531"}]})
    _, files, _ = reward._tests(sample)
    assert "814726531" not in "".join(files.values())


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("bash", "read a b\necho $((a + b))"),
        ("cpp", "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"),
        (
            "javascript",
            "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number); console.log(a + b)",
        ),
    ],
)
def test_other_languages(make_sample, name, code):
    if shutil.which({"bash": "bash", "cpp": "g++", "javascript": "node"}[name]) is None:
        with pytest.raises(ValueError, match="which is not installed"):
            CodeTests(language=name)
        return
    assert score(make_sample, code, SUM, language=name, by=name).value == 1.0


def test_a_program_that_does_not_build(make_sample):
    if shutil.which("g++"):
        outcome = score(make_sample, "int main() { return x; }", SUM, language="cpp", by="cpp")
        assert (outcome.value, outcome.parts["build_failed"]) == (0.0, 1.0)


def test_mistakes_in_arguments_and_prompts(make_sample):
    with pytest.raises(ValueError, match="did you mean 'python'"):
        CodeTests(language="pyton")
    with pytest.raises(ValueError, match="must be above 0"):
        CodeTests(case_s=0)
    for answer in ("4", {}, {**SUM, **TESTS}):
        with pytest.raises(ValueError, match="exactly one of cases, calls and tests"):
            score(make_sample, "print(1)", answer)


@pytest.mark.parametrize(
    ("expected", "said", "same"),
    [
        ("7", "7\n\n", True),
        ("a b\nc", "a  b \nc\n", True),
        ("0.333333333", "0.3333333", True),
        ("0.3333", "0.34", False),
        ("7", "7.0", False),
        ("1e3", "1000", True),
        ("a\nb", "a b", False),
        ("", "\n", True),
        ("1.5", "nan", False),
    ],
)
def test_outputs_that_are_the_same(expected, said, same):
    assert same_output(expected, said) is same


@given(st.lists(st.lists(st.integers() | st.text("abc", min_size=1), max_size=4), max_size=4))
def test_white_space_at_ends_does_not_matter(rows):
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    padded = "\n".join("  ".join(map(str, row)) + "  " for row in rows) + "\n\n"
    assert same_output(text, padded)
    assert not same_output(text, padded.rstrip() + " extra")
