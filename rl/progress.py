"""What a run shows in the terminal: a live display, or plain lines where the output is not a terminal.

with Progress("quickstart", steps=120, supervised_steps=300) as progress:
    progress.enter(Stage.TRAINING)
    progress.step({"step": 1, "reward/mean": 0.4, ...})
    progress.warn("reward math_answer failed on 2 samples of step 1")
progress.summary(run)
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rl.printable import printable
from rl.run_directory import FINISHED, RunDirectory
from rl.secrets import redact
from rl.timeline import Timeline

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 32
LINE_EVERY_S = 5.0  # plain lines of a cold start come at most this often; a step of training always has one
ACTORS_SHOWN = 6
INTERVALS = 20  # steps over which the pace is measured
DOMAINS_SHOWN = 3
LONGEST_WARNING = 400  # characters


class Stage(StrEnum):
    """What a run is at."""

    STARTING = "starting"
    COLD_START = "cold start"
    EVALUATING = "evaluating"
    TRAINING = "training"
    SAVING = "saving"


class Progress:
    """Follows a run from its metrics; the names it reads are those of the design page, and any may be missing.

    The live display also says what the actors of ``timeline`` are at. ``clock`` returns seconds and only its
    differences matter.
    """

    def __init__(
        self,
        name: str,
        *,
        steps: int,
        supervised_steps: int = 0,
        timeline: Timeline | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.stage = Stage.STARTING
        self.seconds: dict[Stage, float] = {}
        self.evaluations: list[tuple[int, dict[str, float]]] = []  # (step, {domain: accuracy})
        self._console = console or Console(file=sys.stdout)
        self._clock = clock
        self._started = self._entered = clock()
        self._training = _Course(steps)
        self._supervised = _Course(supervised_steps)
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_WIDTH)
        self._timeline = timeline
        self._num_warnings = 0
        self._num_alarms = 0  # that are on
        self._shown: dict[str, str] = {}  # what the last step said, kept through stages that say nothing
        self._last_line = -LINE_EVERY_S
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._print(f"{self.name}: {self.stage}")
        return self

    def __exit__(self, *exception: object) -> None:
        self._tally()
        if self._live.is_started:
            self._live.stop()
            if self._shown:
                self._print(self._line())  # the display is gone; its last numbers stay

    def enter(self, stage: Stage) -> None:
        """Says what the run does from now on."""
        if stage == self.stage:
            return
        self._tally()
        self.stage = stage
        for course in (self._training, self._supervised):
            course.resume(self._clock())
        if not self._live.is_started:
            self._print(f"{self.name}: {stage}")

    def resume(self, step: int, rows: Sequence[Mapping[str, float]], *, cold_step: int = 0) -> None:
        """Goes on after ``step``, or that of the cold start, with the rows of metrics so far; also back from a later
        one."""
        self.evaluations = [(int(row["step"]), found) for row in rows if (found := _by_domain(row, "eval/"))]
        self._training.rewind(step, self._clock())
        self._supervised.rewind(cold_step, self._clock())

    def say(self, sentence: str) -> None:
        """One line that stays on the screen."""
        self._print(f"{self.name}: {sentence}")

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step of reinforcement learning. Step 0 is the evaluation before the first one."""
        step = int(metrics["step"])
        accuracies = _by_domain(metrics, "eval/")
        if accuracies:
            self.evaluations.append((step, accuracies))
        if "reward/mean" in metrics:
            self._rewards.append(metrics["reward/mean"])
        self._shown = _readable(metrics)
        self._num_alarms = int(metrics.get("alarms/active") or 0)
        self._training.advance(step, self._clock())
        if not self._live.is_started:
            self._print(self._line())

    def supervised_step(self, metrics: Mapping[str, float]) -> None:
        """A step of the cold start."""
        names = {"loss": "loss/supervised", "indexer loss": "loss/indexer"}
        self._shown = {label: f"{metrics[name]:.3f}" for label, name in names.items() if name in metrics}
        course, now = self._supervised, self._clock()
        course.advance(int(metrics["step"]), now)
        due = course.step in (1, course.steps) or now - self._last_line >= LINE_EVERY_S
        if due and not self._live.is_started:
            self._last_line = now
            self._print(self._line())

    def warn(self, sentence: str) -> None:
        """One line that stays on the screen, above the live display."""
        self._num_warnings += 1
        line = printable(" ".join(sentence.split()))
        line = line if len(line) <= LONGEST_WARNING else line[: LONGEST_WARNING - 1] + "…"
        self._print("warning: " + line, style="yellow")

    def summary(self, run: RunDirectory) -> None:
        """The closing table: how the run ended, what it gained, where its time went and where everything is."""
        took = clock_time(sum(self.seconds.values()))
        if run.status.status == FINISHED:
            self._print(f"\n{self.name} finished in {took}", style="bold green")
        else:
            reason = f": {run.status.reason}" if run.status.reason else ""
            self._print(f"\n{self.name} {run.status.status} after {took}{reason}", style="bold red")
        rows = [*self._gains(), *self._stage_times()]
        places = {
            "recipe": run.recipe,
            "metrics": run.metrics,
            "samples": run.samples,
            "report": run.report,
            "model": run.model,
            "checkpoints": run.checkpoints,
        }
        rows += [(label, str(path)) for label, path in places.items() if path.exists()]
        rows.append(("tensorboard", f"tensorboard --logdir {run.path}"))
        for label, value in rows:
            self._console.print(
                Text.assemble((f"  {label:<12}", "dim"), value), soft_wrap=True, highlight=False, markup=False
            )

    def _course(self) -> _Course:
        """Whose steps the current stage counts."""
        return self._supervised if self.stage is Stage.COLD_START else self._training

    def _line(self) -> str:
        course = self._course()
        numbers = "  ".join(f"{label} {value}" for label, value in self._shown.items())
        kind = "cold start step" if course is self._supervised else "step"
        left = course.left(self._clock())
        ending = f"  {clock_time(left)} left" if left else ""
        return f"{self.name}: {kind} {course.step:>{len(str(course.steps))}}/{course.steps}  {numbers}{ending}"

    def _render(self) -> RenderableType:
        now, course = self._clock(), self._course()
        head = Table.grid(padding=(0, 2))
        cells: list[RenderableType] = [Spinner("dots", Text.assemble((self.name, "bold"), "  ", (self.stage, "cyan")))]
        if course.begun:
            left = course.left(now)
            cells += [
                Text(f"step {course.step}/{course.steps}"),
                ProgressBar(total=max(course.steps, 1), completed=course.step, width=24),
                Text(f"{clock_time(left)} left" if left else clock_time(now - self._started), style="dim"),
            ]
        else:
            cells.append(Text(clock_time(now - self._entered), style="dim"))
        head.add_row(*cells)
        numbers = Text("  ").join(Text.assemble((label + " ", "dim"), value) for label, value in self._shown.items())
        body: list[RenderableType] = [head]
        if self._rewards:
            body.append(Text.assemble(("reward ", "dim"), (sparkline(self._rewards), "green")))
        if self._shown:
            body.append(numbers)
        if under_way := self._under_way():
            body.append(Text.assemble(("now ", "dim"), under_way))
        if self._num_alarms or self._num_warnings:
            body.append(Text(self._troubles(), style="yellow"))
        return Group(*body)

    def _under_way(self) -> str:
        """What each actor is at, and for how long: ``learner step 0:04, rewards score (3) 0:01``."""
        if self._timeline is None:
            return ""
        spans: dict[tuple[str, str], list[float]] = {}
        for span in self._timeline.open:
            spans.setdefault((span.actor, span.phase), []).append(span.begin)
        now = self._timeline.now
        shown = [
            f"{actor} {phase}{f' ({len(begins)})' if len(begins) > 1 else ''} {clock_time(now - min(begins))}"
            for (actor, phase), begins in spans.items()
        ]
        more = [f"{len(shown) - ACTORS_SHOWN} more"] if len(shown) > ACTORS_SHOWN else []
        return ", ".join(shown[:ACTORS_SHOWN] + more)

    def _troubles(self) -> str:
        counts = {"alarm": self._num_alarms, "warning": self._num_warnings}
        told = [f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items() if count]
        return f"{' and '.join(told)}; report.html has them in full" if self._num_alarms else told[0]

    def _gains(self) -> list[tuple[str, str]]:
        if not self.evaluations:
            return []
        (first, before), (last, after) = self.evaluations[0], self.evaluations[-1]
        if first == last:
            return [("accuracy", f"{domain} {value:.1%} at step {first}") for domain, value in before.items()]
        return [
            ("accuracy", f"{domain} {before[domain]:.1%} → {value:.1%}  ({100 * (value - before[domain]):+.1f} points)")
            for domain, value in after.items()
            if domain in before
        ]

    def _stage_times(self) -> list[tuple[str, str]]:
        stages = [f"{stage} {clock_time(seconds)}" for stage, seconds in self.seconds.items() if seconds >= 0.5]
        return [("time", " · ".join(stages))] if stages else []

    def _tally(self) -> None:
        now = self._clock()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._entered
        self._entered = now

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(printable(redact(line)), style=style, soft_wrap=True, highlight=False, markup=False)


class _Course:
    """Where a counted stage stands, and how long its remaining steps will take at the measured pace."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.begun = False
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._last = 0.0

    def resume(self, now: float) -> None:
        if not self.begun:
            self._last = now

    def rewind(self, step: int, now: float) -> None:
        self.step, self._last, self.begun = step, now, False
        self._intervals.clear()

    def advance(self, step: int, now: float) -> None:
        self.begun = True
        if step > self.step:
            if self.step == 1:
                self._intervals.clear()  # the first step fills the pipeline; it says nothing about the others
            self._intervals.append((now - self._last) / (step - self.step))
        self.step, self._last = step, now

    def left(self, now: float) -> float:
        """Seconds; 0 when there is nothing left or no step has been measured yet."""
        if not self._intervals:
            return 0.0
        pace = sum(self._intervals) / len(self._intervals)
        return max(pace * (self.steps - self.step) - (now - self._last), 0.0)


def sparkline(values: deque[float] | list[float]) -> str:
    """One block a value, from the smallest to the largest of them; what is not finite is a gap."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        BLOCKS[round((value - low) / span * (len(BLOCKS) - 1)) if span else 0] if abs(value) < float("inf") else " "
        for value in values
    )


def clock_time(seconds: float) -> str:
    """``0:07``, ``4:12`` or ``2:03:10``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _by_domain(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _readable(metrics: Mapping[str, float]) -> dict[str, str]:
    """The few numbers worth a glance, in the order they are read."""
    shown: dict[str, str] = {}
    if "reward/mean" in metrics:
        shown["reward"] = f"{metrics['reward/mean']:.3f}"
    for label, prefix in (("accuracy", "accuracy/"), ("held out", "eval/")):
        domains = _by_domain(metrics, prefix)
        if 0 < len(domains) <= DOMAINS_SHOWN:
            named = "" if len(domains) == 1 else " {}"
            shown[label] = ", ".join(f"{value:.1%}{named.format(domain)}" for domain, value in domains.items())
        elif domains:
            shown[label] = f"{sum(domains.values()) / len(domains):.1%} over {len(domains)} domains"
    if "tokens_per_s" in metrics:
        shown["tokens/s"] = f"{metrics['tokens_per_s']:,.0f}"
    if "staleness/mean" in metrics:
        shown["staleness"] = f"{metrics['staleness/mean']:.1f}"
    for label, name in (("masked", "mask/off_policy"), ("clipped", "ratio/clipped"), ("truncated", "length/truncated")):
        if name in metrics:
            shown[label] = f"{metrics[name]:.1%}"
    return shown
