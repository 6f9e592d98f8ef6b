"""python -m rewards.check and python -m rewards.calibrate, and the saved samples that they read."""

import json
import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import calibrate, check
from rewards.calibrate import agreement, read_gold
from rewards.saved import read_samples, siblings
from rl.errors import DataError
from rl.sample import Prompt, Scored, ToolCall, ToolResult, Turn
from rl.trajectory import SequenceView, Trajectory
from tests.rewards.judges import Form, honest, judge_elsewhere
from tests.rl.tiny_rewards import seen


def write(path, *lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_runs_trajectories_come_back_as_rewards_saw_them(make_sample, tmp_path):
    turns = (Turn(reply="a", calls=(ToolCall(name="f", arguments={"x": [1]}),), results=(ToolResult(text="r"),)),)
    samples = [
        replace(make_sample("so</think>4", thinking=True), turns=turns, final_state={"at": 1}),
        make_sample("5", index=3, num_sampled=7),
    ]
    earlier = tuple(replace(make_sample(f"{part}", index=3, num_sampled=part + 2), part=part) for part in range(2))
    encoded = Prompt(id="math/1", domain="math", token_ids=earlier[0].token_ids[~earlier[0].sampled], thinking=False)
    samples += [replace(samples[1], earlier=earlier), replace(samples[1], earlier=earlier, prompt=encoded)]
    records = [
        Trajectory(
            scored=Scored(sample=sample, reward=0.5),
            sequences=[SequenceView(sample=one, token_texts=["x"] * len(one)) for one in sample.sequences],
            advantage=0.0,
        ).record()
        for sample in samples
    ]
    read = read_samples(write(tmp_path / "step_1.jsonl", *records))
    assert [seen(sample) for sample in read] == [seen(sample) for sample in samples]
    assert [sample.num_generated for sample in read] == [sample.num_generated for sample in samples]
    assert read[3].prompt.token_ids is not None and encoded.token_ids is not None
    assert read[3].prompt.token_ids.tolist() == encoded.token_ids.tolist()
    assert [[sample.index for sample in group] for group in siblings(read)] == [[0, 3, 3, 3]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"reply": "4"}, "line 1: needs messages, or a text as prompt"),
        ({"prompt": "2+2?"}, "line 1: needs a text as reply"),
        ({"prompt": "2+2?", "reply": "4", "status": "odd"}, "line 1: is no sample"),
        ({"prompt": "2+2?", "reply": "4", "turns": [{}]}, "line 1: is no sample"),
        ({"prompt": "2+2?", "reply": "4", "token_ids": [1, 2, 3]}, "line 1: is no sample"),
    ],
)
def test_lines_that_are_no_samples(tmp_path, line, problem):
    with pytest.raises(DataError, match=problem):
        read_samples(write(tmp_path / "x.jsonl", line))


def test_check(user_rewards, tmp_path, capsys):
    lines = [{"prompt": "p", "reply": reply} for reply in ("four", "a longer reply", "hang", "die", "x")]
    path = write(tmp_path / "x.jsonl", *lines)
    assert check.main([f"{user_rewards}:brevity", path, "target=2", "weight=0.5"]) == 0
    said = capsys.readouterr().out
    assert "0.25  p#0" in said and "5 samples, 0 failed" in said
    assert check.main([f"{user_rewards}:hangs_on_hang", path, "--timeout", "0.5"]) == 1
    said = capsys.readouterr().out
    assert "p#2  took longer than its timeout of 0.5 s" in said and "5 samples, 1 failed" in said
    assert "1 of 1 groups have one reward for all siblings" in said
    assert check.main([f"{user_rewards}:dies_on_die", path, "--limit", "4"]) == 1
    assert "p#3  ended or crashed its process" in capsys.readouterr().out


def test_check_gives_a_batched_reward_whole_groups(user_rewards, tmp_path, capsys):
    lines = [{"prompt": prompt, "reply": "x" * size} for prompt, size in (("p", 3), ("q", 9), ("p", 1), ("q", 8))]
    assert check.main([f"{user_rewards}:ranks", write(tmp_path / "x.jsonl", *lines)]) == 0
    values = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "#" in line]
    assert values == [["1", "p#0"], ["1", "q#0"], ["0", "p#1"], ["0", "q#1"]]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["brevity"], "neither built in"),
        (["format", "x=1"], "does not take the argument 'x'"),
        (["format", "--limit", "1", "x=1"], "does not take the argument 'x'"),
        (["format", "strict"], "write it as key=value"),
        (["rubric"], "needs a judge"),
        (["rubric", "--judge-url", "http://x", "--judge-key", "KEEL_NO_SUCH_KEY"], "no variable KEEL_NO_SUCH_KEY"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, problem):
    name, *rest = arguments
    path = write(tmp_path / "x.jsonl", {"prompt": "p", "reply": "4"})
    assert check.main([name, path, *rest]) == 1
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


RUBRIC = [{"name": "year", "criterion": "names '1648'"}, {"name": "place", "criterion": "names 'Münster'"}]


def test_calibrate(tmp_path, capsys, monkeypatch):
    replies = {"1648 in Münster": 1.0, "1648": 0.5, "in Münster": 0.25, "no idea": 0.0}
    lines = [
        {"prompt": reply, "reply": reply, "rubric": RUBRIC, "score": score, "scores": {"year": int("1648" in reply)}}
        for reply, score in replies.items()
    ]
    out = tmp_path / "out.jsonl"
    gold = write(tmp_path / "gold.jsonl", *lines)
    with judge_elsewhere(honest) as (url, key):
        monkeypatch.setenv("KEEL_TEST_JUDGE", key)
        options = ["--judge-url", url, "--judge-model", "m", "--judge-key", "KEEL_TEST_JUDGE"]
        assert calibrate.main([gold, *options, "--votes", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    expected = statistics.correlation(list(replies.values()), [1, 0.5, 0.5, 0])
    assert "4 answers, 0 without a verdict" in said and f"{expected:8.3f}" in said
    assert f"{'year':24} {4:5} {1:8.3f} {1:8.3f} {0:8.3f} {0:8.3f}" in said
    assert "no verdict: 0.0%" in said and "8 calls" in said
    assert [json.loads(line)["judge"]["value"] for line in out.read_text().splitlines()] == [1, 0.5, 0.5, 0]


def test_mistakes_in_gold_files(tmp_path, capsys):
    good = {"prompt": "q", "reply": "x", "rubric": RUBRIC, "score": 1}
    for line, problem in (
        ({**good, "score": 7}, "from 0 to 1 as score"),
        ({**good, "rubric": None}, "needs a rubric"),
        ({**good, "scores": {"color": 1}}, "names of the rubric's criteria"),
    ):
        with pytest.raises(DataError, match=f"line 1: .*{problem}"):
            read_gold(write(tmp_path / "gold.jsonl", line))
    assert calibrate.main([write(tmp_path / "gold.jsonl", good)]) == 1
    assert "give --judge-url" in capsys.readouterr().err


scores = st.integers(0, 100).map(lambda percent: percent / 100)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=20))
def test_agreement(pairs):
    people, judge = map(list, zip(*pairs, strict=True))
    found = agreement(people, judge)
    assert found.mean_error == pytest.approx(np.mean(np.array(judge) - people), abs=1e-12)
    assert found.mean_absolute_error == pytest.approx(np.mean(np.abs(np.array(judge) - people)), abs=1e-12)
    assert math.isnan(found.pearson) == (len(set(people)) < 2 or len(set(judge)) < 2)
    assert math.isnan(found.spearman) or -1.0001 <= found.spearman <= 1.0001


def test_spearman_follows_order_alone():
    people = random.Random(0).sample(range(100), 20)
    judge = [math.exp(value / 10) for value in people]
    found = agreement(people, judge)
    assert found.spearman == pytest.approx(1.0) and found.pearson < 0.9
    assert agreement([0, 0, 1, 1], [0, 1, 0, 1]).spearman == pytest.approx(0.0)


def test_forms_are_read_back():
    """The scripted judges rest on it."""
    text = '- bcdfg (0 to 4): names it\nquestion-0123456789abcdef: "q"\nanswer-0123456789abcdef: "a\\n\\u003cb"'
    form = Form.read([{"content": text}], 3)
    assert form.criteria == [("bcdfg", 4, "names it")]
    assert form.quoted == {"question": "q", "answer": "a\n<b"} and form.seed == 3
