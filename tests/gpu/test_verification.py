"""What of a weight update its verification takes, of a run's own actors: less than a twentieth.

Figures go to KEEL_FIGURES when that names a file.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import ray
import torch

from rl.recipe import load_recipe
from rl.system import prepare_model
from tests.gpu.figures_file import record
from tests.gpu.measure import ONE_GPU, parse, verification
from tests.gpu.together import LARGE

LARGE_4GB = [*LARGE.split(), "model.init.num_hidden_layers=8"]


@pytest.mark.skipif("KEEL_GPU_CACHE_GB" in os.environ, reason="others use the GPU at the same time")
@pytest.mark.parametrize(
    ("placement", "gpus", "model"),
    [("shared", 1, []), ("shared", 1, LARGE_4GB), ("split", 2, LARGE_4GB)],
    ids=["shared", "shared 4.5 GB", "split 4.5 GB"],
)
def test_verification_is_a_small_part_of_an_update(
    placement: str, gpus: int, model: list[str], tmp_path: Path, request: pytest.FixtureRequest
):
    if torch.cuda.device_count() < gpus:
        pytest.skip("needs two GPUs")
    options = parse(["verification", f"placement={placement}", *model, "--passes", "20"])
    recipe = load_recipe(ONE_GPU, options.arguments)
    try:
        seen = asyncio.run(verification(recipe, prepare_model(recipe, tmp_path), options))
    finally:
        ray.shutdown()
    record(**{request.node.callspec.id: seen})
    assert seen["share"] < 0.05
