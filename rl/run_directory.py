"""What a run leaves behind: ``runs/<name>/``.

    recipe.yaml            the resolved recipe
    status.json            {"status": running | finished | stopped, "reason", "started", "ended", "origin"}
    metrics.jsonl          one object a step of reinforcement learning; step 0 is the evaluation before the first
    supervised.jsonl       one object a step of the cold start, whose steps count from 1 on their own
    events.out.tfevents.*  the same numbers for TensorBoard; those of the cold start are named ``supervised/...``
    timeline.jsonl         who did what when, as ``rl.timeline`` says
    alarms.jsonl           one object when an alarm starts and one when it clears (`rl/alarms.py`)
    samples/step_N.jsonl   trajectories, one ``Trajectory.record()`` a line
    report.html, checkpoints/step_N/, model/   written by others at the paths given here
    initial_model/, indexer_warmup/, cold_start/   models on the way to the first step, where there are such stages

JSON has no NaN: a number that is not finite is written as null.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (protobuf builds it when imported)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rl import history
from rl.durable import sync_folder
from rl.errors import RecipeError, UserError
from rl.run_lock import LOCK, RunLock
from rl.secrets import redact
from rl.stop import Interrupted
from rl.timeline import Timeline
from rl.trajectory import Trajectory

Mirror = Callable[[Mapping[str, float], str], None]
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Content of ``status.json``. A run that was killed stays ``running``: only a run that ended itself says so."""

    status: str
    reason: str | None = None  # why it stopped
    started: str  # ISO 8601 with the zone
    ended: str | None = None
    origin: str | None = None  # the PATH of `resume: PATH` that it last began from


class RunDirectory:
    """Writer of a run's directory.

    As a context manager it ends the run: ``finished`` when the block ends, ``stopped`` with the reason when it raises.

        with RunDirectory.create("runs/quickstart", recipe=text) as run:
            run.log({"step": 1, "reward/mean": 0.4})
    """

    def __init__(self, path: Path, status: RunStatus, lock: RunLock) -> None:
        """Use :meth:`create` or :meth:`resume`."""
        self.path = path
        self.status = status
        self.timeline = Timeline(path / "timeline.jsonl")
        self._lock = lock
        self._mirrors: list[Mirror] = []
        self._open_logs()

    def _open_logs(self) -> None:
        self._metrics = _JsonLines(self.metrics)
        self._supervised = _JsonLines(self.supervised)
        self._events = EventFileWriter(str(self.path), flush_secs=10)

    @classmethod
    def create(cls, path: str | Path, *, recipe: str, origin: str | None = None) -> RunDirectory:
        """Claims ``path``, which must not exist or be empty, and writes the resolved recipe.

        Raises :class:`RecipeError` when it holds anything, so that two runs never share a directory.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_content(path)
            lock = RunLock(path)
            try:
                _refuse_content(path)  # of two runs that start at once, one gets the directory
                status = RunStatus(status=RUNNING, started=_now(), origin=origin)
                _write_status(path, status)
            except BaseException:
                lock.release()
                raise
        except FileExistsError as error:
            raise RecipeError(f"{path} is a file, so no run can be kept there; choose another name=...") from error
        except OSError as error:
            raise RecipeError(f"{path} cannot be written: {error.strerror}; choose another runs=...") from error
        write_whole(path / "recipe.yaml", recipe, durably=True)
        (path / "samples").mkdir()
        return cls(path, status, lock)

    @classmethod
    def resume(
        cls, path: Path, *, recipe: str, step: int | None, lock: RunLock, cold_step: int = 0, origin: str | None = None
    ) -> RunDirectory:
        """Takes over a run that an earlier process left after ``step``, as :meth:`cut` does; None leaves nothing.

        Its ``origin`` stays, where none is given.
        """
        before = read_status(path)
        if before is not None:
            origin = origin or before.origin
        status = RunStatus(status=RUNNING, started=before.started if before else _now(), origin=origin)
        history.sweep(path)
        if step is None:
            history.clear(path)
        _write_status(path, status)
        write_whole(path / "recipe.yaml", recipe, durably=True)
        (path / "samples").mkdir(exist_ok=True)
        run = cls(path, status, lock)
        if step is not None:
            run.cut(step, cold_step=cold_step)
        return run

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def supervised(self) -> Path:
        return self.path / "supervised.jsonl"

    @property
    def alarms(self) -> Path:
        return self.path / "alarms.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def mirror_to(self, mirror: Mirror) -> None:
        """Calls ``mirror(metrics, prefix)`` with whatever is logged from now on, as TensorBoard gets it."""
        self._mirrors.append(mirror)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Writes one step; ``metrics["step"]`` must be larger than the step before it. Step 0 is before training."""
        step = self._metrics.append(metrics)
        self._add_event(step, metrics, prefix="")

    def log_supervised(self, metrics: Mapping[str, float]) -> None:
        """Writes one step of the cold start, in the same form."""
        step = self._supervised.append(metrics)
        self._add_event(step, metrics, prefix=history.SUPERVISED)

    def log_alarm(self, row: Mapping[str, Any]) -> None:
        """Appends one object to ``alarms.jsonl``, in one write."""
        with open(self.alarms, "ab", buffering=0) as file:
            file.write(redact(json.dumps(_jsonable(row), ensure_ascii=False)).encode() + b"\n")

    def log_samples(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Writes ``samples/step_N.jsonl``."""
        write_trajectories(self.samples / f"step_{step}.jsonl", step, trajectories)

    @property
    def last_step(self) -> int:
        """The last step with a row of metrics; -1 when there is none."""
        return self._metrics.last

    def rows(self) -> list[dict[str, Any]]:
        """Every row of metrics so far."""
        return history.read_rows(self.metrics)

    def cut(self, step: int, *, cold_step: int = 0) -> None:
        """Takes back everything that was logged after ``step``; where that is -1, of the cold start what came after
        its ``cold_step``."""
        self._events.close()
        history.cut_rows(self.metrics, step)
        history.cut_rows(self.alarms, step)
        history.cut_samples(self.samples, step)
        history.cut_events(self.path, step, cold_step=cold_step if step < 0 else None)
        if step < 0:
            history.cut_rows(self.supervised, cold_step)
        self._open_logs()

    def flush(self) -> None:
        """Returns when everything that was logged is on the disk."""
        self._events.flush()
        for path in (self.metrics, self.supervised):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def finish(self) -> None:
        """Marks the run as complete. Call it when everything that belongs to the run is on disk."""
        self._end(replace(self.status, status=FINISHED, ended=_now()))

    def stop(self, reason: str) -> None:
        """Marks the run as ended before its time, and why."""
        self._end(replace(self.status, status=STOPPED, reason=reason, ended=_now()))

    def discard(self) -> None:
        """Removes the directory of a run that ended before anything happened in it."""
        self._events.close()
        shutil.rmtree(self.path)
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.status.status != RUNNING:
            return
        if error is None:
            self.finish()
        else:
            self.stop(_reason(error))

    def _end(self, status: RunStatus) -> None:
        if self.status.status != RUNNING:
            raise ValueError(f"{self.path} is already {self.status.status}")
        self._events.close()
        try:
            _write_status(self.path, status)
            self.status = status
        finally:
            self._lock.release()

    def _add_event(self, step: int, metrics: Mapping[str, float], prefix: str) -> None:
        values = [
            Summary.Value(tag=prefix + name, simple_value=float(value))
            for name, value in metrics.items()
            if name != "step"
        ]
        event = Event(wall_time=datetime.now().timestamp(), step=step, summary=Summary(value=values))
        self._events.add_event(event)
        for mirror in self._mirrors:
            mirror(metrics, prefix)


class _JsonLines:
    """An append-only file of one object a step. Each line is one write, so a reader never sees half of an older one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = history.read_rows(path)
        self.last = int(rows[-1]["step"]) if rows else -1

    def append(self, metrics: Mapping[str, float]) -> int:
        step = int(metrics["step"])
        if step <= self.last:
            raise ValueError(f"{self._path.name}: step {step} comes after step {self.last}")
        row = {"step": step} | {name: _number(name, value) for name, value in metrics.items() if name != "step"}
        with open(self._path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
        self.last = step
        return step


def write_whole(path: Path, text: str, *, durably: bool = False) -> None:
    """Writes a file so that a reader sees the old one or all of this one, and no secret; where it is said, on the disk
    when this returns, so that this holds after a power cut as well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(redact(text))
            if durably:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if durably:
        sync_folder(path.parent)


def _write_status(path: Path, status: RunStatus) -> None:
    write_whole(path / "status.json", json.dumps(asdict(status), indent=2, ensure_ascii=False), durably=True)


def write_trajectories(path: Path, step: int, trajectories: Iterable[Trajectory]) -> None:
    """One record a line; values JSON does not know (in an answer) are written as their ``str``."""
    lines = (json.dumps(_jsonable({"step": step} | one.record()), ensure_ascii=False) for one in trajectories)
    # A lone surrogate, say in a file's name in an environment's state, becomes JSON's own escape for it.
    write_whole(path, "".join(line + "\n" for line in lines).encode(errors="backslashreplace").decode())


def _number(name: str, value: Any) -> float | int | None:
    if isinstance(value, bool | int):
        return int(value)
    try:
        value = float(value)  # takes numpy and torch scalars too
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name} is {value!r}, not a number") from error
    return value if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    """Plain JSON values, without the NaN that Python's encoder would let through."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _jsonable(value.tolist())
    return str(value)


def read_status(path: Path) -> RunStatus | None:
    """What the run in a directory says of itself; None when there is none."""
    try:
        return RunStatus(**json.loads((path / "status.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _refuse_content(path: Path) -> None:
    if any(one.name != LOCK for one in path.iterdir()):
        raise RecipeError(f"{path} already holds {describe(path)}; choose another name=... or delete it")


def describe(path: Path) -> str:
    """What is in a directory, for a sentence."""
    status = read_status(path)
    if status is None:
        return "files"
    return "a run that is running or was killed" if status.status == RUNNING else f"a {status.status} run"


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError | Interrupted):
        return "interrupted"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
