"""Rebuilds the report of a run, compares several, or serves a page that follows them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rl.errors import UserError
from rl.printable import printable
from rl.report import build_comparison, build_report
from rl.report.server import DEFAULT_PORT, LOOPBACK, serve


def main() -> int:
    """The command line; returns the exit status."""
    options = _options().parse_args()
    try:
        if options.serve:
            serve(options.runs, host=options.host, port=options.port)
            return 0
        page, notes = _written(options.runs, options.out)
    except UserError as error:
        print(f"keel: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"keel: {options.out or options.runs[0]} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"keel: {printable(note)}", file=sys.stderr)
    print(page)
    return 0


def _written(runs: list[str], out: str | None) -> tuple[Path, tuple[str, ...]]:
    if len(runs) == 1 and out is None:
        return build_report(runs[0])
    return build_comparison(runs, out or Path(runs[0]) / "comparison.html")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rl.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's directory, for example runs/quickstart")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the page goes: by default report.html, or comparison.html, in the first run",
    )
    parser.add_argument("--serve", action="store_true", help="serve a page that is up to date while the runs go on")
    parser.add_argument("--host", default=LOOPBACK, help="address to serve on; anything but loopback lets others read")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to serve on; 0 takes a free one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
