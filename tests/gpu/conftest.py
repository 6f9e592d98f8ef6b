"""Everything here needs an NVIDIA GPU, and all but the tests of kernels the gpu extra; without them it is skipped."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu, vllm = torch.cuda.is_available(), find_spec("vllm") is not None
    missing = "an NVIDIA GPU" if not gpu else "" if vllm else "vllm"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if item.config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(900))
            if missing and not (gpu and item.path.stem.endswith("_kernels")):
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture(scope="session", autouse=True)
def cache_as_asked() -> None:
    if "KEEL_GPU_CACHE_GB" in os.environ:  # tests of kernels need no more than torch
        from tests.gpu.selection import fix_cache_as_asked

        fix_cache_as_asked()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from tests.gpu.selection import fix_cache_as_asked

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as rl.system.join_cluster
    # Ray's processes look for the hook before they have this one's path.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {"worker_process_setup_hook": fix_cache_as_asked, "env_vars": {"PYTHONPATH": path}}
    ray.init(address="local", include_dashboard=False, num_cpus=16, runtime_env=environment)
    yield
    ray.shutdown()
