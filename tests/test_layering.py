"""Which folder may import which. The table of the architecture, checked against every import that is written."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[1]

LEAVES = {
    "advantage", "allowance", "buffer", "choices", "config", "demonstrations", "durable", "environ", "errors",
    "fault_log", "junit", "loss", "metrics", "placement", "plugin", "printable", "procedural", "prompt_styles",
    "prompts", "recipe", "recipe_checks", "recipe_schema", "recipe_source", "records", "sample", "saved_groups",
    "secrets", "selections", "timeline", "whereabouts",
}  # fmt: skip
"""Modules of rl/ that hold vocabulary and mathematics. Every other one there is a driver."""

MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels"},
    "leaf": {"leaf"},
    "rewards": {"leaf"},
    "rollout": {"leaf", "model", "kernels"},
    "trainer": {"leaf", "model", "kernels"},
    "recipes": {"leaf", "rollout"},
    "driver": {"kernels", "model", "leaf", "rewards", "rollout", "trainer", "recipes", "driver"},
}
ONLY_IN = {"vllm": {"rollout"}, "deepspeed": {"trainer"}}
PEERS = "kernels/bench_cases/"
"""Benchmarks may import what they measure against."""
ACTOR_MODULES = {
    "rewards/pool.py",
    "rl/cluster.py",
    "rl/system.py",
    "rollout/actor.py",
    "rollout/engine_actors.py",
    "rollout/engine_handle.py",
    "rollout/pool.py",
    "trainer/learner.py",
    "trainer/rank.py",
}
"""Where Ray actors are defined or created; no other file knows of Ray."""
HEAVY = {"torch", "transformers", "triton"}
HEAVY_LEAVES = {"rl/loss.py"}

BANNED_NAMES = {"utils", "util", "common", "types", "helpers", "helper", "misc", "manager", "base"}
BANNED_WORDS = ("manager", "base", "v2")


def layer_of(module: str) -> str | None:
    """The layer a dotted module belongs to; None when it is not ours."""
    top, _, rest = module.partition(".")
    if top == "rl":
        return "leaf" if rest.partition(".")[0] in LEAVES | {""} else "driver"
    return top if top in MAY_IMPORT else None


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import: those inside functions and by ``importlib.import_module("...")`` too."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # "from rl import train" imports a module, "from rl.loss import grpo_loss" a function of one.
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "rl" else [origin]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def complaints(path: str, source: str) -> Iterator[str]:
    """Everything in one file that the table forbids."""
    tree = ast.parse(source)
    layer = layer_of(module_of(path))
    assert layer is not None, path
    for line, name in imports(path, tree):
        top, target = name.partition(".")[0], layer_of(name)
        if target is not None and target != layer and target not in MAY_IMPORT[layer]:
            yield f"{path}:{line}: {layer} must not import {name} ({target})"
        if top in ONLY_IN and layer not in ONLY_IN[top] and not path.startswith(PEERS):
            yield f"{path}:{line}: {top} may be imported by {', '.join(sorted(ONLY_IN[top]))} only"
        if top == "ray" and path not in ACTOR_MODULES:
            yield f"{path}:{line}: ray may be imported only where actors are defined or created"
        if top in HEAVY and layer == "leaf" and path not in HEAVY_LEAVES:
            yield f"{path}:{line}: a leaf must stay light, without {top}"
    for part in Path(path).with_suffix("").parts:
        if part in BANNED_NAMES or any(word in part.split("_") for word in BANNED_WORDS):
            yield f"{path}: '{part}' says nothing about what is inside; name it after its noun"


def sources() -> list[str]:
    folders = {"rl" if layer in ("leaf", "driver") else layer for layer in MAY_IMPORT}
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_import_follows_the_table():
    found = [complaint for path in sources() for complaint in complaints(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_every_folder_and_leaf_is_there():
    paths = sources()
    assert {layer_of(module_of(path)) for path in paths} == set(MAY_IMPORT)
    assert {f"rl/{leaf}.py" for leaf in LEAVES} | ACTOR_MODULES <= set(paths)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("kernels/reference.py", "import model", "kernels must not import model (model)"),
        ("model/moe.py", "from rl.sample import Sample", "model must not import rl.sample (leaf)"),
        ("model/moe.py", "def f():\n    from trainer import step", "moe.py:2: model must not import trainer (trainer)"),
        ("rl/loss.py", "from kernels import reference", "leaf must not import kernels (kernels)"),
        ("rl/buffer.py", "from rl.train import main", "leaf must not import rl.train (driver)"),
        ("rl/buffer.py", "from rl import train", "leaf must not import rl.train (driver)"),
        ("rl/buffer.py", "from . import train", "leaf must not import rl.train (driver)"),
        ("rl/buffer.py", "from .train import main", "leaf must not import rl.train (driver)"),
        ("rl/buffer.py", "import ray\nray.init()", "ray may be imported only where actors are"),
        ("rl/buffer.py", "import torch.nn", "a leaf must stay light, without torch"),
        ("rewards/pool.py", "import rollout.pool", "rewards must not import rollout.pool (rollout)"),
        ("rollout/pool.py", "import rewards", "rollout must not import rewards (rewards)"),
        ("rollout/pool.py", "import deepspeed", "deepspeed may be imported by trainer only"),
        ("rollout/slots.py", "from ray import get", "ray may be imported only where actors are"),
        (
            "trainer/step.py",
            "import importlib\nimportlib.import_module('vllm')",
            "vllm may be imported by rollout only",
        ),
        ("rl/train.py", "from deepspeed.utils import x", "deepspeed may be imported by trainer only"),
        ("rl/train.py", "if TYPE_CHECKING:\n    import vllm", "vllm may be imported by rollout only"),
        ("trainer/utils.py", "", "'utils' says nothing"),
        ("rollout/engine_manager.py", "", "'engine_manager' says nothing"),
        ("model/base_model.py", "", "'base_model' says nothing"),
        ("rl/helpers/paths.py", "", "'helpers' says nothing"),
    ],
)
def test_the_check_notices(path, source, complaint):
    found = list(complaints(path, source))
    assert any(complaint in one for one in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/moe.py", "import kernels"),
        ("rl/loss.py", "import torch\nfrom rl.metrics import Mean\nfrom .errors import UserError"),
        ("rollout/actor.py", "import ray\n@ray.remote\nclass Actor: ..."),
        ("rollout/vllm_engine.py", "import vllm"),
        ("kernels/bench_cases/sparse_mla.py", "import vllm"),
        ("rl/train.py", "import torch, rewards, trainer.learner"),
        ("rl/system.py", "import ray, rollout.pool"),
        ("rewards/database.py", "import asyncio"),
    ],
)
def test_the_check_lets_through(path, source):
    assert not list(complaints(path, source))


def test_import_kernels_is_ours():
    """A Hugging Face package of the same name would be probed by transformers and take its place."""
    assert Path(kernels.__file__).parent == ROOT / "kernels"
    assert isinstance(kernels.__version__, str)
