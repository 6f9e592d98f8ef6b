"""Reads files of one JSON object a line, also while another process appends to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def has_step(row: Row) -> bool:
    """Whether a row belongs to a step."""
    return type(row.get("step")) is int


class JsonLines:
    """The rows of a file, read on from where the last reading ended.

    A line that is no object, or that ``valid`` refuses, is skipped and counted. A last line without its line break is
    still being written and waits for the next reading.
    """

    def __init__(self, path: Path, valid: Callable[[Row], bool] = has_step) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.skipped = 0
        self._valid = valid
        self._offset = 0
        self._file_id: tuple[int, int] | None = None  # device and inode

    def read(self) -> bool:
        """Adds what was appended; False if the file became another one (or shorter), which is then read anew."""
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            anew, self._file_id = self._file_id is not None, None
            self._restart()
            return not anew

    def _read(self, file: Any) -> bool:
        found = os.fstat(file.fileno())
        file_id = (found.st_dev, found.st_ino)
        anew = self._file_id is not None and (file_id != self._file_id or found.st_size < self._offset)
        if anew:
            self._restart()
        self._file_id = file_id
        file.seek(self._offset)
        whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n") if newline else ():
            self._add(line)
        return not anew

    def _restart(self) -> None:
        self.rows, self.skipped, self._offset = [], 0, 0

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and self._valid(row):
            self.rows.append(row)
        else:
            self.skipped += 1


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a file that is complete, and how many lines were something else."""
    lines = JsonLines(path)
    lines.read()
    return lines.rows, lines.skipped
