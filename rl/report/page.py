"""Puts the page together: header and key numbers as HTML, everything else drawn by our script from embedded data."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files as package_files
from typing import Any

from rl.report.block import to_block, to_script_json
from rl.report.recipe_differences import recipe_differences
from rl.report.run_data import RunData

STYLES = ("page.css", "curves.css", "timeline.css", "reader.css")
SCRIPTS = (
    "dom.js",
    "source.js",
    "cursor.js",
    "curves.js",
    "figures.js",
    "alarms.js",
    "timeline.js",
    "tokens.js",
    "conversation.js",
    "search.js",
    "reader.js",
    "comparison.js",
    "main.js",
)


def render(runs: Sequence[RunData], *, live: bool = False, epochs: Sequence[int] = ()) -> str:
    """The whole page. Nothing in it refers to the network, and its security policy forbids that too.

    A ``live`` page asks the server it came from, and nobody else, for what came since; ``epochs`` is for its questions.
    """
    style = "\n".join(map(_asset, STYLES))
    script = '(() => {\n"use strict";\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();"
    shown = [run.shown for run in runs]
    differences = recipe_differences([run["recipe"] for run in shown]) if len(runs) > 1 else []
    data = {"live": live, "epochs": list(epochs), "runs": shown, "differences": differences}
    asked = "; connect-src 'self'" if live else ""
    parts = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'{asked}",
        "name": escape(" · ".join(run["name"] for run in shown)),
        "status": "".join(_status(run["standing"]) for run in shown) if len(shown) == 1 else "",
        "tiles": "".join(_tile(tile) for tile in shown[0]["tiles"]) if len(shown) == 1 else "",
        "data": to_script_json(data),
        "blocks": "".join(_block_elements(runs)),
        "style": style,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _asset("page.html"))


def _block_elements(runs: Sequence[RunData]) -> Iterator[str]:
    for number, run in enumerate(runs):
        blocks = {"timeline": to_block(run.spans), "index": to_block(run.samples.index), **run.samples.blocks}
        for name, block in blocks.items():
            yield f'<script type="application/gzip" id="block-{number}-{name}">{block}</script>\n'


def _tile(tile: Mapping[str, Any]) -> str:
    kind = "tile lead" if tile["lead"] else "tile"
    value = f"{escape(tile['value'])}<small>{escape(tile['caption'])}</small>"
    return f'<div class="{kind}"><dt>{escape(tile["title"])}</dt><dd>{value}</dd></div>'


def _status(standing: Mapping[str, Any]) -> str:
    pill = f'<span class="pill {"good" if standing["good"] else "bad"}">{escape(standing["word"])}</span>'
    reason = f'<span class="reason">{escape(standing["reason"])}</span>' if standing["reason"] else ""
    return f'{pill}{reason}<span class="facts">{escape(standing["facts"])}</span>'


def _asset(name: str) -> str:
    return (package_files("rl.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
