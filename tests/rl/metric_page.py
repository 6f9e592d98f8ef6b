"""docs/metrics.md as data."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.rl.tiny_runs import REPOSITORY

_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def documented() -> dict[str, str]:
    """Every name of the page with its meaning."""
    rows = _ROW.findall((REPOSITORY / "docs" / "metrics.md").read_text())
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names), "a name is explained twice"
    return dict(rows)


def unexplained(names: Iterable[str]) -> list[str]:
    """Those that no row of the page, with its placeholders filled, is about."""
    patterns = [re.sub(r"<[a-z]+>", "[^/]+", re.escape(name).replace(r"\<", "<")) for name in documented()]
    return sorted(name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns))
