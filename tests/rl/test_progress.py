"""What a run shows: the same facts live and as plain lines, and nothing that matters is overwritten."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rl.progress import Progress, Stage, clock_time, sparkline
from rl.run_directory import RunDirectory
from rl.timeline import Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(terminal: bool, **options):
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
    return Progress("demo", console=console, clock=clock, **options), output, clock


def metrics(step, **more):
    row = {"step": step, "reward/mean": step / 10, "accuracy/sums": 0.5, "tokens_per_s": 1234.6, "staleness/mean": 0.75}
    return row | {"mask/off_policy": 0.021, "ratio/clipped": 0.004} | more


def test_where_there_is_no_terminal_every_step_has_a_line():
    progress, output, clock = make(terminal=False, steps=100)
    with progress:
        progress.enter(Stage.TRAINING)
        for step in range(1, 101):
            clock.now += 1.0
            progress.step(metrics(step))
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["demo: starting", "demo: training"]
    steps = [int(line.split("/")[0].split()[-1]) for line in lines[2:]]
    assert steps == list(range(1, 101))
    assert lines[7] == (
        "demo: step   6/100  reward 0.600  accuracy 50.0%  tokens/s 1,235  staleness 0.8  masked 2.1%  clipped 0.4%"
        "  1:34 left"
    )


def test_an_evaluation_is_in_the_line_of_its_step():
    progress, output, _ = make(terminal=False, steps=10)
    with progress:
        progress.enter(Stage.TRAINING)
        for step in range(4):
            progress.step(metrics(step, **({"eval/sums": step / 4} if step % 2 == 0 else {})))
    assert [line.split("/")[0] for line in output.getvalue().splitlines()[2:]] == [
        "demo: step  0",
        "demo: step  1",
        "demo: step  2",
        "demo: step  3",
    ]
    assert "held out 50.0%" in output.getvalue()


def test_slow_steps_get_a_line_each():
    progress, output, clock = make(terminal=False, steps=5)
    with progress:
        for step in range(1, 6):
            clock.now += 30
            progress.step(metrics(step))
    assert output.getvalue().count("demo: step") == 5
    assert "left" not in output.getvalue().splitlines()[-1]


def test_time_left_is_measured_without_the_first_step_and_counts_down():
    progress, _, clock = make(terminal=False, steps=11)
    progress.enter(Stage.TRAINING)
    clock.now += 60  # the first step waits for the engines
    progress.step(metrics(1))
    assert progress._training.left(clock.now) == pytest.approx(600)
    for step in (2, 3):
        clock.now += 4
        progress.step(metrics(step))
    assert progress._training.left(clock.now) == pytest.approx(8 * 4)
    assert progress._training.left(clock.now + 3) == pytest.approx(8 * 4 - 3)


def test_the_evaluation_before_training_is_not_a_step_to_measure():
    progress, _, clock = make(terminal=False, steps=10)
    clock.now += 500
    progress.step({"step": 0, "eval/sums": 0.25})
    clock.now += 10
    progress.step(metrics(1))
    assert progress._training.left(clock.now) == pytest.approx(90)
    assert progress.evaluations == [(0, {"sums": 0.25})]


def test_lines_of_a_cold_start_come_at_a_sensible_rhythm():
    progress, output, clock = make(terminal=False, steps=10, supervised_steps=23)
    with progress:
        progress.enter(Stage.COLD_START)
        for step in range(1, 24):
            clock.now += 1.0
            progress.supervised_step({"step": step, "loss/supervised": 1.0})
    steps = [int(line.split("/")[0].split()[-1]) for line in output.getvalue().splitlines()[2:]]
    assert steps == [1, 6, 11, 16, 21, 23]


def test_the_cold_start_counts_its_own_steps():
    progress, output, clock = make(terminal=False, steps=10, supervised_steps=300)
    with progress:
        progress.enter(Stage.COLD_START)
        clock.now += 2
        progress.supervised_step({"step": 1, "loss/supervised": 5.5})
        clock.now += 6
        progress.supervised_step({"step": 3, "loss/supervised": 4.25, "loss/indexer": 0.5})
    assert (
        output.getvalue().splitlines()[-1]
        == "demo: cold start step   3/300  loss 4.250  indexer loss 0.500  14:51 left"
    )


def test_the_live_display_shows_the_phase_and_its_numbers_and_leaves_the_last_ones():
    progress, output, clock = make(terminal=True, steps=40)
    with progress:
        progress.enter(Stage.TRAINING)
        for step in (1, 2):
            clock.now += 3
            progress.step(metrics(step))
        frame = Console(file=io.StringIO(), width=100, record=True)
        frame.print(progress._render())
        shown = frame.export_text()
        progress.warn("reward math_answer\nfailed [on] 2 samples")
    for fact in ("demo", "training", "step 2/40", "1:54 left", "reward ▁█", "accuracy 50.0%", "tokens/s 1,235"):
        assert fact in shown
    assert "staleness 0.8" in shown and "masked 2.1%" in shown
    written = output.getvalue()
    assert "warning: reward math_answer failed [on] 2 samples" in written
    assert written.rstrip().splitlines()[-1].endswith("clipped 0.4%  1:54 left")


def shown_by(progress) -> str:
    frame = Console(file=io.StringIO(), width=100, record=True)
    frame.print(progress._render())
    return frame.export_text()


def test_the_live_display_says_what_actors_are_at_and_what_is_wrong():
    clock = Clock()
    timeline = Timeline(clock=clock)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    progress = Progress("demo", steps=5, timeline=timeline, console=console, clock=clock)
    with timeline.span("learner", "step", step=3), timeline.span("rewards", "score"):
        clock.now += 61
        with timeline.span("rewards", "score"), timeline.span("engine 0", "generate"):
            clock.now += 4
            progress.step(metrics(2))
            assert "now learner step 1:05, rewards score (2) 1:05, engine 0 generate 0:04" in shown_by(progress)
    assert "now" not in shown_by(progress) and "warning" not in shown_by(progress)
    progress.warn("a sample failed")
    assert "1 warning\n" in shown_by(progress).replace(" \n", "\n")
    progress.step(metrics(3, **{"alarms/active": 2.0}))
    assert "2 alarms and 1 warning; report.html has them in full" in shown_by(progress)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_model_wrote_cannot_act_on_the_terminal(terminal):
    progress, output, _ = make(terminal=terminal, steps=1)
    progress.warn("reward said \x1b[2J\x1b]0;owned\x07 \u202egnp\r[red]x")
    assert "warning: reward said \\x1b[2J\\x1b]0;owned\\x07 \\u202egnp [red]x" in output.getvalue()
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(output.getvalue())


def test_warnings_are_one_bounded_line():
    progress, output, _ = make(terminal=False, steps=1)
    progress.warn("a\nb\t" + "x" * 1000)
    (line,) = output.getvalue().splitlines()
    assert line.startswith("warning: a b xxx") and line.endswith("…") and len(line) == len("warning: ") + 400


def test_domains_are_named_until_there_are_too_many():
    progress, output, _ = make(terminal=False, steps=1)
    progress.step({"step": 1, "accuracy/a": 0.5, "accuracy/b": 0.25})
    assert "accuracy 50.0% a, 25.0% b" in output.getvalue()
    progress, output, _ = make(terminal=False, steps=1)
    progress.step({"step": 1} | {f"accuracy/{domain}": 0.5 for domain in "abcd"})
    assert "accuracy 50.0% over 4 domains" in output.getvalue()


def test_the_closing_table_says_what_was_gained_and_where_everything_is(tmp_path):
    progress, output, clock = make(terminal=False, steps=2)
    with progress, RunDirectory.create(tmp_path / "demo", recipe="name: demo\n") as run:
        clock.now += 5
        progress.enter(Stage.EVALUATING)
        clock.now += 10
        progress.step({"step": 0, "eval/sums": 0.412})
        run.log({"step": 0, "eval/sums": 0.412})
        progress.enter(Stage.TRAINING)
        clock.now += 70
        progress.enter(Stage.EVALUATING)
        clock.now += 10
        progress.step(metrics(2, **{"eval/sums": 0.938}))
        run.model.mkdir()
    progress.summary(run)
    table = output.getvalue().split("demo finished in 1:35\n")[1]
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert rows["accuracy"] == "sums 41.2% → 93.8%  (+52.6 points)"
    assert rows["time"] == "starting 0:05 · evaluating 0:20 · training 1:10"
    assert rows["metrics"] == str(run.metrics) and rows["model"] == str(run.model)
    assert json.loads(run.metrics.read_text())["step"] == 0
    assert "report" not in rows and "checkpoints" not in rows  # what does not exist is not offered


def test_a_run_that_stopped_is_not_presented_as_finished(tmp_path):
    progress, output, _ = make(terminal=False, steps=2)
    run = RunDirectory.create(tmp_path / "demo", recipe="")
    run.stop("weights differ after the sync of step 3")
    progress.summary(run)
    assert "demo stopped after 0:00: weights differ after the sync of step 3" in output.getvalue()
    assert "finished" not in output.getvalue()


def test_sparkline_spans_its_values_and_leaves_gaps():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([0.0, float("nan"), 1.0]) == "▁ █"
    assert sparkline([float("nan")]) == ""


def test_clock_time():
    assert [clock_time(s) for s in (0, 7.4, 59.6, 252, 7390)] == ["0:00", "0:07", "1:00", "4:12", "2:03:10"]
