"""`kernels` is also the name of a package that transformers looks for."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

ROOT = Path(__file__).parents[2]


def test_import_kernels_is_ours() -> None:
    assert kernels.__file__ is not None
    assert Path(kernels.__file__).parent == ROOT / "kernels"
    assert kernels.__version__
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")


def test_transformers_works_beside_it() -> None:
    """In a fresh interpreter: transformers, imported first, probes for the name, finds ours and builds a model."""
    program = (
        "import transformers, kernels, torch\n"
        "with torch.device('meta'):\n"
        "    transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(num_hidden_layers=1))\n"
        "print(kernels.topk_mask.__module__)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith("kernels.reference")


def test_every_reference_function_is_dispatched() -> None:
    assert set(kernels.__all__) == set(reference.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


def test_a_registered_implementation_replaces_what_it_defines(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = types.ModuleType("fast")
    fast.topk_mask = lambda scores, k: "fast"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast", fast)
    monkeypatch.setitem(kernels._IMPLEMENTATIONS, "cpu", {"topk_mask": "fast"})
    scores = torch.randn(2, 5)
    assert kernels.topk_mask(scores, 2) == "fast"
    assert torch.equal(kernels.topk_indices(scores, 2), reference.topk_indices(scores, 2))
