"""A reward that prints, and says on disk what it printed."""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path

from rl.sample import Sample


def says(sample: Sample, *, diary: str) -> float:
    """Prints a line that no other call prints; the first sibling's on standard error, and the second one fails."""
    line = f"{sample.id} heard {uuid.uuid4().hex} at {time.time():.3f} in {os.getcwd()}"
    print(line, file=sys.stderr if sample.index == 0 else sys.stdout, flush=True)
    with open(Path(diary) / f"{os.getpid()}.txt", "a") as file:
        file.write(line + "\n")
    if sample.index == 1:
        raise ValueError("the second one is never good")
    return sample.index / 10
