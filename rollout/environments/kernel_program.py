"""A Jupyter kernel inside the sandbox, driven by lines of JSON; runs by itself, without any module of Keel.

Standard input brings ``{"code", "timeout_s"}``, standard output takes ``{"text", "failed", "timed_out"}``. It is
ipykernel's in-process kernel: a real kernel with its channels in memory, as there is no network to put them on.
"""

import json
import os
import queue
import re
import signal
import sys
import tempfile

os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

from ipykernel.inprocess.manager import InProcessKernelManager

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class TimedOut(KeyboardInterrupt):
    """Like Jupyter's interrupt, which ``except Exception`` does not catch."""


class Kernel:
    """One session; everything that cells print, their child processes too, ends up in the cell's text."""

    def __init__(self) -> None:
        manager = InProcessKernelManager()
        manager.start_kernel()
        self._client = manager.client()
        self._client.start_channels()
        self._captured = tempfile.TemporaryFile()  # noqa: SIM115  as long as the session
        for descriptor in (1, 2):
            os.dup2(self._captured.fileno(), descriptor)

    def run(self, code: str, timeout_s: float, limit: int) -> dict:
        """Runs a cell for at most so many seconds; the session goes on afterwards with what it had."""
        self._captured.seek(0)
        self._captured.truncate()
        signal.signal(signal.SIGALRM, self._interrupt)
        timed_out = False
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout_s, 1.0)
            self._client.execute(code)
        except KeyboardInterrupt:
            timed_out = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        said, failed, interrupted = self._messages()
        sys.stdout.flush()
        self._captured.seek(0)
        said.insert(0, self._captured.read(4 * limit).decode("utf-8", "replace"))
        text = "".join(said).strip("\n")
        if len(text) > limit:
            text = f"{text[: limit // 2]}\n... (output cut) ...\n{text[-limit // 2 :]}"
        return {"text": text, "failed": failed or timed_out, "timed_out": timed_out or interrupted}

    def _interrupt(self, *_: object) -> None:
        raise TimedOut

    def _messages(self) -> tuple[list[str], bool, bool]:
        said, failed, interrupted = [], False, False
        while True:
            try:
                message = self._client.iopub_channel.get_msg(timeout=0)
            except queue.Empty:
                return said, failed, interrupted
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                said.append(content["text"])
            elif kind in ("execute_result", "display_data"):
                said.append(content["data"].get("text/plain", "") + "\n")
            elif kind == "error":
                failed, interrupted = True, content["ename"] == TimedOut.__name__
                said.append(_COLOUR.sub("", "\n".join(content["traceback"])) + "\n")


def main() -> None:
    """Runs the cells that come as lines of JSON, one answer a line."""
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kernel = Kernel()
    for line in commands:
        command = json.loads(line)
        answers.write(json.dumps(kernel.run(**command)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
