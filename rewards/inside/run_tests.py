"""Runs tests.py, which sees the names of solution.py, and prints the word on standard input if everything passed.

Module-level assertions, functions whose names begin with test, and classes of unittest all count.
"""

import importlib
import os
import sys
import unittest


def main() -> None:
    """Reads a secret word and writes it when every test of tests.py has passed on `solution`."""
    word = sys.stdin.readline()
    output = os.dup(1)
    os.dup2(2, 1)
    solution = importlib.import_module("solution")
    names = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
    scope = {**names, "__name__": "tests", "solution": solution}
    with open("tests.py") as file:
        exec(compile(file.read(), "tests.py", "exec"), scope)
    found = {name: value for name, value in scope.items() if names.get(name) is not value}
    for name, value in found.items():
        if name.startswith("test") and callable(value) and not isinstance(value, type):
            value()
    cases = [value for value in found.values() if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(case) for case in cases)
    outcome = unittest.TestResult()
    suite.run(outcome)
    if outcome.wasSuccessful():
        os.write(output, word.encode())


sys.path.insert(0, os.getcwd())
main()
