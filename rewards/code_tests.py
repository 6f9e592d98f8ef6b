"""Whether the program in an answer does what its tests ask, run in the sandbox."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rewards.isolation import search_path
from rewards.protocol import Reward
from rewards.reply import code_blocks
from rewards.sandbox import Isolation, Limits, Result, Sandbox
from rl.errors import did_you_mean
from rl.sample import Sample

_INSIDE = Path(__file__).parent / "inside"
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """How programs of one language are built and run, and what their code blocks are called."""

    names: tuple[str, ...]
    source: str
    build: tuple[str, ...] = ()
    run: tuple[str, ...]


LANGUAGES = {
    "bash": Language(names=("bash", "sh", "shell"), source="main.sh", run=("bash", "main.sh")),
    "c": Language(names=("c",), source="main.c", build=("cc", "-O2", "-o", "main", "main.c", "-lm"), run=("./main",)),
    "cpp": Language(
        names=("cpp", "c++", "cc"),
        source="main.cpp",
        build=("g++", "-std=c++17", "-O2", "-o", "main", "main.cpp"),
        run=("./main",),
    ),
    "go": Language(names=("go", "golang"), source="main.go", build=("go", "build", "-o", "main"), run=("./main",)),
    "java": Language(names=("java",), source="Main.java", build=("javac", "Main.java"), run=("java", "Main")),
    "javascript": Language(names=("javascript", "js", "node"), source="main.js", run=("node", "main.js")),
    "python": Language(names=("python", "python3", "py"), source="main.py", run=("python3", "main.py")),
    "rust": Language(names=("rust", "rs"), source="main.rs", build=("rustc", "-O", "main.rs"), run=("./main",)),
}


@dataclass(frozen=True, slots=True)
class _Case:
    """One run: what goes in, and what must come out (as text, or as a JSON value)."""

    stdin: str
    expected: Any
    is_json: bool = False


@dataclass(kw_only=True)
class CodeTests:
    """1 if the program in the last fenced code block of the answer passes every test, else 0.

    ``prompt.answer`` says what is tested, by one of

        {"cases": [{"stdin": "3 4\\n", "stdout": "7\\n"}, ...]}
        {"calls": [{"call": "add", "args": [3, 4], "kwargs": {}, "returns": 7}, ...]}      Python only
        {"tests": "def test_add():\\n    assert add(3, 4) == 7"}                            Python only

    Output is compared without regard to white space at the ends of lines and of the whole, and numbers with a fraction
    within 1e-6. What a call returns is compared as JSON, so a tuple equals a list. Expected values stay outside of the
    sandbox. Only ``tests``, where assertions hold them, share a process with the program: a program that goes looking
    for the tests' frames can pretend that they passed, so prefer the other two.

    Parts: ``passed`` (share of tests), ``no_code`` (1 when the answer has no closed block of the language),
    ``build_failed``, ``timeouts`` and ``crashed`` (shares of tests).

    Args:
        language: one of ``LANGUAGES``; blocks of another one are passed over, those without a name count.
        partial: the reward is the share of tests passed, instead of all or nothing.
        case_s: seconds of CPU time for one test, and a fifth of its wall time.
        memory_mb: for the program and what it starts.
        max_cases: tests that are run at most, the first ones.
        isolation: the weakest isolation that is good enough.
        concurrency: samples that are tested at the same time.
    """

    language: str = "python"
    partial: bool = False
    case_s: float = 4.0
    memory_mb: int = 512
    max_cases: int = 100
    isolation: Isolation = Isolation.LANDLOCK
    concurrency: int = os.cpu_count() or 1
    _sandbox: Sandbox = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language '{self.language}' is not known; {did_you_mean(self.language, LANGUAGES)}")
        if not (self.case_s > 0 and self.memory_mb > 0 and self.max_cases > 0 and self.concurrency > 0):
            raise ValueError("case_s, memory_mb, max_cases and concurrency must be above 0")
        language = LANGUAGES[self.language]
        for command in (language.build or language.run)[:1]:
            if not command.startswith("./") and shutil.which(command, path=search_path()) is None:
                raise ValueError(f"language '{self.language}' needs the command {command}, which is not installed")
        self._sandbox = Sandbox().at_least(self.isolation)

    async def __call__(self, sample: Sample) -> Reward:
        cases, files, run = self._tests(sample)
        blocks = [block.code for block in code_blocks(sample) if block.language in (*self._language.names, "")]
        if not blocks:
            return self._reward(0.0, no_code=1.0)
        files[self._solution_file(sample)] = blocks[-1]
        job = {
            "build": self._language.build,
            "run": run,
            "stdin": [case.stdin for case in cases],
            "case_s": self.case_s,
        }
        files["run_cases.py"] = (_INSIDE / "run_cases.py").read_text()
        command, limits = ["python3", "-I", "-S", "run_cases.py"], self._limits(len(cases))
        result = await self._sandbox.run(command, files=files, stdin=json.dumps(job).encode(), limits=limits)
        return self._judge(cases, result)

    @property
    def _language(self) -> Language:
        return LANGUAGES[self.language]

    def _limits(self, num_cases: int) -> Limits:
        build_s = 60.0 if self._language.build else 0.0
        total_s = build_s + num_cases * self.case_s
        return Limits(
            wall_s=5 * total_s + 10, cpu_s=total_s + 5, memory_bytes=self.memory_mb << 20, output_bytes=64 << 20,
            disk_bytes=256 << 20,
        )  # fmt: skip

    def _tests(self, sample: Sample) -> tuple[list[_Case], dict[str, str], list[str]]:
        """The cases, the files they need beside the program, and the command to run."""
        asked = sample.prompt.answer
        kinds = [kind for kind in ("cases", "calls", "tests") if isinstance(asked, Mapping) and asked.get(kind)]
        place = f"prompt {sample.prompt.id}"
        if len(kinds) != 1:
            raise ValueError(f"{place} needs exactly one of cases, calls and tests in its answer")
        (kind,) = kinds
        if kind == "cases":
            cases = [_Case(str(case["stdin"]), str(case["stdout"])) for case in asked["cases"]]
            return cases[: self.max_cases], {}, list(self._language.run)
        if self.language != "python":
            raise ValueError(f"{place} has {kind}, which can only test Python; use cases for {self.language}")
        harness = f"run_{kind}.py"
        files = {harness: (_INSIDE / harness).read_text()}
        if kind == "tests":
            files["tests.py"] = str(asked["tests"])
            word = secrets.token_hex(16)
            return [_Case(word, word)], files, ["python3", harness]
        calls = list(asked["calls"])[: self.max_cases]
        inputs = [json.dumps([call["call"], call.get("args", []), call.get("kwargs", {})]) for call in calls]
        cases = [_Case(given, call["returns"], is_json=True) for given, call in zip(inputs, calls, strict=True)]
        return cases, files, ["python3", harness]

    def _solution_file(self, sample: Sample) -> str:
        return self._language.source if "cases" in sample.prompt.answer else "solution.py"

    def _judge(self, cases: Sequence[_Case], result: Result) -> Reward:
        try:
            report = json.loads(result.stdout)
            runs = [(int(code), bool(late), str(said)) for code, late, said in report["runs"]]
            build_failed = bool(report["build_failed"])
        except (ValueError, KeyError, TypeError):  # the program ran into a limit of the whole sandbox, or spoilt it
            return self._reward(0.0, crashed=1.0, timeouts=float(result.exceeded in ("wall", "cpu")))
        if build_failed:
            return self._reward(0.0, build_failed=1.0)
        runs += [(1, False, "")] * (len(cases) - len(runs))
        passed = [
            code == 0 and not late and _agrees(case, said)
            for case, (code, late, said) in zip(cases, runs, strict=False)
        ]
        return self._reward(
            sum(passed) / len(cases),
            timeouts=sum(late for _, late, _ in runs) / len(runs),
            crashed=sum(code != 0 and not late for code, late, _ in runs) / len(runs),
        )

    def _reward(self, passed: float, **parts: float) -> Reward:
        known = dict.fromkeys(("no_code", "build_failed", "timeouts", "crashed"), 0.0)
        return Reward(passed if self.partial else float(passed == 1.0), {"passed": passed, **known, **parts})


def _agrees(case: _Case, said: str) -> bool:
    if not case.is_json:
        return same_output(case.expected, said)
    try:
        return _same_value(json.loads(json.dumps(case.expected)), json.loads(said))
    except (ValueError, RecursionError):
        return False


def same_output(expected: str, said: str) -> bool:
    """Whether two outputs are the same to a judge of programming contests; see :class:`CodeTests`."""
    expected_lines = [line.split() for line in expected.rstrip().split("\n")]
    lines = [line.split() for line in said.rstrip().split("\n")]
    if [len(line) for line in lines] != [len(line) for line in expected_lines]:
        return False
    pairs = zip(chain.from_iterable(expected_lines), chain.from_iterable(lines), strict=True)
    return all(one == other or _same_number(one, other) for one, other in pairs)


def _same_number(expected: str, said: str) -> bool:
    if not any(mark in expected for mark in ".eE"):
        return False
    try:
        return math.isclose(float(expected), float(said), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except ValueError:
        return False


def _same_value(expected: Any, said: Any) -> bool:
    """JSON equality: 1 equals 1.0 but not true, and fractions are compared within the tolerance."""
    if isinstance(expected, bool) or isinstance(said, bool):
        return expected is said
    if isinstance(expected, int | float) and isinstance(said, int | float):
        exact = isinstance(expected, int) and isinstance(said, int)
        return expected == said if exact else math.isclose(expected, said, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    if isinstance(expected, list) and isinstance(said, list):
        return len(expected) == len(said) and all(map(_same_value, expected, said))
    if isinstance(expected, dict) and isinstance(said, dict):
        return expected.keys() == said.keys() and all(_same_value(expected[key], said[key]) for key in expected)
    return type(expected) is type(said) and expected == said
