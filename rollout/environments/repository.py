"""A checkout of a Git repository in the sandbox: a shell, an edit tool, and tests that judge at the end.

A task is a prompt whose answer says where it begins and what must pass::

    {"repository": "./shelf.git", "commit": "<sha>", "test_patch": "<diff of the tests>",
     "fail_to_pass": ["tests.test_shelf::test_sorts"], "pass_to_pass": ["tests.test_shelf::test_adds"],
     "test_command": "python3 -m pytest -q --junitxml={report}", "timeout_s": 300}

At the end the test patch's files are put back to what they are to be, the tests run, and their outcomes are
``final_state["tests"]`` for the reward ``test_suite``. :mod:`rollout.environments.tasks` makes such tasks from issues
with their patches.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.errors import DataError
from rl.junit import read_junit
from rl.sample import Prompt, ToolResult
from rollout.environments.protocol import Environment, EnvironmentFailed, ToolError, tool

TEST_COMMAND = "python3 -m pytest -q --junitxml={report}"
MAX_REPORT = 16 << 20
_TOUCHED = re.compile(r"^(?:---|\+\+\+) (?:a/|b/)?(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where a task begins, and how it is judged."""

    repository: str  # a path, or anything that git can clone
    commit: str
    test_patch: str = ""
    test_command: str = TEST_COMMAND
    timeout_s: float = 300.0

    @classmethod
    def of(cls, name: str, answer: Any, root: str | None = None) -> Task:
        """The task in a prompt's answer; ``root`` is what a relative path of its repository is relative to.

        Raises DataError naming the prompt for one without what a task needs.
        """
        if not isinstance(answer, Mapping):
            raise DataError(f"{name} needs an answer with repository and commit")
        given = {key: answer[key] for key in cls.__slots__ if answer.get(key) is not None}
        for key in ("repository", "commit"):
            if not isinstance(given.get(key), str):
                raise DataError(f"{name} needs '{key}' in its answer")
        if root is not None and "://" not in given["repository"]:
            given["repository"] = str(Path(root) / given["repository"])
        return cls(**given)

    def touched(self) -> list[str]:
        """Files that the test patch changes, makes or removes."""
        return sorted({path for path in _TOUCHED.findall(self.test_patch) if path != "/dev/null"})


class Checkout:
    """The task's files in a folder of the sandbox."""

    def __init__(self, task: Task, sandbox: Any) -> None:
        self.task = task
        self._sandbox = sandbox
        self._folder = sandbox.folder()

    async def start(self) -> None:
        """Puts the commit's files there as a repository with one commit. Raises DataError when git cannot."""
        await asyncio.to_thread(self._check_out)
        # The task's history would hold its solution.
        made = await self.run(
            ["sh", "-c", "git init -q . && git add -A && git -c user.name=task -c user.email=task@localhost "
             "commit -q -m 'the task begins here'"],
            timeout_s=120,
        )  # fmt: skip
        if made.returncode:
            raise EnvironmentFailed(f"the checkout could not be made ({made.stderr[-300:].decode(errors='replace')})")

    async def run(self, command: list[str], *, timeout_s: float, stdin: bytes = b"") -> Any:
        """Runs a program in the checkout, in the sandbox; returns the sandbox's result."""
        limits = replace(self._sandbox.limits, wall_s=timeout_s, cpu_s=2 * timeout_s)
        return await self._sandbox.run(command, folder=self._folder, cwd="repository", stdin=stdin, limits=limits)

    def read(self, path: str) -> str:
        """A file's text. Raises ToolError for what is no file of the checkout."""
        try:
            return self._folder.read(f"repository/{path}", max_bytes=4 << 20).decode()
        except (OSError, ValueError) as error:
            raise ToolError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def write(self, path: str, text: str) -> None:
        """Writes a file. Raises ToolError for a name that is not in the checkout."""
        try:
            self._folder.write(f"repository/{path}", text)
        except (OSError, ValueError) as error:
            raise ToolError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error

    async def apply(self, patch: str) -> bool:
        """Applies a patch; whether it fits."""
        if not patch.strip():
            return True
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        return (await self.run(command, timeout_s=60, stdin=patch.encode())).returncode == 0

    async def outcomes(self) -> dict[str, str] | None:
        """How every test goes, with the test files as they are to be; None when that cannot be found out.

        The report has a name that nobody could guess while it did not exist.
        """
        touched = self.task.touched()
        if touched:
            restore = 'for path in "$@"; do git checkout -q HEAD -- "$path" 2>/dev/null || rm -rf -- "$path"; done'
            await self.run(["sh", "-c", restore, "sh", *touched], timeout_s=60)
        if not await self.apply(self.task.test_patch):
            return None
        report = f".report-{secrets.token_hex(8)}.xml"
        await self.run(["sh", "-c", self.task.test_command.format(report=report)], timeout_s=self.task.timeout_s)
        try:
            return read_junit(self._folder.read(f"repository/{report}", max_bytes=MAX_REPORT))
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self._folder.close()

    def _check_out(self) -> None:
        """Exports the commit outside of the sandbox, which has neither network nor the repository, and copies it in."""
        with tempfile.TemporaryDirectory() as place:
            clone, files = Path(place) / "clone", Path(place) / "files" / "repository"
            files.mkdir(parents=True)
            source = self.task.repository
            _git("clone", "--quiet", "--no-checkout", source, str(clone), about=source)
            archive = _git("-C", str(clone), "archive", self.task.commit, about=f"commit {self.task.commit}")
            subprocess.run(["tar", "-x", "-C", str(files)], input=archive, check=True)
            self._folder.add(files.parent)


class Repository(Environment):
    """``bash`` and ``edit`` in a checkout of the prompt's repository.

    Args:
        root: what relative paths of repositories are relative to.
        timeout_s: seconds one command may run.
        max_output: characters of one command's output; what is longer loses its middle.
    """

    isolated = False

    def __init__(
        self,
        prompt: Prompt,
        *,
        sandbox: Any,
        root: str | None = None,
        timeout_s: float = 120.0,
        max_output: int = 12_000,
    ) -> None:
        self._timeout_s = timeout_s
        self._max_output = max_output
        self._checkout = Checkout(Task.of(f"prompt {prompt.id}", prompt.answer, root), sandbox)

    async def start(self) -> None:
        await self._checkout.start()

    @tool
    async def bash(self, command: str) -> ToolResult:
        """Runs a command with bash in the repository's root. Each call is a new shell; files stay. There is no network.

        command: what to run, such as: ls src && python3 -m pytest -q tests/test_shelf.py
        """
        ended = await self._checkout.run(["bash", "-c", command], timeout_s=self._timeout_s)
        text = (ended.stdout + ended.stderr).decode("utf-8", "replace").strip("\n")
        if len(text) > self._max_output:
            half = self._max_output // 2
            text = f"{text[:half]}\n... (output cut) ...\n{text[-half:]}"
        if ended.exceeded:
            text += f"\nerror: ended at the limit of {ended.exceeded}"
        elif ended.returncode:
            text += f"\n(exit status {ended.returncode})"
        return ToolResult(text=text.strip() or "(no output)", failed=ended.exceeded is not None)

    @tool
    def edit(self, path: str, old: str, new: str) -> str:
        """Replaces a text in a file, or makes a file.

        path: the file, relative to the repository's root
        old: the text to replace, which must occur exactly once; empty to make a file that is not there yet
        new: the text that takes its place
        """
        if not old:
            try:
                self._checkout.read(path)
            except ToolError:
                self._checkout.write(path, new)
                return f"made {path}"
            raise ToolError(f"{path} is there already; give the text to replace")
        text = self._checkout.read(path)
        count = text.count(old)
        if count != 1:
            raise ToolError(f"the text to replace occurs {count} times in {path}; it must occur exactly once")
        self._checkout.write(path, text.replace(old, new))
        return f"edited {path}"

    async def final_state(self) -> dict[str, Any]:
        """Runs the tests."""
        changed = await self._checkout.run(["git", "diff", "HEAD"], timeout_s=60)
        patch = changed.stdout[: 1 << 16].decode("utf-8", "replace")
        outcomes = await self._checkout.outcomes()
        return {"patch": patch, **({} if outcomes is None else {"tests": outcomes})}

    async def close(self) -> None:
        await asyncio.to_thread(self._checkout.close)


def _git(*arguments: str, about: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True, timeout=600).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().splitlines()
        raise DataError(f"git cannot get {about}: {said[-1] if said else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"git cannot get {about}: {error}") from error
