"""A rank's part of a checkpoint on its way from host memory to the disk, in a thread beside the rank's own work."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rl.durable import FileRecord, write_tensors


def rank_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


class CheckpointWriter:
    """Holds one set of copies, writes it when it is told to, and says how that went."""

    def __init__(self) -> None:
        self._tensors: Mapping[str, Tensor] = {}
        self._header: Mapping[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._outcome: FileRecord | OSError | None = None

    def hold(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Takes the copies over; what was being written until now is written to its end first."""
        if self._thread is not None:
            self._thread.join()
        self._tensors, self._header = tensors, header

    def begin(self, path: Path) -> None:
        """Starts to write what is held, and lets go of it when it is written."""
        tensors, self._tensors = self._tensors, {}
        self._outcome = None
        self._thread = threading.Thread(
            target=self._write, args=(path, tensors, self._header), name="checkpoint", daemon=True
        )
        self._thread.start()

    def outcome(self) -> FileRecord | OSError | None:
        """None while it is being written."""
        return self._outcome

    def _write(self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            self._outcome = write_tensors(path, arrays, {"state": json.dumps(header)})
        except OSError as error:
            self._outcome = error
        except Exception as error:  # the thread ends here, and the driver must not wait for ever
            self._outcome = OSError(errno.EIO, f"{type(error).__name__}: {error}")
