"""Weights & Biases without its package: a clear sentence, and a stand-in package that writes down what it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rl.errors import RecipeError
from rl.progress import Progress
from rl.run_directory import RunDirectory
from rl.wandb_mirror import check_wandb, mirrored
from tests.rl.tiny_runs import tiny_recipe

STAND_IN = """
import json, os

class Settings:
    def __init__(self, **settings):
        self.__dict__.update(settings)

class Run:
    def __init__(self, folder):
        self.file = os.path.join(folder, "told.jsonl")
        self.left = int(os.environ.get("FAILS_AFTER", 10 ** 6))

    def tell(self, what, value):
        with open(self.file, "a") as file:
            file.write(json.dumps([what, value]) + "\\n")

    def define_metric(self, name, step_metric):
        self.tell("define", [name, step_metric])

    def log(self, metrics):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route")
        self.tell("log", metrics)

    def finish(self, exit_code):
        self.tell("finish", exit_code)

def init(*, dir, settings, **given):
    if given["entity"] == "nobody":
        raise RuntimeError("no such entity")
    run = Run(dir)
    run.tell("init", given | {"console": settings.console, "disable_code": settings.disable_code})
    return run
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


def opened(tmp_path: Path, *overrides: str):
    recipe = tiny_recipe(tmp_path, "wandb.project=sums", *overrides)
    run = RunDirectory.create(tmp_path / "run", recipe="name: run\nlearner: {lr: 0.5}\n")
    return recipe, run, Progress("run", steps=2)


def told(run: RunDirectory) -> list[list]:
    return [json.loads(line) for line in (run.path / "told.jsonl").read_text().splitlines()]


def test_nothing_goes_anywhere_unless_the_recipe_says_so(tmp_path, stand_in):
    recipe = tiny_recipe(tmp_path)
    run = RunDirectory.create(tmp_path / "run", recipe="")
    with mirrored(recipe, run, Progress("run", steps=1)):
        run.log({"step": 1, "reward/mean": 0.5})
    assert "wandb" not in sys.modules and not (run.path / "told.jsonl").exists()


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    recipe = tiny_recipe(tmp_path, "wandb.project=sums")
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"project is sums, but the package wandb is not installed"):
            check_wandb(recipe)
        (tmp_path / "wandb").mkdir(exist_ok=True)  # what an offline run leaves in the working directory is no package


def test_metrics_go_out_under_their_names_and_over_their_own_steps(tmp_path, stand_in):
    recipe, run, progress = opened(tmp_path, "wandb.mode=offline", "wandb.tags=[a,b]")
    check_wandb(recipe)
    with mirrored(recipe, run, progress), run:
        run.log_supervised({"step": 1, "loss/supervised": 3.0})
        run.log({"step": 1, "reward/mean": 0.5})
        run.log({"step": 2, "reward/mean": 0.75})
    (first, given), *rest = told(run)
    assert first == "init" and given["project"] == "sums" and given["tags"] == ["a", "b"]
    assert (given["mode"], given["console"], given["disable_code"]) == ("offline", "off", True)
    assert given["config"] == {"name": "run", "learner": {"lr": 0.5}}
    assert rest == [
        ["define", ["supervised/loss/supervised", "supervised/step"]],
        ["log", {"supervised/step": 1, "supervised/loss/supervised": 3.0}],
        ["define", ["reward/mean", "step"]],
        ["log", {"step": 1, "reward/mean": 0.5}],
        ["log", {"step": 2, "reward/mean": 0.75}],
        ["finish", 0],
    ]


def test_a_run_that_stops_is_closed_as_failed(tmp_path, stand_in):
    recipe, run, progress = opened(tmp_path)
    with pytest.raises(RuntimeError), mirrored(recipe, run, progress), run:
        raise RuntimeError
    assert told(run)[-1] == ["finish", 1]


def test_what_fails_on_the_way_costs_a_warning(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("FAILS_AFTER", "1")
    recipe, run, progress = opened(tmp_path)
    with mirrored(recipe, run, progress), run:
        for step in range(1, 5):
            run.log({"step": step, "reward/mean": 0.5})
    assert [what for what, _ in told(run)] == ["init", "define", "log", "finish"]
    assert capsys.readouterr().out.count("gets no more metrics of this run: ConnectionError: no route") == 1
    assert len(run.metrics.read_text().splitlines()) == 4


def test_what_cannot_be_begun_is_a_sentence(tmp_path, stand_in):
    recipe, run, progress = opened(tmp_path, "wandb.entity=nobody")
    expected = "wandb.project sums cannot be used: RuntimeError: no such entity"
    with pytest.raises(RecipeError, match=expected), mirrored(recipe, run, progress), run:
        raise AssertionError("the run must not begin")
