"""Engines as real Ray actors behind the pool, from prompts to samples and from staged weights to checksums."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
import ray

from model import save_model
from model.checksum import checksums
from model.tokenizer import load_tokenizer, save_byte_tokenizer
from rl.config import Doctor, Faults, Learner, Model, Recipe, Rollout, Sampling
from rl.errors import DataError, RecipeError, RunStopped
from rl.sample import Prompt, Sample, Status
from rollout.conversation import Conversation
from rollout.engine import Finish, Request
from rollout.pool import EnginePool


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=3, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def model_path(make_model, tmp_path):
    save_model(make_model(0), tmp_path)
    save_byte_tokenizer(tmp_path)
    return tmp_path


def prompt_of(text: str) -> Prompt:
    return Prompt(id=f"test/{text}", domain="test", messages=({"role": "user", "content": text},))


async def rollout_and_update(pool: EnginePool, model_path, weights: dict) -> tuple[tuple, tuple, dict, list]:
    conversation = Conversation(load_tokenizer(model_path))
    sampling = Sampling(top_p=0.95, max_tokens=24)

    async def group(text: str, seeds) -> list[Sample]:
        prompt = prompt_of(text)
        return await pool.generate_group(prompt, conversation.encode(prompt.messages, thinking=True), sampling, seeds)

    # Three groups at once spread over two engines.
    first = await asyncio.gather(group("a", [1, 2, 3, 4]), group("b", [5, 6]), group("a", [1, 2, 3, 4]))
    half = len(weights) // 2
    items = list(weights.items())
    await pool.stage([dict(items[:half]), ray.put(dict(items[half:]))])
    sums = await pool.commit(3)
    second = await asyncio.gather(group("a", [1, 2, 3, 4]), group("a", [1, 2, 3, 4]))
    stats = await pool.stats()

    long = prompt_of("x" * 200)
    token_ids = conversation.encode(long.messages, thinking=True)
    with pytest.raises(DataError, match=rf"prompt {long.id} has {len(token_ids)} tokens .* holds 96"):
        await pool.generate_group(long, token_ids, sampling, [1])

    many = asyncio.ensure_future(group("c", range(32)))  # four times an engine's slots, so most of them wait
    while not sum(s.num_active for s in await pool.stats()):
        await asyncio.sleep(0)
    num_aborted = await pool.abort()
    assert num_aborted > 8
    assert [sample.status for sample in await many].count(Status.ABORTED) == num_aborted

    late = Request(id="late", token_ids=np.arange(9, dtype=np.int32), sampling=Sampling(max_tokens=80), seed=1)
    with pool.seat(1) as complete:
        whole = await complete(late)
        assert whole.finish == Finish.LENGTH and len(whole.token_ids) == 80
        ended = await complete(replace(late, ends_at=time.monotonic()))
        assert ended.finish == Finish.ABORT and len(ended.token_ids) < 80

    async def num_generated() -> int:
        return sum(s.num_generated_tokens for s in await pool.stats())

    begin = await num_generated()
    cancelled = asyncio.ensure_future(group("c", range(32)))
    while not sum(s.num_active for s in await pool.stats()):
        await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    while sum(s.num_active + s.num_waiting for s in await pool.stats()):
        await asyncio.sleep(0)
    cut = await num_generated()
    await group("c", range(32))
    assert cut - begin < await num_generated() - cut
    return first, second, sums, stats


def check_samples(first: tuple, second: tuple) -> None:
    # Engines agree: equal seeds give equal samples wherever they run.
    for one, other in zip((*first[0], *second[0]), (*first[2], *second[1]), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert any(not np.array_equal(x.token_ids, y.token_ids) for x, y in zip(first[0], second[0], strict=True))
    for version, samples in ((0, first[0] + first[1]), (3, second[0])):
        for index, sample in enumerate(samples[:4]):
            assert sample.id == f"test/a#{index}"
            assert set(sample.versions[sample.sampled].tolist()) == {version}
            assert sample.status == (Status.FINISHED if sample.token_ids[-1] == 1 else Status.TRUNCATED)
            replied = sample.token_ids[sample.sampled]
            text = bytes(int(i) - 8 for i in replied if i >= 8).decode(errors="replace")
            if (replied[:-1] >= 8).all():
                assert sample.reply == text


def test_groups_updates_aborts_and_a_dying_engine(cluster, model_path, make_model):
    recipe = Recipe(
        name="pool",
        model=Model(path=str(model_path), max_context=96),
        rollout=Rollout(engines=2, max_num_seqs=8),
        faults=Faults(engine_restarts=0),
    )
    weights = make_model(1).state_dict()

    async def run() -> None:
        pool = await EnginePool.start(recipe, model_path)
        try:
            first, second, sums, stats = await rollout_and_update(pool, model_path, weights)
            check_samples(first, second)
            assert sums == dict.fromkeys((0, 1), checksums(weights.items()))
            assert [s.version for s in stats] == [3, 3] and all(s.num_generated_tokens for s in stats)

            async def until_gone(index: int) -> None:
                ray.kill(pool._engines[index].actor)
                while index in pool.present:  # it may answer a few times more before it dies
                    await pool.stats()
                    await asyncio.sleep(0.05)

            await until_gone(1)
            assert len(await pool.stats()) == 2 and pool.present == [0]
            assert pool.faults.totals == {"engines_lost": 1}
            with pytest.raises(RunStopped, match="no engine is left: engine 0 of 2 died during stats"):
                await until_gone(0)
        finally:
            pool.close()

    asyncio.run(run())


def test_an_engine_that_does_not_come_up_is_not_waited_for_for_ever(cluster, model_path):
    recipe = Recipe(name="pool", model=Model(path=str(model_path), max_context=96), doctor=Doctor(first_s=0.01))
    with pytest.raises(RunStopped, match=r"engine 0 of 1 did not start within 0\.01 s \(doctor\.first_s\): the Ray"):
        asyncio.run(asyncio.wait_for(EnginePool.start(recipe, model_path), 30))


def test_a_model_that_cannot_be_loaded_is_one_sentence(cluster, model_path):
    (model_path / "model.safetensors").unlink()
    recipe = Recipe(name="pool", model=Model(path=str(model_path), max_context=96))
    with pytest.raises(DataError) as raised:  # ValueError would reach the user as a traceback
        asyncio.run(EnginePool.start(recipe, model_path))
    assert str(model_path) in str(raised.value) and "\n" not in str(raised.value)


def test_engines_that_the_cluster_has_no_room_for_beside_the_learner_are_refused_at_once(cluster, model_path):
    recipe = Recipe(
        name="pool",
        model=Model(path=str(model_path), max_context=96),
        rollout=Rollout(engines=2),
        learner=Learner(ranks=2),
    )
    with pytest.raises(RecipeError, match=r"rollout\.engines 2 .* learner\.ranks 2 .* need 4 CPUs, .* has 3"):
        asyncio.run(EnginePool.start(recipe, model_path))
