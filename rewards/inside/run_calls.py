"""Calls one function of solution.py, named on standard input, and prints what it returns as JSON."""

import json
import os
import sys


def main() -> None:
    name, args, kwargs = json.loads(sys.stdin.read())
    output = os.dup(1)
    os.dup2(2, 1)  # what the program prints is not its result
    import solution

    target = solution
    for part in name.split("."):
        target = getattr(target, part)
    result = json.dumps(target(*args, **kwargs))
    sys.stdout.flush()
    os.write(output, result.encode())


sys.path.insert(0, os.getcwd())
main()
