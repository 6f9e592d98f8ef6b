"""The driver's handle over real Ray actors."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rich.console import Console

from model import checksums, load_model
from rl.checkpoint import newest
from rl.config import Recipe
from rl.errors import DataError, LearnerFailed, RecipeError, RunStopped
from rl.loop_state import LoopState
from rl.metrics import values
from rl.progress import Progress
from rl.run_directory import RunDirectory
from rl.saver import Saver
from tests.trainer.samples import advantages_of, groups_of, tiny_recipe
from trainer.deepspeed_engine import StepOutcome
from trainer.learner import Learner, StepResult
from trainer.pack import Minibatch, pack
from trainer.phase import Phase
from trainer.step import RankStep
from trainer.supervised import EncodedDemonstration, pack_demonstrations


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@asynccontextmanager
async def started(recipe: Recipe, model_dir: Path, **keywords: Any) -> AsyncIterator[Learner]:
    learner = await Learner.start(recipe, model_dir, **keywords)
    try:
        yield learner
    finally:
        learner.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def batch(model_dir: Path, *, ranks: int, kl_beta: float = 0.0) -> list[Minibatch]:
    groups = groups_of(load_model(model_dir))
    return pack(
        groups,
        advantages_of(groups),
        kl_betas={"math": kl_beta},
        ranks=ranks,
        minibatches=2,
        micro_tokens=64,
        rng=np.random.default_rng(0),
    )


def demonstrations() -> Iterator[list[EncodedDemonstration]]:
    while True:
        token_ids = np.arange(12, dtype=np.int32)
        yield [EncodedDemonstration(id=f"d{i}", token_ids=token_ids + i, trained=np.arange(12) > 3) for i in range(4)]


def test_two_ranks_from_cold_start_to_publishing(model_dir: Path, tmp_path: Path):
    recipe = tiny_recipe(ranks=2, zero_stage=2, kl_beta=0.1, warmup_steps=4)
    supervised = dataclasses.replace(recipe.supervised, steps=5, dense_warmup_steps=2)
    recipe = dataclasses.replace(recipe, supervised=supervised)

    async def test() -> None:
        async with started(recipe, model_dir, phase=None) as learner:
            results: list[StepResult] = []
            start = model_dir
            for phase, steps, end in (
                (Phase.INDEXER_WARMUP, 2, tmp_path / "warm"),
                (Phase.SUPERVISED, 3, tmp_path / "cold"),
                (Phase.REINFORCEMENT, 0, None),
            ):
                await learner.begin(phase, start)
                results += [await learner.supervised_step(next(demonstrations())) for _ in range(steps)]
                if end is not None:
                    await learner.save_model(end)
                    start = end
            losses = [values(result.metrics).get("loss/supervised", 0.0) for result in results]
            assert len(losses) == 5
            assert losses[4] < losses[2]
            cold = load_model(tmp_path / "cold")
            assert await learner.checksums() == checksums(cold.state_dict().items())

            result = await learner.step(batch(tmp_path / "cold", ranks=2, kl_beta=0.1))
            metrics = values(result.metrics)
            steps = batch(tmp_path / "cold", ranks=2, kl_beta=0.1)
            assert result.learner_logprobs.keys() == {name for step in steps for name in step.sample_ids}
            for micro in (micro for rank in steps[0].ranks for micro in rank if micro.sampled.any()):
                learned = np.concatenate([result.learner_logprobs[name] for name in micro.sample_ids])
                np.testing.assert_allclose(learned, micro.rollout_logprobs, atol=1e-3)
            # The second optimizer step is off policy by the first one, and away from the reference by as much.
            assert metrics["mismatch/logprob_abs"] > 1e-4
            assert 0 < metrics["loss/kl"] < 1e-2
            assert metrics["lr"] == pytest.approx(1e-3 * (0.25 + 0.5) / 2)  # fresh optimizer, two steps of its warm-up
            assert metrics["grad_norm"] > 0
            assert metrics["learn/skipped"] == 0
            assert result.seconds.keys() == {"forward", "backward", "optimizer"}
            assert all(spent > 0 for spent in result.seconds.values())
            assert learner.attention_span == 12 * 32
            assert metrics["tokens/trained"] == sum(step.num_tokens for step in steps)

            buckets = await learner.weight_buckets(max_bytes=16384)
            sent: dict[str, torch.Tensor] = {}
            for bucket in await asyncio.gather(*buckets.refs):
                assert sent.keys().isdisjoint(bucket)
                sent |= bucket
            assert len(buckets.refs) > 3
            assert buckets.sent.num_bytes == sum(tensor.nbytes for tensor in sent.values())
            sums = await learner.checksums()
            assert checksums(sent.items()) == sums
            assert sums != checksums(cold.state_dict().items())

            await go_back(learner, tmp_path / "cold", tmp_path / "checkpoint")

            await learner.save_model(tmp_path / "model")
            assert await learner.checksums() == checksums(load_model(tmp_path / "model").state_dict().items())

            await lose_one_checkpoint(learner, recipe, tmp_path / "run")

            # A learner that ends while it writes has not written a checkpoint without ranks.
            await learner.copy_checkpoint()
            waiting = asyncio.create_task(learner.checkpoint_written(tmp_path / "never"))
            await asyncio.sleep(0.2)
            learner.close()
            with pytest.raises(LearnerFailed):
                await waiting

    run(test)


async def go_back(learner: Learner, model_dir: Path, folder: Path) -> None:
    """A step after a checkpoint, and once more from it, are the same."""
    num_bytes = await learner.copy_checkpoint()
    folder.mkdir()
    await learner.write_checkpoint(folder)
    written = await learner.checkpoint_written(folder)
    assert sorted(written) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert sum(record.bytes for record in written.values()) >= num_bytes
    assert {path.name for path in folder.iterdir()} == written.keys()
    after = values((await learner.step(batch(model_dir, ranks=2, kl_beta=0.1))).metrics)
    await learner.begin(Phase.REINFORCEMENT, model_dir)
    await learner.load_checkpoint(folder)
    again = values((await learner.step(batch(model_dir, ranks=2, kl_beta=0.1))).metrics)
    assert again == after


async def lose_one_checkpoint(learner: Learner, recipe: Recipe, path: Path) -> None:
    """What one rank is not allowed to write to the disk costs that checkpoint, and not the next one."""
    printed = io.StringIO()
    with RunDirectory.create(path, recipe="") as run:
        saver = Saver(recipe, run, Progress("tiny", steps=9, console=Console(file=printed, width=500)))
        saver.follow(path / "model", None, cold_start=True)
        for step, most_bytes in ((1, resource.RLIM_INFINITY), (2, 1000), (3, resource.RLIM_INFINITY)):
            resource.prlimit(learner.processes[1].pid, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
            await saver.copy_cold_start(step, LoopState(values={}), learner)
            saver.write(step, {}, {})
            await saver.settle()
            folder = run.checkpoints / "cold_start"
            assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []
            assert newest(run.checkpoints).found.step == (1 if step == 2 else step)  # pyright: ignore[reportOptionalMemberAccess]
    assert saver.num_failed == 1 and saver.last == 3
    assert "checkpoint of cold start step 2 was not written: File too large; that of step 1 stays" in printed.getvalue()


def test_steps_that_stay_non_finite_stop_the_run_and_name_their_samples(model_dir: Path):
    good, bad = batch(model_dir, ranks=1), batch(model_dir, ranks=1)
    culprit = bad[1].ranks[0][0]
    culprit.advantages[:] = np.nan

    async def test() -> None:
        async with started(tiny_recipe(max_skipped_steps=2), model_dir) as learner:
            result = await learner.step(bad)
            assert [(skip.step, skip.sample_ids) for skip in result.skipped] == [(2, culprit.sample_ids)]
            metrics = values(result.metrics)
            assert metrics["learn/skipped"] == 1
            assert all(np.isfinite(value) for value in metrics.values())
            assert result.learner_logprobs.keys() == set(bad[0].sample_ids)
            assert not (await learner.step(good)).skipped  # a step that works starts the count again
            await learner.step(bad)
            with pytest.raises(RunStopped, match=rf"optimizer step 7: .*2\. step in a row.*{culprit.sample_ids[0]}"):
                await learner.step([bad[1]])

    run(test)


def _rests(rank: object) -> None:
    time.sleep(1)


def test_silent_ranks_and_a_dead_one_are_named(model_dir: Path):
    async def test() -> None:
        async with started(tiny_recipe(ranks=2, zero_stage=1), model_dir, timeout_s=60.0) as learner:
            with pytest.raises(LearnerFailed, match="learner rank 0, 1 did not finish ray_call within 0 s"):
                await learner._gather("__ray_call__", dict.fromkeys((0, 1), (_rests,)), timeout_s=0.0)
            ray.kill(learner._actors[1])
            with pytest.raises(LearnerFailed, match="learner rank 1 died during step"):
                await learner.step(batch(model_dir, ranks=2))

    run(test)


def test_ranks_that_the_cluster_has_no_room_for_are_refused_at_once(model_dir: Path):
    with pytest.raises(RecipeError, match=r"learner\.ranks 3 .* need 6 CPUs, but the Ray cluster has 2"):
        asyncio.run(Learner.start(tiny_recipe(ranks=3, threads=2), model_dir))


def test_ranks_without_a_gpu_each_are_refused_where_there_are_gpus(model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(RecipeError, match=r"learner\.ranks 2 need a GPU each, but the Ray cluster has 1"):
        asyncio.run(Learner.start(tiny_recipe(ranks=2), model_dir))


def test_streams_of_samples_that_share_a_name_are_left_out():
    def minibatch(*names: str) -> Minibatch:
        token_ids, trained = np.arange(4, dtype=np.int32), np.arange(4) > 1
        shown = [EncodedDemonstration(id=name, token_ids=token_ids, trained=trained) for name in names]
        return pack_demonstrations(shown, ranks=1, micro_tokens=64)

    def done(*names: str) -> RankStep:
        outcome = StepOutcome(applied=True, grad_norm=1.0, lr=1.0)
        streams = {f"{name}#0": np.zeros(4, np.float32) for name in names}
        return RankStep(outcome=outcome, loss=1.0, metrics={}, learner_logprobs=streams)

    learner = Learner(tiny_recipe(), [], timeout_s=1.0)
    result = learner._result([minibatch("a", "b", "b"), minibatch("a", "c")], [[done("a", "b"), done("a", "c")]])
    assert set(result.learner_logprobs) == {"c#0"}


def test_a_model_that_is_not_there_is_the_users_to_mend(tmp_path: Path):
    async def test() -> None:
        with pytest.raises(DataError, match="nowhere cannot be loaded"):
            await Learner.start(tiny_recipe(), tmp_path / "nowhere")

    run(test)
