"""Spans of a run: what the file holds, that it stays bounded, and what a span costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.timeline import Timeline
from tests.rl.tiny_runs import read_lines


def ticking(*seconds: float) -> Iterator[float]:
    yield from seconds


def test_a_span_is_open_until_its_block_ends(tmp_path: Path):
    path = tmp_path / "timeline.jsonl"
    now = ticking(100.0, 101.5, 102.0, 104.0, 107.25)
    timeline = Timeline(path, clock=lambda: next(now))
    with timeline.span("learner", "step", step=3):
        with pytest.raises(ValueError), timeline.span("engine 0", "generate") as span:
            assert [one.actor for one in timeline.open] == ["learner", "engine 0"]
            span.detail = "version 2"
            raise ValueError
        assert [one.phase for one in timeline.open] == ["step"]
    assert timeline.open == []
    assert read_lines(path) == [
        {"actor": "engine 0", "phase": "generate", "begin": 2.0, "end": 4.0, "step": None, "detail": "version 2"},
        {"actor": "learner", "phase": "step", "begin": 1.5, "end": 7.25, "step": 3, "detail": ""},
    ]


def test_the_file_stays_bounded_and_keeps_what_came_last(tmp_path: Path):
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path, max_spans=100)
    for step in range(1_000):
        with timeline.span("learner", "step", step=step):
            pass
        assert len(path.read_bytes().splitlines()) < 100
    steps = [row["step"] for row in read_lines(path)]
    assert steps == list(range(steps[0], 1_000)) and len(steps) >= 50


def test_a_continued_file_goes_on_from_its_latest_end(tmp_path: Path):
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"begin": 1.0, "end": 8.0}\n{"begin": 2.0, "end": 5.0}\n{"actor": "lear')
    now = ticking(50.0, 51.0, 53.0)
    with Timeline(path, clock=lambda: next(now)).span("driver", "start"):
        pass
    lines = path.read_text().splitlines()
    assert lines[2] == '{"actor": "lear'
    assert '"begin": 9.0, "end": 11.0' in lines[3]


def test_a_span_is_cheap(tmp_path: Path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    began = time.process_time()
    for _ in range(2_000):
        with timeline.span("rewards", "score", detail="sums/12"):
            pass
    assert (time.process_time() - began) / 2_000 < 1e-3  # 20 microseconds where nothing else runs
