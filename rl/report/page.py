"""Puts the page together: header and key numbers as HTML, everything else drawn by our script from embedded JSON."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from datetime import datetime
from html import escape
from importlib.resources import files as package_files
from statistics import fmean, median

from rl.progress import clock_time
from rl.report.embed import Embedded, to_script_json
from rl.report.run_files import Row, RunFiles
from rl.run_directory import FINISHED, RUNNING

SCRIPTS = ("dom.js", "curves.js", "figures.js", "tokens.js", "trajectories.js", "main.js")
ENDS = 5  # steps averaged at either end of a noisy curve
DOMAINS = 6  # evaluated domains with a tile of their own
RECIPE_CHARACTERS = 100_000


def render(files: RunFiles, data: Embedded) -> str:
    """The whole page. Nothing in it refers to the network, and its security policy forbids that too."""
    style = _asset("page.css")
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();"
    embedded = {"metrics": data.metrics, "supervised": data.supervised, "trajectories": data.trajectories}
    parts = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "name": escape(files.name),
        "status": _status(files),
        "facts": _facts(files),
        "tiles": "".join(tiles(files)),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in data.notes),
        "recipe": escape(files.recipe[:RECIPE_CHARACTERS]),
        "data": to_script_json(embedded),
        "style": style,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _asset("page.html"))


def tiles(files: RunFiles) -> list[str]:
    """Key numbers as HTML. A number whose metric was never written has no tile."""
    rows = [row for row in files.metrics if row["step"] > 0]
    return [
        *_evaluation_tiles(files.metrics),
        *_change_tile("Reward", rows, "reward/mean", "{:.3f}".format),
        *_total_tile(rows),
        *_share_tile(rows),
        *_mismatch_tile(rows),
        *_sync_tile(rows),
    ]


def _evaluation_tiles(metrics: list[Row]) -> list[str]:
    domains = dict.fromkeys(name for row in metrics for name in row if name.startswith("eval/"))
    shown = []
    for name in list(domains)[:DOMAINS]:
        points = [(row["step"], row[name]) for row in metrics if _is_number(row.get(name))]
        if not points:
            continue
        (first, before), (last, after) = points[0], points[-1]
        title = f"Held-out accuracy, {name.removeprefix('eval/')}"
        if len(points) == 1:
            shown.append(_tile(title, f"{before:.1%}", f"at step {first}"))
        else:
            caption = f"{100 * (after - before):+.1f} points, step {first} to {last}"
            shown.append(_tile(title, f"{before:.1%} → {after:.1%}", caption, lead=True))
    return shown


def _change_tile(title: str, rows: list[Row], name: str, form: Callable[[float], str]) -> list[str]:
    values = _values(rows, name)
    if len(values) < 2 * ENDS:
        return [_tile(title, form(values[-1]), "last step")] if values else []
    ends = f"{form(fmean(values[:ENDS]))} → {form(fmean(values[-ENDS:]))}"
    return [_tile(title, ends, f"mean of the first and last {ENDS} steps")]


def _total_tile(rows: list[Row]) -> list[str]:
    generated, pace = _values(rows, "tokens/generated"), _values(rows, "tokens_per_s")
    if not generated:
        return []
    caption = f"median {median(pace):,.0f} tokens/s" if pace else ""
    return [_tile("Tokens generated", f"{sum(generated):,.0f}", caption)]


def _share_tile(rows: list[Row]) -> list[str]:
    masked, clipped = _values(rows, "mask/off_policy"), _values(rows, "ratio/clipped")
    if not masked:
        return []
    caption = f"of sequences; {fmean(clipped):.2%} of tokens clipped" if clipped else "of sequences"
    return [_tile("Masked as off-policy", f"{fmean(masked):.2%}", caption)]


def _mismatch_tile(rows: list[Row]) -> list[str]:
    values = _values(rows, "mismatch/logprob_abs")
    if not values:
        return []
    return [_tile("Engine and learner differ by", f"{float(f'{median(values):.2g}')}", "nats per token, median step")]


def _sync_tile(rows: list[Row]) -> list[str]:
    verified = _values(rows, "sync/verified")
    if not verified:
        return []
    good = sum(value >= 1 for value in verified)
    return [_tile("Weight syncs verified", f"{good:,} of {len(verified):,}", "checksums equal in engine and learner")]


def _tile(title: str, value: str, caption: str, lead: bool = False) -> str:
    kind = "tile lead" if lead else "tile"
    return f'<div class="{kind}"><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(caption)}</small></dd></div>'


def _status(files: RunFiles) -> str:
    status = str(files.status.get("status", "unknown"))
    words = {FINISHED: "finished", RUNNING: "not finished"}.get(status, status)
    pill = f'<span class="pill {"good" if status == FINISHED else "bad"}">{escape(words)}</span>'
    reason = files.status.get("reason")
    return pill + (f'<span class="reason">{escape(str(reason))}</span>' if reason else "")


def _facts(files: RunFiles) -> str:
    facts = []
    if steps := [row["step"] for row in files.metrics if row["step"] > 0]:
        facts.append(f"{steps[-1]:,} steps")
    if files.supervised:
        facts.append(f"{files.supervised[-1]['step']:,} cold-start steps")
    try:
        started = datetime.fromisoformat(files.status["started"])
        facts.append(f"started {started:%Y-%m-%d %H:%M}")
        facts.append(f"took {clock_time((datetime.fromisoformat(files.status['ended']) - started).total_seconds())}")
    except (KeyError, TypeError, ValueError):
        pass  # not started by us, or not ended yet
    return escape(" · ".join(facts))


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if _is_number(row.get(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _asset(name: str) -> str:
    return (package_files("rl.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
