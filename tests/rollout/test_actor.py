"""The actor's event loop, without Ray around it."""

import asyncio

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import checksums, save_model
from rl.errors import DataError
from rollout.actor import EngineActor
from rollout.engine import Finish
from rollout.torch_engine import TorchEngine


@pytest.fixture
def load_actor(make_model, tmp_path):
    save_model(make_model(0), tmp_path / "model")

    async def load(**options: bool) -> EngineActor:
        actor = EngineActor()
        await actor.load(
            str(tmp_path / "model"),
            dtype="float32",
            device="cpu",
            max_num_seqs=4,
            max_context=96,
            threads=torch.get_num_threads(),
            **options,
        )
        return actor

    return load


def test_calls_interleave_and_return_what_the_engine_generates(load_actor, make_model, make_request):
    names = [f"n{number}" for number in range(7)]

    async def run():
        actor = await load_actor()
        calls = [actor.generate([make_request(name), make_request(name + "'")]) for name in names]
        pairs = await asyncio.gather(*calls)
        again = await actor.generate([make_request("n0")])
        return pairs, again[0], await actor.stats()

    pairs, again, stats = asyncio.run(run())
    engine = TorchEngine(make_model(0), max_num_seqs=16, max_context=96)
    expected = engine.generate([make_request(name + mark) for name in names for mark in ("", "'")])
    for number, pair in enumerate(pairs):
        for completion, alone in zip(pair, expected[2 * number : 2 * number + 2], strict=True):
            np.testing.assert_array_equal(completion.token_ids, alone.token_ids)
    np.testing.assert_array_equal(again.token_ids, expected[0].token_ids)
    assert (stats.num_active, stats.num_waiting, stats.num_generated_tokens) == (0, 0, 15 * 20)
    assert stats.tokens_per_s > 0


def test_weights_and_aborts_take_their_turn_between_steps(load_actor, make_model, make_request):
    async def run():
        actor = await load_actor()
        flight = asyncio.ensure_future(
            actor.generate([make_request("kept", length=9, max_tokens=60), make_request("ended", max_tokens=56)])
        )
        while (await actor.stats()).num_generated_tokens < 20:
            await asyncio.sleep(0)
        await actor.stage(make_model(1).state_dict())
        sums = await actor.commit(7)
        assert await actor.abort(["ended", "never heard of"]) == 1
        return await flight, sums

    (kept, ended), sums = asyncio.run(run())
    assert kept.finish == Finish.LENGTH and ended.finish == Finish.ABORT
    assert sorted(set(kept.versions.tolist())) == [0, 7] and np.all(np.diff(kept.versions) >= 0)
    assert sums.keys() == make_model(1).state_dict().keys()


def test_tokens_after_a_sleep_are_those_without_one(load_actor, make_model, make_request):
    """Asleep twice amid replies, with its weights and without them; whoever asks meanwhile waits."""
    requests = [make_request(name, max_tokens=50) for name in "abcde"]  # the last one waits for a place
    weights = make_model(0).state_dict()

    async def tokens_so_far(actor: EngineActor) -> int:
        for _ in range(20):
            await asyncio.sleep(0)
        return (await actor.stats()).num_generated_tokens

    async def run():
        actor = await load_actor(record_selections=True)
        calls = [asyncio.ensure_future(actor.generate(requests))]
        while await tokens_so_far(actor) < 40:
            pass
        await actor.sleep(keep_weights=True)
        before = await tokens_so_far(actor)
        calls.append(asyncio.ensure_future(actor.generate([make_request("late")])))
        assert await tokens_so_far(actor) == before and not any(call.done() for call in calls)
        await actor.wake()
        while (now := await tokens_so_far(actor)) < before + 40:
            pass
        await actor.sleep()
        with pytest.raises(RuntimeError, match=r"gave its weights up .* wakes with the next update"):
            await actor.wake()
        await actor.stage({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
        with pytest.raises(ValueError, match=r"model\.norm\.weight did not come, and the engine gave it up"):
            await actor.commit(1)
        assert await tokens_so_far(actor) < now + 5 * 20 and not any(call.done() for call in calls)
        await actor.stage({"model.norm.weight": weights["model.norm.weight"]})
        sums = await actor.commit(1)
        return [completion for call in calls for completion in await call], sums

    completions, sums = asyncio.run(run())
    assert sums == checksums(weights.items())
    assert set(completions[0].versions.tolist()) == {0, 1}
    engine = TorchEngine(make_model(0), max_num_seqs=16, max_context=96, record_selections=True)
    alone = engine.generate([*requests, make_request("late")])
    for slept, other in zip(completions, alone, strict=True):
        np.testing.assert_array_equal(slept.token_ids, other.token_ids)
        np.testing.assert_array_equal(slept.logprobs, other.logprobs)
        np.testing.assert_array_equal(slept.routes, other.routes)
        assert slept.selections is not None and other.selections is not None
        np.testing.assert_array_equal(slept.selections.rows, other.selections.rows)


def test_a_refused_request_and_a_failing_step_leave_the_engine_usable(load_actor, make_model, make_request):
    poisoned = {"model.norm.weight": torch.full((32,), torch.nan)}
    healthy = {"model.norm.weight": torch.ones(32)}

    async def run():
        actor = await load_actor()
        with pytest.raises(DataError, match="96"):
            await actor.generate([make_request("ok"), make_request("long", length=96)])
        await actor.stage(poisoned)
        await actor.commit(1)
        calls = (actor.generate([make_request(name)]) for name in ("x", "y"))
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(failure) for failure in failures] == [FloatingPointError] * 2
        assert (await actor.stats()).num_active == 0
        await actor.stage(healthy)
        await actor.commit(2)
        return (await actor.generate([make_request("x")]))[0]

    completion = asyncio.run(run())
    (expected,) = TorchEngine(make_model(0), max_num_seqs=4, max_context=96).generate([make_request("x")])
    np.testing.assert_array_equal(completion.token_ids, expected.token_ids)
    assert set(completion.versions.tolist()) == {2}


def test_a_checkpoint_without_a_tensor_is_the_users_to_mend(load_actor, tmp_path):
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(DataError, match=r"tensor model\.norm\.weight is missing"):
        asyncio.run(load_actor())
