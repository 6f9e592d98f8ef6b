"""Secrets of a run: who can read them, where they are written, and who can knock at its doors."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl.checkpoint import Draft, commit, partial_path, read
from rl.environ import needed_environment
from rl.loop_state import LoopState
from rl.recipe import load_recipe, to_yaml
from rl.run_directory import RunDirectory, write_whole
from rl.sample import Group, Scored
from rl.secrets import is_secret_name, learn_secrets, redact, redact_pieces, redact_values
from rl.timeline import Timeline
from rl.trajectory import SequenceView, Trajectory
from tests.rl.tiny_runs import REPOSITORY, Run, environment, make_prompt, make_sample, read_lines, write_recipe

IN_ENVIRONMENT = {
    "JUDGE_API_KEY": "sk-judge-s3cret-1111",
    "WANDB_API_KEY": "wandb-s3cret-2222",
    "HF_TOKEN": "hf_s3cret3333",
    "SCORER_TOKEN": 'scorer-s3cret-"4444"-ä',
    "SOMETHING": "s3cret-under-no-telling-name",
    "HTTPS_PROXY": "http://me:proxy-s3cret-5555@proxy:8080",
}
REWARDS = [{"use": "tests.rl.snooping:snoops"}, {"use": "tests.rl.snooping:leaks", "retries": 0, "timeout_s": 5}]
RECIPE = {
    "extends": "tiny.yaml",
    "steps": 100_000,
    "learner": {"ranks": 2},
    "reward_workers": 2,
    "reward_env": ["SCORER_TOKEN"],
    "log_samples": 100,
    "judge": {
        "url": "https://judge:url-s3cret-6666@127.0.0.1:1/v1?api_key=query-s3cret-7777",
        "model": "judge",
        "api_key": "JUDGE_API_KEY",
    },
    "domains": {
        "sums": {"rewards": REWARDS},
        "tools": {
            "prompts": "${domains.sums.prompts}",
            "thinking": False,
            "group_size": 2,
            "rewards": [{"use": "format"}],
            "environment": {
                "use": "tests.rl.snooping:Snoop",
                "max_turns": 1,
                "args": {
                    "env": {"GITHUB_TOKEN": "${oc.env:HF_TOKEN}"},
                    "headers": {"Authorization": "Bearer header-s3cret-8888"},
                },
            },
        },
    },
}


@dataclass(frozen=True, slots=True)
class Watched:
    """A run with secrets wherever users have them, stopped after a few steps."""

    run: Run
    printed: str
    listening: list[tuple[str, str]]
    """Addresses at which its processes listened, and which process it was."""
    token: Path  # of its Ray cluster


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "home").mkdir()
    write_recipe(folder)
    (folder / "secret.yaml").write_text(yaml.safe_dump(RECIPE))
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.train", str(folder / "secret.yaml"), f"runs={folder / 'runs'}"],
        cwd=REPOSITORY,
        env=environment() | IN_ENVIRONMENT | {"HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = Run(folder / "runs" / "tiny")
    try:
        deadline = time.monotonic() + 120
        while not (run.path / "samples" / "step_3.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        listening = list(_listening(psutil.Process(process.pid)))
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    yield Watched(run=run, printed=printed, listening=listening, token=folder / "home" / ".ray" / "auth_token")


def _listening(root: psutil.Process) -> Iterator[tuple[str, str]]:
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip.removeprefix("::ffff:"), f"{connection.laddr.port} of {process.cmdline()}"


def test_no_secret_is_written_anywhere(watched: Watched):
    contents = {str(path): path.read_bytes() for path in watched.run.path.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "status.json", "report.html", "step_1.jsonl"} <= {Path(name).name for name in contents}
    assert "401 Unauthorized: ${oc.env:SCORER_TOKEN}" in watched.printed
    for name, content in {**contents, "output": watched.printed.encode()}.items():
        assert b"s3cret" not in content, name


def test_a_written_recipe_refers_to_the_secrets_of_the_environment(watched: Watched, monkeypatch: pytest.MonkeyPatch):
    for name, value in IN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    again = load_recipe(watched.run.path / "recipe.yaml")
    environment = again.domains["tools"].environment
    assert environment is not None and environment.args["env"]["GITHUB_TOKEN"] == IN_ENVIRONMENT["HF_TOKEN"]
    assert again.judge.api_key == "JUDGE_API_KEY"
    assert again.judge.url == "https://judge:***@127.0.0.1:1/v1?api_key=***"
    assert to_yaml(again) == (watched.run.path / "recipe.yaml").read_text()


def test_rewards_and_tools_see_no_secret_but_those_they_are_given(watched: Watched):
    """Not even in what ``/proc`` shows of their parents, of the driver and of every other process."""
    rows = [row for path in (watched.run.path / "samples").iterdir() for row in read_lines(path)]
    scored = [row for row in rows if row["domain"] == "sums"]
    assert scored and all(row["parts"]["snoops"] == 1 for row in scored)
    assert {row["index"] for row in scored} == {0, 2, 3}  # `leaks` could read what it was given, and told
    states = [row["final_state"] for row in rows if row["domain"] == "tools"]
    assert states and all(state == {"seen": [], "readable": True, "given": True} for state in states)


def test_every_server_listens_on_loopback_only(watched: Watched):
    names = " ".join(process for _, process in watched.listening)
    assert all(part in names for part in ("raylet", "gcs_server", "LearnerRank", "EngineActor", "SerialWorker"))
    assert [one for one in watched.listening if not ipaddress.ip_address(one[0]).is_loopback] == []


def test_what_a_tool_answered_is_written_without_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCORER_TOKEN", IN_ENVIRONMENT["SCORER_TOKEN"])
    learn_secrets({})
    write_whole(tmp_path / "step_1.jsonl", json.dumps({"text": f"token: {IN_ENVIRONMENT['SCORER_TOKEN']}"}))
    assert (tmp_path / "step_1.jsonl").read_text() == '{"text": "token: ${oc.env:SCORER_TOKEN}"}'


def test_every_file_of_a_run_is_written_without_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a reward says when it fails reaches a checkpoint too, when the step of the failure is not over."""
    monkeypatch.setenv("SCORER_TOKEN", IN_ENVIRONMENT["SCORER_TOKEN"])
    learn_secrets({})
    pieces = ["401 ", "Unauthorized: ", "scorer", "-s3c", 'ret-"4444', '"-ä', " ", "again"]
    said = "".join(pieces)
    assert IN_ENVIRONMENT["SCORER_TOKEN"] in said
    sample = make_sample(make_prompt("1"), num_sampled=len(pieces) - 2, reply=said, final_state={said: [said]})
    run = RunDirectory.create(tmp_path / "tiny", recipe="name: tiny")
    scored = Scored(sample=sample, reward=0.0, comments={"judge": said})
    state = LoopState(values={}, groups=[Group(prompt=sample.prompt, scored=(scored,))])
    draft = Draft(step=1, recipe={}, model_dir=run.model, sums={}, faults={}, loop=state)
    partial = partial_path(run.checkpoints, 1)
    partial.mkdir(parents=True)
    path, _ = commit(run.checkpoints, 1, draft.write(partial), {})
    view = SequenceView(sample=sample, token_texts=pieces)
    run.log_samples(1, [Trajectory(scored=scored, sequences=[view], advantage=0.0)])
    run.log_alarm({"sentence": said})
    timeline = Timeline(run.path / "timeline.jsonl")
    with timeline.span("rewards", "score", detail=said):
        pass
    run.stop(said)
    texts = {name.name: name.read_text() for name in run.path.rglob("*.json*")}
    told = [name for name, text in texts.items() if "401 Unauthorized: ${oc.env:SCORER_TOKEN}" in text]
    assert sorted(told) == ["alarms.jsonl", "run.json", "status.json", "step_1.jsonl", "timeline.jsonl"]
    assert not any("s3cret" in text for text in texts.values())
    assert read(path).loop is not None  # still what its manifest says
    (row,) = read_lines(run.samples / "step_1.jsonl")
    assert row["tokens"] == ["401 ", "Unauthorized: ", "${oc.env:SCORER_TOKEN}", "", "", "", " ", "again"]
    assert [one == 0 for one in row["token_ids"]] == [False] * 2 + [True] * 4 + [False] * 2


def test_a_password_of_digits_is_no_part_of_a_longer_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DB_PASSWORD", "33333333")
    learn_secrets({})
    numbers = json.dumps({"third": 0.3333333333333333, "state": 12333333334, "other": 1.33333333})
    assert redact(numbers) == numbers
    assert redact("login:33333333.") == "login:${oc.env:DB_PASSWORD}."


@given(st.lists(st.sampled_from(["a", "pass-", "word-1", "pass-word-1", "pass-word-12", "2", ""]), max_size=9))
def test_pieces_are_redacted_as_their_whole_text_is(pieces: list[str]):
    learn_secrets({"password": "pass-word-1", "secret": "pass-word-12"})
    redacted = redact_pieces(pieces)
    assert len(redacted) == len(pieces)
    assert "".join(redacted) == redact("".join(pieces))
    assert redact_values({"a": [{"".join(pieces): 1}]}) == {"a": [{redact("".join(pieces)): 1}]}


def test_the_clusters_token_is_the_users_own(watched: Watched):
    assert watched.token.stat().st_mode & 0o777 == 0o600
    assert len(watched.token.read_text()) == 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("OPENAI_API_KEY", "HF_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "apikey")),
        *((name, True) for name in ("Authorization", "X-Api-Key", "MYSQL_PWD", "GITHUB_PAT", "db_password")),
        *(
            (name, True)
            for name in ("SMTP_PASS", "accessToken", "clientSecret", "privateKey", "ACCESSTOKEN", "SENTRY_DSN")
        ),
        *((name, False) for name in ("fail_to_pass", "bypass", "maxTokens", "keyboardLayout", "passes")),
        *((name, False) for name in ("TOKENIZERS_PARALLELISM", "max_tokens", "KEYBOARD", "author", "monkey", "PATH")),
        *((name, False) for name in ("RAY_AUTH_TOKEN_PATH", "SSH_AUTH_SOCK", "RAY_AUTH_MODE")),
    ],
)
def test_names_that_say_so(name: str, expected: bool):
    assert is_secret_name(name) == expected


def test_secrets_in_a_commands_arguments_are_found():
    command = ["server", "--api-key", "abcdefgh-1234-5678", "--port", "80", "--token=ijklmnop-1234-5678", "-v"]
    learn_secrets({"environment": {"args": {"command": command}}})
    assert redact(" ".join(command)) == "server --api-key *** --port 80 --token=*** -v"


def test_what_only_looks_like_a_secret_is_left_alone():
    recipe = {
        "args": {"key": "question", "token": "<|endoftext|>", "stop_token": "a b", "url": "http://host:80/v1?q=1"}
    }
    learn_secrets(recipe)
    text = "the question is at http://host:80/v1?q=1 <|endoftext|>"
    assert redact(text) == text


def test_the_traceback_of_a_crash_shows_no_secret():
    script = """
from rl.run_directory import write_whole
from rl.secrets import learn_secrets, redact_tracebacks
redact_tracebacks()
learn_secrets({})
import os
raise RuntimeError("cannot log in with " + os.environ["SCORER_TOKEN"])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment() | IN_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: cannot log in with ${oc.env:SCORER_TOKEN}\n")


def test_what_engines_and_ranks_are_tuned_with_reaches_them(monkeypatch: pytest.MonkeyPatch):
    """On machines where NVLink multicast must not be used, these say so to NCCL, torch and NVSHMEM."""
    tuned = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS", "VLLM_CACHE_ROOT")
    for name in (*tuned, "NCCL_AUTH_TOKEN", "MY_OWN"):
        monkeypatch.setenv(name, "0")
    with needed_environment():
        assert [name for name in (*tuned, "NCCL_AUTH_TOKEN", "MY_OWN") if name in os.environ] == list(tuned)
    assert os.environ["MY_OWN"] == os.environ["NCCL_AUTH_TOKEN"] == "0"
