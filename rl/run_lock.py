"""One process a run directory: who writes it holds a lock that ends with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

from rl.errors import RecipeError

LOCK = ".lock"
_NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """The right to write ``path``, until :meth:`release` or the end of this process."""

    def __init__(self, path: Path) -> None:
        """Raises RecipeError when another process has it; where a file system has no locks, everybody may."""
        self._file = open(path / LOCK, "a+")  # noqa: SIM115  (held open)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RecipeError(f"{path} is being written by {holder}; choose another name=... or wait for it") from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_held(path: Path) -> bool:
    """Whether the process that last took ``path`` runs on this machine. Looks without touching the lock itself."""
    try:
        holder = re.fullmatch(r"process (\d+) on (.+)", (path / LOCK).read_text(errors="replace"))
        if holder is None or holder[2] != socket.gethostname():
            return False
        os.kill(int(holder[1]), 0)
    except PermissionError:
        return True  # somebody else's process
    except (OSError, OverflowError):
        return False
    return True
