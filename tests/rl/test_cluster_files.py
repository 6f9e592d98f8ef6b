"""The files that docs/cluster.md tells people to use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl.cluster import check_runs_last
from rl.errors import RecipeError
from rl.recipe import load_recipe
from tests.rl.tiny_runs import REPOSITORY, tiny_recipe, write_recipe

FILES = REPOSITORY / "docs" / "cluster"


def test_the_ray_job_asks_for_a_run_that_can_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text())["spec"]
    shell, script, recipe, *overrides = job["entrypoint"].split()
    assert (shell, script) == ("bash", "/keel/docs/cluster/start.sh")
    cluster = job["rayClusterSpec"]
    assert f'"ray[default]=={cluster["rayVersion"]}"' in (REPOSITORY / "pyproject.toml").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    loaded = load_recipe(recipe, overrides)
    assert loaded.rollout.engines * loaded.rollout.tensor_parallel + loaded.learner.ranks == gpus


def test_start_reads_secrets_from_files(tmp_path: Path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "JUDGE_KEY").write_text("a key\n")
    recipe = write_recipe(tmp_path)
    script = "import os; print(repr(os.environ['JUDGE_KEY']))"
    # Stands in for the run, in the place where the script looks for it.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\n"{sys.executable}" -c "{script}"; echo "$PWD" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    env = os.environ | {"KEEL_SECRETS": str(tmp_path / "secrets"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", FILES / "start.sh", recipe, "steps=1"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.stdout == f"'a key'\n{REPOSITORY} -m rl.train {recipe} steps=1\n", ended.stderr


def test_scripts_are_bash():
    for name in ("start.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", FILES / name], check=True)


def test_the_page_names_files_that_are_there():
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    links = set(re.findall(r"\]\((\w[^)]*)\)", page))
    assert {"cluster/rayjob.yaml", "cluster/slurm.sbatch", "cluster/Dockerfile"} <= links
    assert all((REPOSITORY / "docs" / link).exists() for link in links)


def test_a_run_that_would_go_with_its_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    sent.mkdir(parents=True)
    monkeypatch.chdir(sent)
    inside, outside = tiny_recipe(tmp_path), tiny_recipe(tmp_path, f"runs={tmp_path}")
    check_runs_last(inside)  # nobody submitted it
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check_runs_last(outside)
    with pytest.raises(RecipeError, match=r"which Ray deletes when the job ends; give an absolute path"):
        check_runs_last(inside)
