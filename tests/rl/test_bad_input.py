"""A user's mistakes end with one sentence that names the place, an exit code, and nothing that looks finished."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.initial_model import create_initial_model, initial_config
from rl.train import main
from tests.rl.tiny_runs import (
    RECIPE,
    REPOSITORY,
    REWARDS,
    Run,
    assert_one_sentence,
    command,
    environment,
    run_command,
    run_here,
    write_recipe,
)

Capture = pytest.CaptureFixture[str]


def assert_nothing_left(folder: Path) -> None:
    assert not list((folder / "runs").glob("*"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["learner.lrr=1"], ["override 'learner.lrr=1'", "did you mean 'lr'?"]),
        (["learner.lr=fast"], ["override 'learner.lr=fast'", "learner.lr"]),
        (["domains.sums.prompts=elsewhere.jsonl"], ["elsewhere.jsonl does not exist"]),
        (["domains.sums.prompts={reasoning_gym: chain_sumn}"], ["no task 'chain_sumn'; did you mean 'chain_sum'?"]),
        (["model.init=null", "model.path=nowhere"], ["model.path", "nowhere/config.json does not", "hf download"]),
        (["model.init.hiden_size=64"], ["model.init has no key 'hiden_size'; did you mean 'hidden_size'?"]),
        (["model.init.num_experts_per_tok=9"], ["model.init", "num_experts_per_tok (9)"]),
        (
            ["model.max_context=4", "sampling.max_tokens=2"],
            ["prompt sums/", "window holds 4 (model.max_context) ("],
        ),
        (["supervised.steps=3", "supervised.demonstrations=none.jsonl"], ["none.jsonl does not exist"]),
        (["domains.sums.rewards.0.use=math_answr"], ["reward 'math_answr' is neither", "mean 'math_answer'?"]),
        (["domains.sums.rewards.0.use=rubric"], ["domains.sums: the reward rubric needs a judge; set judge.url"]),
        (["reward_env=[NO_SUCH_KEY]"], ["shall read NO_SUCH_KEY", "no such variable; export it"]),
        (
            ["supervised.steps=3", f"supervised.demonstrations.function={REWARDS}:say_the_prompt"],
            ["has no 'say_the_prompt'; did you mean 'says_the_prompt'?"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_mistakes_found_before_anything_starts(
    overrides: list[str], sentence: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("an actor was about to start"))
    code, _ = run_here(tmp_path, *overrides)
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, *sentence)
    assert_nothing_left(tmp_path)


def test_a_mistyped_key_is_found_with_its_line(tmp_path: Path, capsys: Capture):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("max_num_seqs", "max_num_seq"))
    (number,) = (n for n, line in enumerate(path.read_text().splitlines(), 1) if "max_num_seq" in line)
    assert main([str(path)]) == 1
    assert_one_sentence(capsys.readouterr().err, f"{path}:{number}:", "did you mean 'max_num_seqs'?")


def test_a_recipe_that_is_missing(tmp_path: Path, capsys: Capture):
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert_one_sentence(capsys.readouterr().err, f"there is no recipe {tmp_path / 'none.yaml'}")


def test_no_recipe_at_all(capsys: Capture):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: recipe\n")


def test_a_line_that_is_not_json_is_named(tmp_path: Path, capsys: Capture):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1="}\n\n{"prompt": "2+\n')
    code, _ = run_here(tmp_path, f"domains.sums.prompts={tmp_path / 'bad.jsonl'}")
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, f"{tmp_path / 'bad.jsonl'} line 3: is not JSON")
    assert_nothing_left(tmp_path)


def test_a_name_that_is_taken(tmp_path: Path, capsys: Capture):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "notes.txt").write_text("mine")
    code, run = run_here(tmp_path)
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, str(run.path), "choose another name=... or delete it")
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.engine=vllm", "model.dtype=bfloat16"], ["rollout.engine: vllm needs a GPU", "rollout.engine=torch"]),
        (["domains.sums.rewards.0.use=my_rewards:f"], ["reward 'my_rewards:f' cannot be imported", "'my_rewards'"]),
        ([f"domains.sums.rewards.0.use={REWARDS}:evennes"], ["has no 'evennes'; did you mean 'evenness'?"]),
        (["domains.sums.rewards.0.args={targt: 3}"], ["does not take the argument 'targt'"]),
        (["learner.ranks=64"], ["learner.ranks 64", "the Ray cluster has 4"]),
        (
            ["domains.sums.environment.use=tests.rollout.plugged:shout"],
            ["prompt sums/", "with its tools has", "window holds 40 (model.max_context)"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_mistakes_found_when_actors_start(
    overrides: list[str], sentence: list[str], cluster: None, tmp_path: Path, capsys: Capture
):
    code, _ = run_here(tmp_path, *overrides)
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, *sentence)
    assert_nothing_left(tmp_path)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.o_proj.weight"]


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(7, 32)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop, ["tensor model.layers.1.self_attn.o_proj.weight is missing"]),
        (cut, ["tensor model.layers.2.mlp.gate.weight has shape (7, 32)", "(8, 32)"]),
    ],
)
def test_a_broken_checkpoint_names_its_tensor(
    damage: Callable[[dict[str, torch.Tensor]], None],
    sentence: list[str],
    cluster: None,
    tmp_path: Path,
    capsys: Capture,
):
    model = RECIPE["model"]
    create_initial_model(initial_config(model["init"], model["max_context"]), tmp_path / "model", seed=0)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    code, _ = run_here(tmp_path, "model.init=null", f"model.path={tmp_path / 'model'}")
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, str(tmp_path / "model"), *sentence)
    assert_nothing_left(tmp_path)


def test_a_reward_that_always_raises(cluster: None, tmp_path: Path, capsys: Capture):
    code, _ = run_here(tmp_path, f"domains.sums.rewards.0.use={REWARDS}:raises")
    assert code == 1
    assert_one_sentence(
        capsys.readouterr().err, "no sample of the last 12 groups", "raises raised KeyError: 'no rubric for this'"
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_losses_that_are_not_finite_are_skipped_counted_and_stop_the_run(
    cluster: None, tmp_path: Path, capsys: Capture
):
    code, run = run_here(
        tmp_path, f"domains.sums.rewards.0.use={REWARDS}:overflows", "steps=9", "learner.max_skipped_steps=3"
    )
    captured = capsys.readouterr()
    assert code == 1
    assert_one_sentence(captured.err, "optimizer step 3: the loss or its gradient was not finite", "sums/")
    assert "warning: optimizer step 1 skipped: loss not finite; samples sums/" in captured.out
    assert [row["learn/skipped"] for row in run.steps] == [1, 1]
    assert run.status["status"] == "stopped"
    assert not run.path.joinpath("model").exists()


def test_weights_that_overflow_stop_the_run(cluster: None, tmp_path: Path, capsys: Capture):
    code, run = run_here(tmp_path, "learner.lr=1e30", "steps=9")
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, "NaN or infinity")
    assert run.status["status"] == "stopped"


def test_a_reward_that_always_hangs(tmp_path: Path):
    done, _ = run_command(
        tmp_path,
        f"domains.sums.rewards=[{{use: '{REWARDS}:hangs', timeout_s: 0.1, retries: 0}}]",
        "domains.sums.group_size=2",
        "prompts_per_step=1",
        "sampling.max_tokens=2",
    )
    assert done.returncode == 1
    assert_one_sentence(done.stderr, "no sample of the last 3 groups", "hangs took longer than its timeout of 0.1 s")
    starting, training, worker = done.stdout.splitlines()
    assert (starting, training) == ("tiny: starting", "tiny: training")
    assert re.match(r"warning: a reward worker ended or was killed after \d+\.\d s of scoring sums/", worker)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_says_so_and_leaves_no_process(number: signal.Signals, tmp_path: Path):
    process = subprocess.Popen(
        command(tmp_path, "steps=100000"),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run = Run(tmp_path / "runs" / "tiny")
    try:
        deadline = time.monotonic() + 120
        while not (run.path / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("LearnerRank" in shown for shown in _commands(started))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "keel: interrupted\n"
    assert "tiny stopped after" in printed
    assert (run.status["status"], run.status["reason"]) == ("stopped", "interrupted")
    assert (run.path / "report.html").exists()
    assert not (run.path / "model").exists()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def _commands(processes: Iterable[psutil.Process]) -> Iterator[str]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield " ".join(process.cmdline())


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_full_disk(cluster: None, tmp_path: Path, capsys: Capture):
    (tmp_path / "runs").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", tmp_path / "runs"])
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount")
    try:
        code, run = run_here(tmp_path, "steps=400", "log_samples=16")
        assert code == 1
        assert_one_sentence(capsys.readouterr().err, f"{run.path} cannot be written: No space left on device")
        assert run.status["status"] != "finished"
    finally:
        subprocess.run(["umount", tmp_path / "runs"], check=True)
