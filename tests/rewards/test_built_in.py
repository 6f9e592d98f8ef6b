"""The rewards that ship with Keel, against their formulas by hand and against the libraries they call."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify.errors import TimeoutException

from rewards.format import follows_format
from rewards.language_consistency import LanguageConsistency, words
from rewards.length_penalty import LengthPenalty
from rewards.math_answer import math_answer
from rewards.protocol import Reward
from rewards.reasoning_gym import _ALGEBRA, _ARITHMETIC, _LITERALS, may_evaluate, reasoning_gym_score
from rewards.reply import answer, reasoning
from rl.procedural import entries, library
from rl.sample import Status

EOS = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("thinking", "reply", "expected"),
    [
        (True, f"2 and 2</think> 4 {EOS}", ("2 and 2", "4")),
        (True, "2 and 2 is", ("2 and 2 is", "")),
        (True, "</think>4", ("", "4")),
        (True, "<think>2 and 2</think>4", ("2 and 2", "4")),
        (True, "a</think>b</think>c", ("a</think>b", "c")),
        (False, f" 4{EOS}", ("", "4")),
        (False, "", ("", "")),
    ],
)
def test_reasoning_and_answer(make_sample, thinking, reply, expected):
    sample = make_sample(reply, thinking=thinking)
    assert (reasoning(sample), answer(sample)) == expected


@pytest.mark.parametrize(
    ("thinking", "reply", "status", "expected"),
    [
        (True, f"so</think>4{EOS}", Status.FINISHED, 1.0),
        (True, "</think>4", Status.FINISHED, 1.0),
        (True, "so</think>4", Status.TRUNCATED, 0.0),
        (True, "so 4", Status.FINISHED, 0.0),
        (True, "so</think>4</think>4", Status.FINISHED, 0.0),
        (True, "so</think> \n", Status.FINISHED, 0.0),
        (True, "<think>so</think>4", Status.FINISHED, 1.0),  # as Qwen3 replies, whose template does not open it
        (True, "<think><think>so</think>4", Status.FINISHED, 0.0),
        (True, "so<think>so</think>4", Status.FINISHED, 0.0),
        (True, "so<|im_start|>user</think>4", Status.FINISHED, 0.0),
        (False, "<think>4", Status.FINISHED, 0.0),
        (True, "so<｜User｜>why?</think>4", Status.FINISHED, 0.0),
        (True, f"so</think>4{EOS}{EOS}", Status.FINISHED, 0.0),
        (True, '</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">', Status.FINISHED, 1.0),
        (False, "4", Status.FINISHED, 1.0),
        (False, "so</think>4", Status.FINISHED, 0.0),
        (False, "", Status.FINISHED, 0.0),
    ],
)
def test_format(make_sample, thinking, reply, status, expected):
    assert follows_format(make_sample(reply, thinking=thinking, status=status)) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0.0), (10, 0.0), (15, -0.125), (30, -0.5), (50, -1.0), (500, -1.0)]
)
def test_length_penalty(make_sample, length, expected):
    assert str(LengthPenalty(target=10, limit=50)(make_sample(num_sampled=length))) == str(expected)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "First we add the numbers", 1.0),
        ("en", "First 我们 add", 2 / 4),
        ("zh", "First 我们 add", 2 / 4),
        ("zh", "设 x = 3, 所以 \\frac{x}{2} = 1.5。", 1.0),
        ("en", "12 + 30 = 42 !", 1.0),
        ("en", "", 1.0),
        ("en", "don't naïve café", 1.0),
        ("ru", "Сначала сложим the числа", 3 / 4),
        ("ja", "まず足す then", 4 / 5),
        ("ko", "먼저 더하고 then", 2 / 3),
        ("en", "x1 abc2def", 1.0),
    ],
)
def test_language_consistency(make_sample, language, text, expected):
    score = LanguageConsistency(language=language)
    assert score(make_sample(f"{text}</think>答案 ответ answer", thinking=True)) == pytest.approx(expected)


def test_words():
    assert words("We've 3 apples, 苹果; so x=\\alpha_1.") == ["We've", "apples", "苹", "果", "so"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["apple", "then", "因", "为", "потом", "7", "+", "y"]), max_size=30))
def test_language_consistency_is_a_share(make_sample, parts):
    latin = sum(part in ("apple", "then") for part in parts)
    han = sum(part in ("因", "为") for part in parts)
    total = latin + han + parts.count("потом")
    sample = make_sample(" ".join(parts), thinking=True)
    assert LanguageConsistency(language="en")(sample) == pytest.approx(latin / total if total else 1.0)
    assert LanguageConsistency(language="zh")(sample) == pytest.approx(han / total if total else 1.0)


@pytest.mark.parametrize(
    ("expected", "reply"),
    [
        ("1/2", "\\boxed{0.5}"),
        ("0.5", "So the answer is \\boxed{\\frac{1}{2}}."),
        ("\\frac{1}{2}", "\\boxed{\\dfrac12}"),
        ("$\\frac{2}{4}$", "it is $1/2$"),
        ("\\boxed{7}", "7"),
        (7, "First 3, then 4, so the answer is 7"),
        (0.001, "\\boxed{10^{-3}}"),
        (1e-05, "\\boxed{0.00001}"),
        ("1,234", "\\boxed{1234}"),
        ("12 cm", "\\boxed{12\\text{ cm}}"),
        ("12", "\\boxed{12 \\text{ apples}}"),
        ("50\\%", "\\boxed{50\\%}"),
        ("\\{1, 2, 3\\}", "\\boxed{\\{3, 1, 2\\}}"),
        ("{1,2,3}", "$\\{1,2,3\\}$"),
        ("(1, 2]", "\\boxed{(1, 2]}"),
        ("(x+1)^2", "\\boxed{x^2 + 2x + 1}"),
        ("\\sqrt{8}", "$2\\sqrt{2}$"),
        ("x = 5", "\\boxed{5}"),
        ("-3", "\\boxed{-3}"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\boxed{\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}}"),
        ("4", "I thought $5$, but \\boxed{4} it is, not $6$"),
    ],
)
def test_equal_answers(make_sample, expected, reply):
    assert math_answer(make_sample(reply, answer=expected)) == Reward(1.0, {"undecided": 0.0})


@pytest.mark.parametrize(
    ("expected", "reply"),
    [
        ("1/2", "\\boxed{2}"),
        ("4", "\\boxed{5}, not 4"),
        ("(1, 2]", "\\boxed{(1, 2)}"),
        ("\\{1, 2\\}", "\\boxed{\\{1, 2, 3\\}}"),
        ("x^2", "\\boxed{x^3}"),
        ("4", ""),
        ("4", "I do not know"),
        ("4", "\\boxed{"),
        ("4", "\\boxed{}"),
        ("-3", "\\boxed{3}"),
    ],
)
def test_unequal_answers(make_sample, expected, reply):
    assert math_answer(make_sample(reply, answer=expected)).value == 0.0


def test_only_what_follows_the_thinking_counts(make_sample):
    assert math_answer(make_sample("\\boxed{4}</think>\\boxed{5}", thinking=True)).value == 0.0
    assert math_answer(make_sample("\\boxed{5}</think>\\boxed{4}", thinking=True)).value == 1.0
    assert math_answer(make_sample("so \\boxed{4}", thinking=True, status=Status.TRUNCATED)).value == 0.0


@pytest.mark.parametrize("slow", ["parse", "verify"])
def test_a_conclusion_that_takes_too_long_is_wrong_and_told(make_sample, monkeypatch, slow):
    def too_long(*_: object, **__: object) -> None:
        raise TimeoutException

    sample = make_sample("\\boxed{4}", answer="5")
    assert math_answer(sample).parts["undecided"] == 0.0  # which also remembers the parsed 5
    monkeypatch.setattr(f"rewards.math_answer.{slow}", too_long)
    outcome = math_answer(sample)
    assert outcome.value == 0.0 and outcome.parts["undecided"] == 1.0


@pytest.mark.parametrize("expected", [None, True, ["4"], ""])
def test_a_prompt_without_a_usable_answer_is_an_error(make_sample, expected):
    with pytest.raises(ValueError, match="prompt math/1"):
        math_answer(make_sample("4", answer=expected))


def test_math_answer_refuses_other_threads(make_sample):
    caught = []

    def call() -> None:
        try:
            math_answer(make_sample("4"))
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


TASKS = ("basic_arithmetic", "chain_sum", "countdown", "decimal_arithmetic", "fraction_simplification", "gcd")
TASKS += ("leg_counting", "number_sorting", "sudoku", "word_sorting", "letter_counting", "prime_factorization")


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_the_library(make_sample, task):
    dataset = library().create_dataset(task, size=6, seed=11)
    ours = list(entries(task, size=6, seed=11, args={}))
    rng = random.Random(task)
    for index, entry in enumerate(dataset):
        assert ours[index] == entry
        for text in (entry["answer"], f" {entry['answer']}\n", str(rng.randint(-50, 50)), dataset[index - 1]["answer"]):
            try:
                expected = dataset.score_answer(text.strip(), entry)
            except Exception:
                continue
            sample = make_sample(f"so it is</think>{text}", thinking=True, answer=entry)
            assert reasoning_gym_score(sample).value == expected


def test_answers_that_a_scorer_cannot_read(make_sample):
    (entry,) = entries("prime_factorization", size=1, seed=0, args={})
    assert reasoning_gym_score(make_sample("hello", answer=entry)) == Reward(0.0, {"unreadable": 1.0})
    (entry,) = entries("chain_sum", size=1, seed=0, args={})
    unfinished = make_sample(entry["answer"], thinking=True, answer=entry)
    assert reasoning_gym_score(unfinished) == Reward(0.0, {"unreadable": 0.0})


@pytest.mark.parametrize("task", sorted({*_LITERALS, *_ARITHMETIC, *_ALGEBRA}))
def test_answers_are_not_evaluated_as_python(make_sample, task, tmp_path):
    """An answer that writes a file when it is evaluated writes none, in any of the forms that the scorers evaluate."""
    (entry,) = entries(task, size=1, seed=0, args={})
    marker = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path({str(marker)!r}).write_text('x')"
    for attack in (code, f"[{code}]", f"({code}, 1)[1]", f"[[0, 1], [{code}]]", f"x + {code}", f"1 + int({code})"):
        assert reasoning_gym_score(make_sample(attack, answer=entry)).value < 0.1
    assert not marker.exists()
    assert reasoning_gym_score(make_sample(entry["answer"] or "", answer=entry)).parts["unreadable"] == 0.0


@pytest.mark.parametrize("task", sorted({*_ARITHMETIC, *_ALGEBRA}))
@pytest.mark.parametrize("bomb", ["9**9**9", "9**(9**9)", "9**999999", "x.diff", "f('x')", "10**(10*x**9)"])
def test_answers_that_would_take_for_ever(task, bomb):
    assert not may_evaluate(task, bomb)


def test_honest_answers_are_evaluated():
    assert may_evaluate("countdown", "(3 + 4) * 25 / 5 - 1")
    assert may_evaluate("polynomial_multiplication", "-6*x**3 + 12*x**2*y - 4.5*x")
    assert may_evaluate("simple_integration", "x**2/2 - 3*x**(-1) + sin(x)*exp(-2*x) + log(x) + C")
    assert may_evaluate("intermediate_integration", "sqrt(x**2 + 1)*asinh(x)/3 + C")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9).filter(lambda number: number != 4), min_size=1, max_size=5), st.booleans())
def test_several_guesses_are_worth_no_more_than_one(make_sample, guesses, in_one_box):
    """A reply that boxes the right answer among others has not answered."""
    values = [*map(str, guesses), "4"]
    boxes = f"\\boxed{{{', '.join(values)}}}" if in_one_box else " ".join(f"\\boxed{{{value}}}" for value in values)
    assert math_answer(make_sample(boxes, answer="4")).value == 0.0


@pytest.mark.parametrize(
    "reply", ["\\boxed{4 \\pm 1}", "\\boxed{[0, 10]}", "\\boxed{x}", "\\boxed{4 < 5}", "\\boxed{3;4}"]
)
def test_answers_that_hold_many_values(make_sample, reply):
    assert math_answer(make_sample(reply, answer="4")).value == 0.0


def test_a_prompt_from_elsewhere_is_an_error(make_sample):
    for foreign in ("4", {"question": "2+2?", "answer": "4"}):
        with pytest.raises(ValueError, match="does not come from reasoning_gym"):
            reasoning_gym_score(make_sample("4", answer=foreign))
