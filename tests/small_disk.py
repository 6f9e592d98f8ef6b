"""A file system of its own, so small that it is soon full. Real ones only: root may mount them, others are skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(path: Path, *, num_bytes: int) -> Iterator[Path]:
    """A new disk of about ``num_bytes`` at ``path``."""
    path.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(path)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root only")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
