"""Runs each file of interpreted/ under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    # A product of tiles is NumPy's here. Of OpenBLAS's kernels this one gives a row the same bits wherever it stands in
    # a tile, as a GPU does; those that it takes on some AMD machines do not.
    "OPENBLAS_CORETYPE": "Prescott",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_kernels_agree_with_the_reference(name: str) -> None:
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
