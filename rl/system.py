"""The actors of a run and what connects them: learner ranks, engines, reward workers, and the model directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from model import ModelConfig, empty_model, outline
from model.costs import model_costs
from model.tokenizer import load_tokenizer
from rewards.pool import RewardPool
from rewards.protocol import JUDGED, check_names
from rewards.sandbox import Sandbox
from rl.choices import EngineKind, IndexerTraining, Placement
from rl.cluster import address_for_workers, cluster_hardware, join_cluster, settled
from rl.config import Recipe, Sampling
from rl.environ import chosen_variables
from rl.errors import DataError, RecipeError
from rl.fault_log import FaultLog
from rl.fit import ESTIMATE_SLACK, check_plan
from rl.initial_model import create_initial_model, initial_config
from rl.judge import start_judge
from rl.placement import seats, serves_judge, shared_gpus
from rl.plan import Plan
from rl.sample import NDArray, Prompt, Sample
from rl.sync import Publisher, Sync, transport_for
from rl.timeline import Timeline
from rollout.conversation import Conversation
from rollout.engine import check_window
from rollout.environments.registry import resolve
from rollout.episodes import Episodes
from rollout.pool import EnginePool
from trainer.learner import Learner
from trainer.phase import Phase

RESERVATION_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What samples and their scores come from; enough to evaluate a model."""

    pool: EnginePool
    rewards: RewardPool
    conversation: Conversation
    sampling: Sampling
    episodes: Episodes

    async def generate(self, prompt: Prompt, seeds: Sequence[int]) -> list[Sample]:
        """One sample per seed, with the recipe's sampling: a reply, or an episode where the domain has tools."""
        if prompt.domain in self.episodes:
            return await self.episodes.generate_group(prompt, self.sampling, seeds)
        return await self.pool.generate_group(prompt, encode(self.conversation, prompt), self.sampling, seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class System(Generation):
    """Handles on everything that runs."""

    learner: Learner
    publisher: Publisher
    plan: Plan
    timeline: Timeline
    faults: FaultLog

    async def learners_turn(self) -> None:
        """Before the learner steps: a GPU that it shares with an engine is all its own until weights are published."""
        await self.publisher.hold()
        await self.pool.sleep()
        await self._wake_learner()

    async def publish(self, version: int) -> Sync:
        """The learner's weights into the engines; see :func:`rl.sync.publish`. Ends the learner's turn."""
        with self.timeline.span("learner", "sync", step=version):
            await self.publisher.hold()
            await self.learner.sleep()
            return await self.publisher.publish(version)

    @asynccontextmanager
    async def interruption(self) -> AsyncIterator[None]:
        """The learner's turn amid generation, for what it writes of itself."""
        await self.publisher.hold()
        await self.pool.sleep(keep_weights=True)
        await self._wake_learner()
        yield
        with self.timeline.span("learner", "sleep", written=False):
            await self.learner.sleep()
        await self.pool.wake()
        self.publisher.release()

    async def _wake_learner(self) -> None:
        # Not written, but the first call after a rest is where a rank that hangs is waited for.
        with self.timeline.span("learner", "wake", written=False):
            await self.learner.wake()


def encode(conversation: Conversation, prompt: Prompt) -> NDArray:
    """int32 [P]; a prompt that came encoded is taken as it is. Errors name the prompt."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    try:
        return conversation.encode(prompt.messages, thinking=prompt.thinking, tools=prompt.tools)
    except DataError as error:
        raise DataError(f"prompt {prompt.id}: {error}") from error


def prepare_model(recipe: Recipe, run_path: Path) -> Path:
    """The directory of the starting weights, written first for a model that starts from nothing."""
    if recipe.model.init is None:
        assert recipe.model.path is not None  # load_recipe checked that one of the two is there
        return Path(recipe.model.path)
    path = run_path / "initial_model"
    create_initial_model(initial_config(recipe.model.init, recipe.model.max_context), path, seed=recipe.seed)
    return path


def check_model(recipe: Recipe) -> None:
    """Raises RecipeError when the starting model, or the judge's, cannot be, without loading it."""
    if recipe.judge.path is not None:
        try:
            outline(Path(recipe.judge.path))
            Conversation(load_tokenizer(recipe.judge.path))
        except ValueError as error:
            raise RecipeError(f"judge.path: {error}") from error
    if recipe.judge.init is not None:
        initial_config(recipe.judge.init, recipe.judge.max_context, place="judge.init")
    if recipe.model.init is not None:
        config = initial_config(recipe.model.init, recipe.model.max_context)
        _check_indexer(recipe, has_indexer=isinstance(config, ModelConfig))
        return
    path = Path(recipe.model.path or "")
    try:
        model = empty_model(path)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from error
    _check_indexer(recipe, has_indexer=model.has_indexer)


def _check_indexer(recipe: Recipe, *, has_indexer: bool) -> None:
    wants = {
        "learner.indexer": recipe.learner.indexer == IndexerTraining.kl,
        "supervised.dense_warmup_steps": recipe.supervised.dense_warmup_steps > 0,
    }
    for key, wanted in wants.items():
        if wanted and not has_indexer:
            raise RecipeError(f"{key} trains a lightning indexer, which this model does not have; leave it out")


def open_conversation(recipe: Recipe, prompts: Iterable[Prompt], model_dir: Path) -> Conversation:
    """The model's tokenizer, with every prompt checked against the context window (tools come on top of it)."""
    try:
        conversation = Conversation(load_tokenizer(model_dir))
    except ValueError as error:
        raise DataError(str(error)) from error
    check_lengths(recipe, lengths_of(conversation, prompts))
    return conversation


def lengths_of(conversation: Conversation, prompts: Iterable[Prompt]) -> dict[str, int]:
    """Tokens of each prompt, by its id."""
    return {prompt.id: len(encode(conversation, prompt)) for prompt in prompts}


def check_lengths(recipe: Recipe, lengths: Mapping[str, int]) -> None:
    """Raises DataError, naming the longest, when prompts leave no room for a reply."""
    too_long = {name: length for name, length in lengths.items() if length >= recipe.model.max_context}
    if too_long:
        longest = max(too_long, key=lambda name: too_long[name])
        many = f" ({len(too_long)} of {len(lengths)} prompts are too long, this is the longest)"
        check_window(f"prompt {longest}", too_long[longest], recipe.model.max_context, note=many)


@asynccontextmanager
async def start(
    recipe: Recipe,
    model_dir: Path,
    conversation: Conversation,
    timeline: Timeline | None = None,
    faults: FaultLog | None = None,
    *,
    cold_start: bool = False,
) -> AsyncIterator[System]:
    """Joins the cluster named by the environment, or starts one on this machine, and runs the actors on it.

    With a ``cold_start`` to come, which begins its own phases, the learner has none yet.
    """
    timeline, faults = timeline or Timeline(), faults or FaultLog()
    first_phase = None if cold_start else Phase.REINFORCEMENT
    join_cluster(recipe)
    plan = check_plan(recipe, model_costs(model_dir), await cluster_hardware(), slack=ESTIMATE_SLACK)
    reservation = await reserve(recipe)
    judge = AsyncExitStack()
    learning = asyncio.create_task(Learner.start(recipe, model_dir, phase=first_phase, actor_options=reservation.ranks))
    starting = (
        asyncio.create_task(start_rewards(recipe, judge, faults)),
        learning,
        asyncio.create_task(_start_pool(recipe, model_dir, learning, reservation, timeline, faults, cold_start)),
    )
    try:
        with timeline.span("driver", "start"):
            rewards, learner, pool = await asyncio.gather(*starting)
        async with closing_episodes(recipe, pool, conversation) as episodes:
            yield System(
                learner=learner,
                pool=pool,
                rewards=rewards,
                publisher=Publisher(
                    transport_for(recipe, learner, pool), shared=recipe.placement == Placement.shared, timeline=timeline
                ),
                conversation=conversation,
                sampling=recipe.sampling,
                episodes=episodes,
                plan=plan,
                timeline=timeline,
                faults=faults,
            )
    finally:
        # Whatever was up when one of them failed must not outlive the run.
        await asyncio.gather(*(_close(part) for part in starting))
        await judge.aclose()
        reservation.release()


@asynccontextmanager
async def closing_episodes(recipe: Recipe, pool: EnginePool, conversation: Conversation) -> AsyncIterator[Episodes]:
    """The environments of the recipe's domains, whose processes end with the block."""
    episodes = Episodes(recipe.domains, pool, conversation, sandbox=Sandbox(), env=recipe.reward_env)
    try:
        yield episodes
    finally:
        await episodes.close()


def check_plugins(recipe: Recipe) -> None:
    """Raises RecipeError, naming the domain or the variable, for an environment or a reward that cannot be.

    A user's rewards are imported by their workers alone.
    """
    chosen_variables(recipe.reward_env)
    for name, domain in recipe.domains.items():
        check_names(name, domain)
        for use in domain.rewards:
            if use.use in JUDGED and recipe.judge.url is None and not serves_judge(recipe):
                raise RecipeError(f"domains.{name}: the reward {use.use} needs a judge; set judge.url or judge.path")
        if domain.environment is not None:
            try:
                resolve(domain.environment.use, domain.environment.args)
            except RecipeError as error:
                raise RecipeError(f"domains.{name}.environment: {error}") from error


async def start_rewards(recipe: Recipe, judge: AsyncExitStack, faults: FaultLog | None = None) -> RewardPool:
    """After the judge, whose address rewards are constructed with; ``judge`` is what ends it."""
    address = await judge.enter_async_context(start_judge(recipe, host=address_for_workers(), faults=faults))
    return await RewardPool.start(
        recipe.domains,
        num_workers=recipe.reward_workers,
        judge=address,
        env=recipe.reward_env,
        seed=recipe.seed,
        faults=faults,
        settled=settled,
    )


async def _start_pool(
    recipe: Recipe,
    model_dir: Path,
    learning: asyncio.Task[Learner],
    reservation: Reservation,
    timeline: Timeline,
    faults: FaultLog,
    cold_start: bool,
) -> EnginePool:
    """Beside the learner; after it on shared GPUs, where vLLM measures how much memory is free."""
    start_pool = partial(
        EnginePool.start,
        recipe,
        model_dir,
        actor_options=reservation.engines,
        timeline=timeline,
        faults=faults,
        settled=settled,
    )
    if recipe.placement == Placement.split or recipe.rollout.engine != EngineKind.vllm:
        return await start_pool()
    learner = await asyncio.shield(learning)
    if not cold_start:
        await learner.sleep()
    gpus = shared_gpus(await learner.gpus(), recipe.rollout.tensor_parallel)
    return await start_pool(gpus=gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """GPUs held for this run: how Ray is told where each rank and each engine goes. Empty where it may choose."""

    ranks: Sequence[Mapping[str, Any]] = ()
    engines: Sequence[Mapping[str, Any]] = ()
    group: PlacementGroup | None = None

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


async def reserve(recipe: Recipe) -> Reservation:
    """Reserves what ranks and vLLM engines need, with every engine on one node.

    Raises RecipeError when the cluster does not have it, or does not have it free.
    """
    nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
    plan = seats(recipe, [gpus for gpus in nodes if gpus])
    if plan is None:
        return Reservation()
    group = placement_group([{"GPU": bundle.gpus, "CPU": bundle.cpus} for bundle in plan.bundles], strategy="PACK")
    if not await asyncio.to_thread(group.wait, RESERVATION_S):
        remove_placement_group(group)
        raise RecipeError(
            f"placement: {sum(bundle.gpus for bundle in plan.bundles):g} GPUs and "
            f"{sum(bundle.cpus for bundle in plan.bundles):g} CPUs did not become free within {RESERVATION_S} s; end "
            "what else runs on the Ray cluster, or lower rollout.engines, learner.ranks or their threads"
        )

    def seat(index: int) -> dict[str, Any]:
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}

    return Reservation(
        ranks=[seat(index) for index in plan.rank_seats],
        engines=[seat(index) for index in plan.engine_seats],
        group=group,
    )


async def _close(part: asyncio.Task[Any]) -> None:
    part.cancel()
    (outcome,) = await asyncio.gather(part, return_exceptions=True)
    if not isinstance(outcome, BaseException):
        closing = outcome.close()
        if asyncio.iscoroutine(closing):
            await closing


def seeds_of(run_seed: int, draw: int, size: int) -> list[int]:
    """One seed per sibling, a function of the run's seed and the prompt's place in the stream alone."""
    return np.random.SeedSequence([run_seed, draw]).generate_state(size, np.uint32).tolist()
