"""A folder that a sandboxed program writes in, as the outside reaches into it.

Whatever stands in it was put there by untrusted code: links that lead out, pipes that block whoever opens them. So
every name is walked one part at a time without following links, and only regular files are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A folder of its own on disk, removed by :meth:`close` or at the end of a ``with`` block.

    ``work`` is the programs' working directory and ``tmp`` what they see as ``/tmp``; both paths are the outside's.
    ``uid`` owns everything in them; None means the user that this process runs as.
    """

    def __init__(self, *, uid: int | None = None) -> None:
        self.uid = uid
        self._top = Path(tempfile.mkdtemp(prefix="keel-sandbox-"))
        self.work, self.tmp = self._top / "work", self._top / "tmp"
        for path in (self.work, self.tmp):
            path.mkdir()
        if uid is not None:
            self._top.chmod(0o711)  # its user may pass through, and owns what is below
            for path in (self.work, self.tmp):
                path.chmod(0o700)
                os.chown(path, uid, uid)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes it with all that is in it."""
        # Not shutil.rmtree, which recurses: a program may have nested thousands of directories.
        subprocess.run(["chmod", "-R", "u+rwx", str(self._top)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", "--one-file-system", str(self._top)], check=False, stderr=subprocess.DEVNULL)

    def write(self, name: str, data: str | bytes) -> None:
        """Writes a file, in place of whatever has the name; makes the directories above it.

        Text is encoded as UTF-8. What begins with ``#!`` can be executed.

        Raises:
            ValueError: the name leads out of the folder.
            OSError: a part of the name is taken by something that is not a directory.
        """
        data = data.encode() if isinstance(data, str) else data
        *parents, last = relative_parts(name) or [name]
        directory = self._walk(parents, make=True)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(last, dir_fd=directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            mode = 0o755 if data.startswith(b"#!") else 0o644
            with open(os.open(last, flags, mode, dir_fd=directory), "wb") as file:
                self._own(file.fileno())
                file.write(data)
        finally:
            os.close(directory)

    def read(self, name: str, *, max_bytes: int = 1 << 20) -> bytes:
        """The first ``max_bytes`` of a file.

        Raises:
            ValueError: the name leads out of the folder.
            FileNotFoundError: there is no such file.
            OSError: it, or a directory above it, is a link or otherwise no regular file.
        """
        *parents, last = relative_parts(name) or [name]
        directory = self._walk(parents, make=False)
        try:
            handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            return file.read(max_bytes)

    def add(self, source: Path) -> None:
        """Copies a directory's contents into ``work``, links as links. Before any program runs in the folder."""
        shutil.copytree(source, self.work, symlinks=True, dirs_exist_ok=True)
        if self.uid is not None:
            for folder, folders, files in os.walk(self.work):
                for name in (*folders, *files):
                    os.chown(os.path.join(folder, name), self.uid, self.uid, follow_symlinks=False)

    def _walk(self, parents: list[str], *, make: bool) -> int:
        """An open directory, to be closed by the caller."""
        handle = os.open(self.work, _DIRECTORY)
        for name in parents:
            try:
                if make:
                    try:
                        os.mkdir(name, 0o755, dir_fd=handle)
                        created = True
                    except FileExistsError:
                        created = False
                inner = os.open(name, _DIRECTORY, dir_fd=handle)
                if make and created:
                    self._own(inner)
            finally:
                os.close(handle)
            handle = inner
        return handle

    def _own(self, handle: int) -> None:
        if self.uid is not None:
            os.fchown(handle, self.uid, self.uid)


def relative_parts(name: str) -> list[str]:
    """A relative name's parts. Raises ValueError for one that leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"file name {name!r} must be relative to the sandbox's folder and stay in it")
    return list(path.parts)
