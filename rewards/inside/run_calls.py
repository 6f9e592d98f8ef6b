"""Calls one function of solution.py, named on standard input, and prints what it returns as JSON."""

import importlib
import json
import os
import sys


def main() -> None:
    """Reads a call, [name, args, kwargs], and writes what `solution` returned as JSON."""
    name, args, kwargs = json.loads(sys.stdin.read())
    output = os.dup(1)
    os.dup2(2, 1)  # what the program prints is not its result
    target = importlib.import_module("solution")
    for part in name.split("."):
        target = getattr(target, part)
    assert callable(target)
    result = json.dumps(target(*args, **kwargs))
    sys.stdout.flush()
    os.write(output, result.encode())


sys.path.insert(0, os.getcwd())
main()
