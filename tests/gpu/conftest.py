"""Everything here needs an NVIDIA GPU and the gpu extra; without them it is skipped."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "an NVIDIA GPU" if not torch.cuda.is_available() else "vllm" if find_spec("vllm") is None else None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if item.config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(900))
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))
