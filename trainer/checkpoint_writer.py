"""A rank's part of a checkpoint on its way from host memory to the disk, in a thread beside the rank's own work."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rl.durable import FileRecord, write_tensors


def rank_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def read_announcement(folder: Path, rank: int) -> FileRecord | None:
    """What a rank has written; None as long as it writes."""
    path = folder / _announcement(rank)
    return FileRecord(**json.loads(path.read_text())) if path.exists() else None


def remove_announcements(folder: Path) -> None:
    """Leaves the ranks' files alone in their folder."""
    for path in folder.glob(_announcement("*")):
        path.unlink(missing_ok=True)  # one that another node sees no longer


def _announcement(rank: int | str) -> str:
    return f".rank_{rank}.written"


class CheckpointWriter:
    """Holds one set of copies, writes it when it is told to, and says how that went.

    A rank that steps cannot be asked meanwhile, so it announces a file that is written by another one beside it.
    """

    def __init__(self) -> None:
        self._tensors: Mapping[str, Tensor] = {}
        self._header: Mapping[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._outcome: FileRecord | OSError | None = None

    def release(self) -> None:
        """Leaves no copies in memory, before new ones are made; what is being written is written to its end first."""
        if self._thread is not None:
            self._thread.join()
        self._tensors, self._thread, self._outcome = {}, None, None

    def hold(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Takes the copies over."""
        self.release()
        self._tensors, self._header = tensors, header

    def begin(self, folder: Path, rank: int) -> None:
        """Starts to write what is held, and lets go of it when it is written."""
        tensors, self._tensors = self._tensors, {}
        self._outcome = None
        self._thread = threading.Thread(
            target=self._write, args=(folder, rank, tensors, self._header), name="checkpoint", daemon=True
        )
        self._thread.start()

    def outcome(self) -> FileRecord | OSError | None:
        """None while it is being written."""
        return self._outcome

    def _write(self, folder: Path, rank: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            record = write_tensors(folder / rank_file(rank), arrays, {"state": json.dumps(header)})
            hidden = folder / f"{_announcement(rank)}.partial"
            hidden.write_text(json.dumps(asdict(record)))
            os.replace(hidden, folder / _announcement(rank))
            self._outcome = record
        except FileNotFoundError:  # the driver has made the folder
            where = f"{folder} is not there on {socket.gethostname()}"
            self._outcome = OSError(errno.ENOENT, f"{where}; put runs on a disk that all nodes see")
        except OSError as error:  # without its traceback, whose frames hold the copies
            self._outcome = OSError(error.errno, error.strerror or str(error))
        except Exception as error:  # the thread ends here, and the driver must not wait for ever
            self._outcome = OSError(errno.EIO, f"{type(error).__name__}: {error}")
