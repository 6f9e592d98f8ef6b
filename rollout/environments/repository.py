"""A checkout of a Git repository in the sandbox: a shell, an edit tool, and tests that judge at the end.

A task is a prompt whose answer says where it begins and what must pass::

    {"repository": "./shelf.git", "commit": "<sha>", "test_patch": "<diff of the tests>",
     "fail_to_pass": ["tests.test_shelf::test_sorts"], "pass_to_pass": ["tests.test_shelf::test_adds"],
     "test_command": "python3 -m pytest -q --junitxml={report}", "timeout_s": 300}

At the end what the policy made of the files is brought into another folder of the sandbox, which it never was in,
together with the task's own tests and settings of tests (:data:`PROTECTED`); there the tests run, and their outcomes
are ``final_state["tests"]`` for the reward ``test_suite``. `docs/environments.md` says what a policy can still forge.
:mod:`rollout.environments.tasks` makes such tasks from issues with their patches.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.errors import DataError
from rl.junit import read_junit
from rl.sample import Prompt, ToolResult
from rollout.environments.protocol import Environment, EnvironmentFailed, ToolError, tool

TEST_COMMAND = "python3 -m pytest -q --junitxml={report}"
MAX_REPORT = 16 << 20
PROTECTED = (
    *("tests", "__tests__", "test_*.py", "*_test.*", "*.test.*", "*.spec.*"),
    *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"),
    *("tox.ini", "setup.cfg", "pyproject.toml", ".gitattributes"),
    # What Python or pytest would load by itself, and compiled code that no source stands for.
    *("sitecustomize.py", "usercustomize.py", "*.pth", "*.dist-info", "*.egg-info", "__pycache__", "*.pyc"),
)
"""Files and folders that are the task's own when its tests run, whatever the policy made of them: tests, and what
decides how they run. New modules in the root that would take the place of installed ones are, too."""

_PROGRAM = Path(__file__).parent / "judged_tree.py"
_MAX_PATCH = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where a task begins, and how it is judged."""

    repository: str  # a path, or anything that git can clone
    commit: str
    test_patch: str = ""
    test_command: str = TEST_COMMAND
    timeout_s: float = 300.0
    protected: Sequence[str] = ()  # patterns beside PROTECTED, such as "Makefile"; with a slash, of whole paths

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
        if isinstance(given.get("protected", []), str):
            raise DataError(f"{name} needs a list of patterns as 'protected' in its answer")
        if root is not None and "://" not in given["repository"]:
            given["repository"] = str(Path(root) / given["repository"])
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What became of a checkout."""

    patch: str = ""
    """All that was changed, new files included, against the task's commit."""
    set_back: tuple[str, ...] = ()
    """Changed files that were the task's own again when the tests ran."""
    outcomes: Mapping[str, str] | None = None
    """How every test went; None when that cannot be found out."""


class Checkout:
    """The task's files in a folder of the sandbox."""

    def __init__(self, task: Task, sandbox: Any) -> None:
        self.task = task
        self._sandbox = sandbox
        self._folder = sandbox.folder()
        self._pristine = tempfile.TemporaryDirectory(prefix="keel-task-", ignore_cleanup_errors=True)

    async def start(self) -> None:
        """Puts the commit's files there as a repository with one commit. Raises DataError when git cannot."""
        await asyncio.to_thread(self._check_out)
        # The task's history would hold its solution.
        made = await self.run(
            ["sh", "-c", "git init -q . && git add -A -f && git -c user.name=task -c user.email=task@localhost "
             "commit -q --allow-empty -m 'the task begins here'"],
            timeout_s=120,
        )  # fmt: skip
        if made.returncode:
            raise EnvironmentFailed(f"the checkout could not be made ({made.stderr[-300:].decode(errors='replace')})")

    async def run(self, command: list[str], *, timeout_s: float, stdin: bytes = b"") -> Any:
        """Runs a program in the checkout, in the sandbox; returns the sandbox's result."""
        return await self._run(self._folder, command, timeout_s=timeout_s, stdin=stdin)

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

    async def judge(self) -> Judged:
        """Runs the tests over what was made of the files."""
        # Nothing of the policy's but files: no history, hook, setting or program of its own is there when tests run.
        pack = "test -d repository -a ! -L repository && tar -cz -f - --exclude=.git -C repository ."
        limit = self._sandbox.limits.disk_bytes
        packed = await self._run(self._folder, ["sh", "-c", pack], cwd=".", output_bytes=limit)
        if packed.exceeded:
            return Judged()
        folder = await asyncio.to_thread(self._sandbox.folder)
        try:
            await asyncio.to_thread(self._fill, folder, packed.stdout)
            job = {"protected": [*PROTECTED, *self.task.protected], "max_patch": _MAX_PATCH}
            program = ["python3", "-I", "-c", _PROGRAM.read_text(encoding="utf-8")]
            made = await self._run(folder, program, stdin=json.dumps(job).encode(), cwd=".", output_bytes=16 << 20)
            if made.returncode:
                return Judged()
            told = json.loads(made.stdout)
            outcomes = await self._outcomes(folder)
        finally:
            await asyncio.to_thread(folder.close)
        return Judged(patch=told["patch"], set_back=tuple(told["set_back"]), outcomes=outcomes)

    def close(self) -> None:
        self._folder.close()
        self._pristine.cleanup()

    async def _outcomes(self, folder: Any) -> Mapping[str, str] | None:
        """The report has a name that nobody could guess while it did not exist."""
        report = f".report-{secrets.token_hex(8)}.xml"
        command = ["sh", "-c", self.task.test_command.format(report=report)]
        await self._run(folder, command, timeout_s=self.task.timeout_s)
        try:
            return read_junit(folder.read(f"repository/{report}", max_bytes=MAX_REPORT))
        except (OSError, ValueError):
            return None

    async def _run(
        self, folder: Any, command: list[str], *, timeout_s: float = 120.0, cwd: str = "repository", stdin: bytes = b"",
        **limits: Any,
    ) -> Any:  # fmt: skip
        given = replace(self._sandbox.limits, wall_s=timeout_s, cpu_s=2 * timeout_s, **limits)
        return await self._sandbox.run(command, folder=folder, cwd=cwd, stdin=stdin, limits=given)

    def _check_out(self) -> None:
        """Exports the commit outside of the sandbox, which has neither network nor the repository, and copies it in."""
        files = Path(self._pristine.name) / "repository"
        files.mkdir()
        source = self.task.repository
        with tempfile.TemporaryDirectory() as clone:
            _git("clone", "--quiet", "--no-checkout", source, clone, about=source)
            archive = _git("-C", clone, "archive", self.task.commit, about=f"commit {self.task.commit}")
        subprocess.run(["tar", "-x", "-C", str(files)], input=archive, check=True)
        self._folder.add(files.parent)

    def _fill(self, folder: Any, packed: bytes) -> None:
        """Puts what :mod:`rollout.environments.judged_tree` begins with into a new folder."""
        folder.add(Path(self._pristine.name))
        folder.write("policy.tar.gz", packed)
        folder.write("tests.patch", self.task.test_patch)


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
        """Runs the tests: ``patch``, ``set_back`` (see :class:`Judged`), and ``tests`` where they ran."""
        judged = await self._checkout.judge()
        state = {"patch": judged.patch, "set_back": list(judged.set_back)}
        return state if judged.outcomes is None else {**state, "tests": dict(judged.outcomes)}

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
