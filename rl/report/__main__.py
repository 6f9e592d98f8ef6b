"""Rebuilds a run's report: ``python -m rl.report runs/NAME``."""

from __future__ import annotations

import argparse
import sys

from rl.errors import UserError
from rl.report import build_report


def main() -> int:
    """Rebuilds one report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rl.report", description="Rebuild the report.html of a run.")
    parser.add_argument("run", help="the run's directory, for example runs/quickstart")
    try:
        page, notes = build_report(parser.parse_args().run)
    except UserError as error:
        print(f"rl.report: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"rl.report: {note}", file=sys.stderr)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
