"""The quickstart with several seeds, held against what it promises:

    python -m tests.rl.quickstart_seeds [SEED ...]

Each seed is the recipe as it stands, from the command to its end. A row says what was right before and after, how long
it took, and whether each stabiliser had something to do; the exit status is 1 where a promise is broken. It takes
minutes a seed, wants the machine for itself, and is no part of ``make test``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.rl.tiny_runs import REPOSITORY, Run

RECIPE = "recipes/quickstart.yaml"
ACCURACY = "eval/spell_backward"
LONGEST_S = 8 * 60


def run_seed(seed: int, folder: Path) -> tuple[Run, float]:
    """A finished run and its seconds, those of starting and ending included."""
    name = f"quickstart-{seed}"
    began = time.monotonic()
    command = [sys.executable, "-m", "rl.train", RECIPE, f"seed={seed}", f"runs={folder}", f"name={name}"]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return Run(folder / name), time.monotonic() - began


def broken_promises(run: Run, seconds: float) -> Iterator[str]:
    """What a run does not hold, in a few words each."""
    accuracies = [row[ACCURACY] for row in run.rows if ACCURACY in row]
    before, after = accuracies[0], accuracies[-1]
    if not 0.2 <= before <= 0.6:
        yield f"starts at {before:.1%}, not between 20 and 60 %"
    if after < before + 0.3 or after < 0.8:
        yield f"ends at {after:.1%}, from {before:.1%}"
    if seconds > LONGEST_S:
        yield f"takes {seconds:.0f} s"
    if not all(step["routes/replayed"] == step["kept/share"] == step["sync/verified"] == 1 for step in run.steps):
        yield "a step lacks routes, sampling masks or a verified sync"
    if not any(step["mask/off_policy"] > 0 for step in run.steps):
        yield "the off-policy mask never acted"
    if not any(step["loss/kl"] > 0 for step in run.steps):
        yield "the KL never acted"


def main(seeds: list[int]) -> int:
    """A row for each seed."""
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            run, seconds = run_seed(seed, Path(folder))
            accuracies = [row[ACCURACY] for row in run.rows if ACCURACY in row]
            masked = sum(step["mask/off_policy"] for step in run.steps) / len(run.steps)
            broken = list(broken_promises(run, seconds))
            print(
                f"seed {seed}: {accuracies[0]:.1%} -> {accuracies[-1]:.1%} in {seconds:.0f} s, "
                f"{masked:.2%} of the samples masked; {'; '.join(broken) or 'all held'}",
                flush=True,
            )
            status |= bool(broken)
    return status


if __name__ == "__main__":
    sys.exit(main([int(seed) for seed in sys.argv[1:]] or [0, 5, 11]))
