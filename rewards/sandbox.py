"""Untrusted programs: confined, limited, and ended with everything that they started.

    result = await Sandbox().run(["python3", "main.py"], files={"main.py": source}, stdin=b"3 4\\n")
    result.ok, result.stdout, result.exceeded

A program sees the system's and this interpreter's directories read-only, a folder of its own, and nothing else of the
machine: no network, no environment, no other process. How that is enforced depends on what the machine allows; the
strongest way that works is found by trying, once a process, and :attr:`Sandbox.isolation` says which it is.

In every case the program has no capabilities, cannot gain any, and runs under resource limits and a filter of system
calls (x86_64 and aarch64), and where Keel runs as root under a user of its own. A supervising process (rewards/jail)
adds up the CPU time, memory, threads and files of all its descendants. Files held in memory (``/tmp`` and the folder of
a single run) count towards ``disk_bytes``, each by itself, not towards ``memory_bytes``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rewards.folder import Folder
from rewards.isolation import (
    BOX,
    Isolation,
    Launch,
    Limits,
    Pipes,
    SandboxError,
    outer_environment,
    own_uid,
    readable_paths,
    strongest,
    user_of,
)
from rewards.jail.supervise import descendants

__all__ = ["BOX", "Folder", "Isolation", "Limits", "Result", "Sandbox", "SandboxError", "SandboxProcess"]

KILL_GRACE_S = 10.0
"""Seconds that a program's processes may take to die before the supervisor is killed too."""
LINE_LIMIT = 1 << 20
"""Bytes of the longest line that ``SandboxProcess.stdout.readline`` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a program ended."""

    returncode: int
    """Its exit status, or minus the number of the signal that ended it."""
    exceeded: str | None
    """The limit that ended it (``wall``, ``cpu``, ``memory``, ``processes``, ``output``, ``disk``), if one did."""
    stdout: bytes
    stderr: bytes
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.returncode == 0 and self.exceeded is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A way to run programs. Holds no process and no folder by itself."""

    limits: Limits = field(default_factory=Limits)
    wanted: Isolation | None = None
    """None: the strongest that works here."""
    readable: tuple[str | Path, ...] = ()
    """Further paths that programs may read, such as a compiler's."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables beside PATH, HOME, TMPDIR and LANG; the caller's own environment is not passed on."""

    @property
    def isolation(self) -> Isolation:
        """What programs will run under. Raises SandboxError if ``wanted`` cannot be had here."""
        if self.wanted is None:
            return strongest()
        user_of(self.wanted)
        return self.wanted

    def at_least(self, weakest: Isolation) -> Sandbox:
        """Itself. Raises SandboxError when its isolation is weaker than that."""
        if list(Isolation).index(self.isolation) > list(Isolation).index(Isolation(weakest)):
            raise SandboxError(
                f"programs could run under the isolation '{self.isolation}' only, and '{weakest}' is asked for; "
                "install bubblewrap, or ask for less"
            )
        return self

    def folder(self) -> Folder:
        """A folder that several programs work in, one after another or together. Close it."""
        return Folder(uid=own_uid(self.isolation))

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, str | bytes] | None = None,
        folder: Folder | None = None,
        cwd: str = ".",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        """Runs a program to its end. When it ends, whatever it started ends too.

        Args:
            argv: the program, looked up on the sandbox's PATH, and its arguments.
            stdin: its standard input.
            files: contents by name, put into its folder first.
            folder: where it works; without one, in an empty folder that ends with it.
            cwd: where in the folder it starts.
            env: variables added to the sandbox's.
            limits: instead of the sandbox's.

        Raises:
            SandboxError: the sandbox could not be set up.
            ValueError: a file's name leads out of the folder.
        """
        limits = limits or self.limits
        process = await self.open(argv, files=files, folder=folder, cwd=cwd, env=env, limits=limits)
        async with process:
            stdout, stderr, _ = await asyncio.gather(
                process.take(process.stdout, limits.output_bytes),
                process.take(process.stderr, limits.output_bytes),
                process.feed(stdin),
            )
            try:
                result = await process.wait()
            except SandboxError as error:
                *_, last = ["", *stderr.decode(errors="replace").splitlines()]
                raise SandboxError(f"{error}{last and f' (it said: {last})'}") from error
        return replace(result, stdout=stdout, stderr=stderr)

    async def open(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, str | bytes] | None = None,
        folder: Folder | None = None,
        cwd: str = ".",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> SandboxProcess:
        """Starts a program to talk with, such as a shell. As :meth:`run`; leave its ``async with`` block to end it."""
        isolation, limits = self.isolation, limits or self.limits
        own = None if folder else Folder(uid=own_uid(isolation))
        place = folder or own
        assert place is not None
        try:
            for name, data in (files or {}).items():
                place.write(name, data)
            launch = Launch(
                isolation=isolation,
                limits=limits,
                readable=readable_paths(tuple(str(path) for path in self.readable)),
                folder=place,
                in_memory=own is not None and not isolation.shares_host,
                argv=argv,
                env={**self.env, **(env or {})},
                cwd=cwd,
            )
            return await SandboxProcess.start(launch, own)
        except BaseException:
            if own is not None:
                own.close()
            raise


class SandboxProcess:
    """A running program; made by :meth:`Sandbox.open`.

    ``stdin``, ``stdout`` and ``stderr`` are asyncio streams. Output that nobody reads makes the program wait.
    """

    def __init__(self, process: asyncio.subprocess.Process, pipes: Pipes, own: Folder | None) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr
        self._process = process
        self._pipes = pipes
        self._own = own
        self._began = time.monotonic()
        self._exceeded: str | None = None
        self._report: dict[str, Any] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._ending = asyncio.Lock()

    @classmethod
    async def start(cls, launch: Launch, own: Folder | None) -> SandboxProcess:
        """Use :meth:`Sandbox.open`."""
        pipes = Pipes()
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.command(pipes),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=outer_environment(),
                pass_fds=pipes.inner,
                start_new_session=True,
                limit=LINE_LIMIT,
            )
        except BaseException:
            pipes.close()
            raise
        pipes.close_inner()
        started = cls(process, pipes, own)
        started._after(launch.limits.wall_s, started.kill, "wall")
        return started

    async def __aenter__(self) -> SandboxProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        self.stdin.close()
        ends = (self.wait(), _discard(self.stdout), _discard(self.stderr))
        await asyncio.shield(asyncio.gather(*ends, return_exceptions=True))

    def kill(self, exceeded: str | None = None) -> None:
        """Begins to end the program and all it started; ``exceeded`` names the limit that is the reason."""
        if self._process.returncode is None and self._pipes.is_open:
            self._exceeded = exceeded
            self._pipes.close_control()
            # Processes that do not die, as when they wait for a broken disk.
            self._after(KILL_GRACE_S, self._force)

    async def wait(self) -> Result:
        """The program's end; ``stdout`` and ``stderr`` are left to whoever reads the streams.

        Raises SandboxError when the sandbox failed and not the program.
        """
        await self._process.wait()
        async with self._ending:
            if self._report is None:
                for timer in self._timers:
                    timer.cancel()
                self._report = self._pipes.report() | {"wall_s": time.monotonic() - self._began}
                self._pipes.close()
                if self._own is not None:
                    await asyncio.to_thread(self._own.close)
        return self._result(self._report)

    async def feed(self, data: bytes) -> None:
        """Writes all of standard input and closes it; a program that does not read it is no error."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.stdin.write(data)
            await self.stdin.drain()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.stdin.close()
            await self.stdin.wait_closed()

    async def take(self, stream: asyncio.StreamReader, max_bytes: int) -> bytes:
        """The first ``max_bytes`` up to the stream's end; ends the program if there is more.

        It is read to the end all the same: asyncio's ``wait`` returns when every pipe is at its end, and a full
        buffer would keep this one from getting there.
        """
        taken = bytearray()
        while chunk := await stream.read(1 << 16):
            if len(taken) <= max_bytes:
                taken += chunk
                if len(taken) > max_bytes:
                    self.kill("output")
        return bytes(taken[:max_bytes])

    def _after(self, seconds: float | None, call: Callable[..., None], *arguments: object) -> None:
        if seconds is not None:
            self._timers.append(asyncio.get_running_loop().call_later(seconds, call, *arguments))

    def _force(self) -> None:
        for pid in (*descendants(self._process.pid), self._process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _result(self, report: Mapping[str, Any]) -> Result:
        if "error" in report:
            raise SandboxError(f"the sandbox cannot start a program: {report['error']}")
        if "code" not in report and not self._pipes.asked_to_end:
            raise SandboxError("the sandbox's supervisor ended without a report; is the machine out of memory?")
        code = report.get("code")
        return Result(
            returncode=-signal.SIGKILL if code is None else code,
            exceeded=report.get("exceeded") or (self._exceeded if code is None else None),
            stdout=b"",
            stderr=b"",
            wall_s=report["wall_s"],
            cpu_s=report.get("cpu_s", 0.0),
            peak_memory_bytes=report.get("peak_memory_bytes", 0),
        )


async def _discard(stream: asyncio.StreamReader) -> None:
    """Reads to the end, as the pipe of a stream with unread output would stay open."""
    with contextlib.suppress(RuntimeError):  # somebody else reads it to the end
        while await stream.read(1 << 16):
            pass
