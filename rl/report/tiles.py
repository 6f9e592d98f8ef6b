"""The key numbers of a run, and its standing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, median
from typing import Any

from rl.progress import clock_time
from rl.report.json_lines import Row
from rl.run_directory import FINISHED, RUNNING

ENDS = 5  # steps averaged at either end of a noisy curve
DOMAINS = 6  # evaluated domains with a tile of their own
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure at the head of the page."""

    title: str
    value: str
    caption: str = ""
    lead: bool = False  # whether it stands out


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is."""

    word: str  # running, finished, not finished (killed, or running elsewhere), stopped
    good: bool
    reason: str  # why it stopped, "" if it did not
    facts: str  # steps, times


def tiles(metrics: list[Row]) -> list[Tile]:
    """A number whose metric was never written has no tile."""
    rows = [row for row in metrics if row["step"] > 0]
    made = (
        *_evaluation_tiles(metrics),
        *_change_tile("Reward", rows, "reward/mean", "{:.3f}".format),
        *_total_tile(rows),
        *_share_tile(rows),
        *_mismatch_tile(rows),
        *_sync_tile(rows),
    )
    return list(made)


def standing(
    status: Mapping[str, Any],
    metrics: list[Row],
    supervised: list[Row],
    *,
    is_running: bool = False,
    running_s: float | None = None,
) -> Standing:
    """From status.json and the last rows; ``running_s`` is how long a run of several sittings ran, pauses left out."""
    word = str(status.get("status", "unknown"))
    reason = status.get("reason")
    return Standing(
        word="running" if is_running else {FINISHED: "finished", RUNNING: "not finished"}.get(word, word),
        good=is_running or word == FINISHED,
        reason=str(reason) if reason else "",
        facts=" · ".join(_facts(status, metrics, supervised, running_s)),
    )


def _evaluation_tiles(metrics: list[Row]) -> Iterator[Tile]:
    domains = dict.fromkeys(name for row in metrics for name in row if name.startswith("eval/"))
    for name in list(domains)[:DOMAINS]:
        points = [(row["step"], row[name]) for row in metrics if _is_number(row.get(name))]
        if not points:
            continue
        (first, before), (last, after) = points[0], points[-1]
        title = f"Held-out accuracy, {name.removeprefix('eval/')}"
        if len(points) == 1:
            yield Tile(title=title, value=f"{before:.1%}", caption=f"at step {first}")
        else:
            caption = f"{100 * (after - before):+.1f} points, step {first} to {last}"
            yield Tile(title=title, value=f"{before:.1%} → {after:.1%}", caption=caption, lead=True)


def _change_tile(title: str, rows: list[Row], name: str, form: Callable[[float], str]) -> Iterator[Tile]:
    values = _values(rows, name)
    if len(values) >= 2 * ENDS:
        ends = f"{form(fmean(values[:ENDS]))} → {form(fmean(values[-ENDS:]))}"
        yield Tile(title=title, value=ends, caption=f"mean of the first and last {ENDS} steps")
    elif values:
        yield Tile(title=title, value=form(values[-1]), caption="last step")


def _total_tile(rows: list[Row]) -> Iterator[Tile]:
    generated, pace = _values(rows, "tokens/generated"), _values(rows, "tokens_per_s")
    if generated:
        caption = f"median {median(pace):,.0f} tokens/s" if pace else ""
        yield Tile(title="Tokens generated", value=f"{sum(generated):,.0f}", caption=caption)


def _share_tile(rows: list[Row]) -> Iterator[Tile]:
    masked, clipped = _values(rows, "mask/off_policy"), _values(rows, "ratio/clipped")
    if masked:
        caption = f"of sequences; {fmean(clipped):.2%} of tokens clipped" if clipped else "of sequences"
        yield Tile(title="Masked as off-policy", value=f"{fmean(masked):.2%}", caption=caption)


def _mismatch_tile(rows: list[Row]) -> Iterator[Tile]:
    if values := _values(rows, "mismatch/logprob_abs"):
        number = _small(median(values))
        yield Tile(title="Engine and learner differ by", value=number, caption="nats per token, median step")


def _sync_tile(rows: list[Row]) -> Iterator[Tile]:
    if verified := _values(rows, "sync/verified"):
        good = sum(value >= 1 for value in verified)
        caption = "checksums equal in engine and learner"
        yield Tile(title="Weight syncs verified", value=f"{good:,} of {len(verified):,}", caption=caption)


def _facts(
    status: Mapping[str, Any], metrics: list[Row], supervised: list[Row], running_s: float | None
) -> Iterator[str]:
    if steps := [row["step"] for row in metrics if row["step"] > 0]:
        yield f"{steps[-1]:,} steps"
    if supervised:
        yield f"{supervised[-1]['step']:,} cold-start steps"
    try:
        started = datetime.fromisoformat(status["started"])
        yield f"started {started:%Y-%m-%d %H:%M}"
        ended = datetime.fromisoformat(status["ended"])
        if running_s is None:
            yield f"took {clock_time((ended - started).total_seconds())}"
        else:
            yield f"ran {clock_time(running_s)} in all, pauses left out"
    except (KeyError, TypeError, ValueError):
        pass  # not started by us, or not ended yet


def _small(value: float) -> str:
    """Two significant digits: ``0.016``, or ``7 × 10⁻⁵`` instead of a row of zeros."""
    if value == 0 or abs(value) >= 1e-4:
        return f"{float(f'{value:.2g}')}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if _is_number(row.get(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
