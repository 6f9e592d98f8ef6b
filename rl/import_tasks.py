"""`python -m rl.import_tasks issues.jsonl tasks.jsonl --root repositories`: see :mod:`rollout.environments.tasks`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from rewards.sandbox import Sandbox
from rl.errors import UserError
from rl.plugin import describe
from rollout.environments.tasks import import_tasks


def main(argv: list[str] | None = None) -> int:
    """The command line; exit status 1 when nothing was accepted."""
    parser = argparse.ArgumentParser(prog="python -m rl.import_tasks", description="Import repository tasks.")
    parser.add_argument("source", help="JSONL or Parquet with repository, commit, issue, patch, test_patch")
    parser.add_argument("target", help="JSONL of prompts to write")
    parser.add_argument("--root", help="what relative paths of repositories are relative to")
    parser.add_argument("--concurrency", type=int, default=4, help="tasks that are tried at the same time")
    arguments = parser.parse_args(argv)
    try:
        count = asyncio.run(
            import_tasks(arguments.source, arguments.target, arguments.root, arguments.concurrency, Sandbox())
        )
    except UserError as error:
        print(f"keel: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"keel: {describe(error)}", file=sys.stderr)
        return 1
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
