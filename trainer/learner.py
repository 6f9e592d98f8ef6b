"""The driver's handle on the learner: one Ray actor per rank, called together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed
from ray.exceptions import RayActorError, RayTaskError

from model import outline
from rl.config import Recipe
from rl.durable import FileRecord
from rl.errors import LearnerFailed, RecipeError, RunStopped, UserError, first_line
from rl.metrics import Mean, merge
from rl.placement import gpu_shares
from rl.sample import NDArray
from rl.whereabouts import Whereabouts, announce
from trainer.checkpoint_writer import rank_file, read_announcement, remove_announcements
from trainer.pack import ATTENTION_SPAN, Minibatch, span_of
from trainer.phase import Phase
from trainer.rank import LOOPBACK, LearnerRank
from trainer.sender import Offer, Sent
from trainer.step import RankStep
from trainer.supervised import EncodedDemonstration, pack_demonstrations

WRITE_POLL_S = 0.1
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
"""What a rank raises when its GPU or its connection to the others fails it; other errors are bugs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedStep:
    """An optimizer step that changed nothing, because its loss or its gradient was not finite."""

    step: int  # which optimizer step of the phase, counted from 1
    sample_ids: tuple[str, ...]  # of the micro-batches whose loss was not finite; () where only a gradient was not
    num_samples: int  # of the whole step

    @property
    def suspects(self) -> str:
        """Whose loss it was, as a message says it. Which sample a gradient comes from cannot be told."""
        if not self.sample_ids:
            return f"one of its {self.num_samples} samples"
        return f"samples {', '.join(self.sample_ids[:4])}{', ...' if len(self.sample_ids) > 4 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the optimizer steps over one batch did, over all ranks."""

    metrics: dict[str, Mean]
    skipped: tuple[SkippedStep, ...]
    learner_logprobs: Mapping[str, NDArray]
    """By sample: float32 [T], each just before its own optimizer step; without samples of equal names."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What ``forward``, ``backward`` and ``optimizer`` took on a rank, over all of the batch's optimizer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBuckets:
    """The weights on their way to the engines, as Ray references to ``{name: CPU tensor}``."""

    refs: list[Any]
    sent: Sent


class Learner:
    """All ranks of the learner. Methods must not be called while another one is under way."""

    def __init__(self, recipe: Recipe, actors: Sequence[Any], *, timeout_s: float) -> None:
        self.recipe = recipe
        self.timeout_s = timeout_s
        self.num_steps = 0  # optimizer steps of this phase, skipped ones included
        self._actors = list(actors)
        self.processes: list[Whereabouts] = []
        """Of the ranks, in order."""
        self._skipped_in_a_row = 0
        self.attention_span = ATTENTION_SPAN  # of the model, once a phase has begun; see trainer.pack

    @classmethod
    async def start(
        cls,
        recipe: Recipe,
        model_dir: str | Path,
        *,
        phase: Phase | None = Phase.REINFORCEMENT,
        timeout_s: float = 1800.0,
        start_timeout_s: float = 300.0,
        actor_options: Sequence[Mapping[str, Any]] = (),
    ) -> Learner:
        """Starts the ranks and begins a phase from the weights in ``model_dir``; with None, that is left to the caller.

        ``timeout_s`` bounds every later call, and how long a rank waits for the others inside one. ``actor_options``
        say where Ray puts each rank (`rl.placement`); without them it chooses.

        Raises:
            RunStopped: a rank did not start, died or fell silent; names the rank. Later calls raise LearnerFailed.
            UserError: what a rank says about the recipe or the model directory.
        """
        learner = cls(recipe, _actors(recipe, actor_options), timeout_s=timeout_s)
        try:
            # The first call returns when the process is up, which needs its share of the cluster to be free.
            await learner._all("__ray_ready__", timeout_s=start_timeout_s)
            learner.processes = await learner._all("__ray_call__", announce)
            host = await learner._host()
            port = await learner._one(0, "open_store", host)
            await learner._all("join", host, port, timeout_s)
            if phase is not None:
                await learner.begin(phase, model_dir)
        except LearnerFailed as failure:
            learner.close()
            raise RunStopped(str(failure)) from failure  # what cannot even start is not mended by another start
        except BaseException:
            learner.close()
            raise
        return learner

    async def begin(self, phase: Phase, model_dir: str | Path) -> None:
        """Starts a phase from the weights in ``model_dir`` with a fresh optimizer; see :class:`Phase`."""
        self.num_steps = self._skipped_in_a_row = 0
        await self._all("begin", phase, Path(model_dir).absolute())
        self.attention_span = span_of(outline(model_dir).hidden_size)

    async def step(self, minibatches: Sequence[Minibatch]) -> StepResult:
        """One GRPO optimizer step per mini-batch, in order.

        Raises:
            RunStopped: ``max_skipped_steps`` optimizer steps in a row were not finite.
        """
        shares = [([minibatch.share(rank) for minibatch in minibatches],) for rank in range(len(self._actors))]
        return self._result(minibatches, await self._each("step", shares))

    async def logprobs(self, minibatch: Minibatch) -> dict[str, NDArray]:
        """By sample: float32 [T] with the current weights, with what was recorded replayed as in training."""
        ranks = await self._each("logprobs", [(minibatch.share(rank),) for rank in range(len(self._actors))])
        return {name: stream for rank in ranks for name, stream in rank.items()}

    async def supervised_step(self, demonstrations: Sequence[EncodedDemonstration]) -> StepResult:
        """One optimizer step over demonstrations; raises like :meth:`step`."""
        minibatch = pack_demonstrations(
            demonstrations,
            ranks=len(self._actors),
            micro_tokens=self.recipe.learner.micro_tokens,
            attention_span=self.attention_span,
        )
        steps = await self._each("supervised_step", [(minibatch.share(rank),) for rank in range(len(self._actors))])
        return self._result([minibatch], [[step] for step in steps])

    async def weight_buckets(self, max_bytes: int = 256 << 20) -> WeightBuckets:
        """Puts the current weights, by their in-memory names, into Ray's object store, at most ``max_bytes`` each."""
        refs, sent = (await self._all("weight_buckets", max_bytes))[0]
        return WeightBuckets(refs=refs, sent=sent)

    async def open_transfer(self) -> tuple[str, int]:
        """Opens a group that engines can join; returns where rank 0 waits for them."""
        host = await self._host()
        return host, await self._one(0, "open_transfer", host)

    async def join_transfer(self, host: str, *, size: int, timeout_s: float) -> None:
        """Returns when all ``size`` processes are in the group that :meth:`open_transfer` opened."""
        await self._one(0, "join_transfer", host, size, timeout_s)

    async def send_weights(self, max_bytes: int = 512 << 20) -> Sent:
        """Broadcasts the current weights to the engines that joined, at most ``max_bytes`` whole at a time."""
        return (await self._all("send_weights", max_bytes))[0]

    async def offer_weights(self, *, first: bool, max_bytes: int = 512 << 20) -> Offer | Sent:
        """The next part of the current weights in the memory of every rank's GPU; at last, what they amounted to.

        An offer stands until the call after the next one, or until the update has ended, as it says.
        """
        offers = await self._all("offer_weights", max_bytes, first)
        return offers[0] if isinstance(offers[0], Sent) else Offer.joined(offers)

    async def drop_offer(self) -> None:
        """After an update by :meth:`offer_weights` that broke off."""
        await self._all("drop_offer")

    async def gpus(self) -> list[str]:
        """What each rank sees as CUDA_VISIBLE_DEVICES."""
        return [gpus for _, gpus in await self._all("node")]

    async def sleep(self) -> None:
        """Leaves its GPUs to the engines that share them; optimizer state too where ``learner.sleep`` says so."""
        await self._all("sleep")

    async def wake(self) -> None:
        """Undoes :meth:`sleep`, which a step, a checkpoint and a phase need."""
        await self._all("wake")

    async def peak_memory_gb(self) -> float:
        """The most that any rank has had reserved on its GPU so far, in units of 1e9 bytes."""
        return max(await self._all("peak_memory_gb"))

    async def _host(self) -> str:
        """Where rank 0 can be reached."""
        return LOOPBACK if _one_node() else (await self._one(0, "node"))[0]

    async def checksums(self) -> dict[str, int]:
        """``model.checksums`` of the tensors that :meth:`weight_buckets` sends."""
        return (await self._all("checksums"))[0]

    async def save_model(self, path: str | Path) -> None:
        """Writes the current weights in Hugging Face layout. Raises RunStopped when they cannot be written."""
        path = Path(path).absolute()
        try:
            await self._all("save_model", path)
        except UserError:
            raise
        except RuntimeError as error:
            raise RunStopped(f"{path} could not be written: {error}") from error

    async def copy_checkpoint(self) -> int:
        """Copies what a later run needs to go on exactly from here to the ranks' host memory; returns its bytes."""
        return sum(await self._all("copy_checkpoint"))

    async def write_checkpoint(self, directory: str | Path) -> None:
        """Begins to write the copies; the ranks go on with whatever they are called for next."""
        await self._all("write_checkpoint", Path(directory).absolute())

    async def checkpoint_written(self, directory: str | Path) -> dict[str, FileRecord]:
        """Waits until what :meth:`write_checkpoint` began is on the disk; by the files' names. Other calls may be under
        way.

        Raises OSError when a rank could not write, for a full disk for example, and LearnerFailed when the learner is
        closed before that.
        """
        folder, asking = Path(directory), asyncio.create_task(self._ask_for_writing())
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # announcements may come first
        ranks = range(len(self._actors))
        try:
            while not asking.done():
                announced = {rank_file(rank): read_announcement(folder, rank) for rank in ranks}
                written = {name: record for name, record in announced.items() if record is not None}
                if len(written) == len(announced):
                    break
                await asyncio.wait({asking}, timeout=WRITE_POLL_S)
            else:
                written = asking.result()
        finally:
            asking.cancel()
        remove_announcements(folder)
        return written

    async def _ask_for_writing(self) -> dict[str, FileRecord]:
        """The same from the ranks themselves, who answer between two steps; they know why a file was not written."""
        while self._actors:
            outcomes = await self._all("checkpoint_written")
            if all(outcomes):  # nobody writes any more, so that the folder can be removed
                for outcome in outcomes:
                    if isinstance(outcome, OSError):
                        raise outcome
                return {rank_file(rank): outcome for rank, outcome in enumerate(outcomes)}
            await asyncio.sleep(WRITE_POLL_S)
        raise LearnerFailed("the learner was closed while it wrote a checkpoint")

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Goes on from what any number of ranks wrote; comes right after :meth:`start` or :meth:`begin`."""
        await self._all("load_checkpoint", Path(directory).absolute())

    def state_dict(self) -> dict[str, int]:
        """What the handle itself counts; the ranks' state is in their own files."""
        return {"num_steps": self.num_steps, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_steps, self._skipped_in_a_row = state["num_steps"], state["skipped_in_a_row"]

    def end(self, processes: Sequence[Whereabouts]) -> None:
        """Ends those ranks through Ray, which does not need their hosts to answer: what they are asked for fails."""
        for actor, process in zip(self._actors, self.processes, strict=False):  # none once it is closed
            if process in processes:
                ray.kill(actor)

    def close(self) -> None:
        """Ends the ranks' processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _result(self, minibatches: Sequence[Minibatch], ranks: Sequence[Sequence[RankStep]]) -> StepResult:
        """Puts together ``ranks[r][m]``, what rank r did with its share of mini-batch m."""
        tallies: list[Mapping[str, Mean]] = []
        skipped: list[SkippedStep] = []
        logprobs: dict[str, NDArray] = {}
        for minibatch, *steps in zip(minibatches, *ranks, strict=True):
            self.num_steps += 1
            if steps[0].outcome.applied:
                self._skipped_in_a_row = 0
                tallies += [*(step.metrics for step in steps), _step_metrics(steps)]
                logprobs |= {name: stream for step in steps for name, stream in step.learner_logprobs.items()}
            else:
                # What was measured may be as broken as the loss, so it stays out of the metrics.
                skipped.append(self._skip(minibatch, steps))
        # Two groups of one prompt share their samples' names: whose stream it is cannot be told then.
        holders = Counter(name for minibatch in minibatches for name in minibatch.sample_ids)
        logprobs = {name: stream for name, stream in logprobs.items() if holders[name] == 1}
        counts = {
            "tokens/trained": Mean(sum(minibatch.num_tokens for minibatch in minibatches), 1),
            "learn/skipped": Mean(len(skipped), 1),
        }
        return StepResult(
            metrics=merge(tallies) | counts,
            skipped=tuple(skipped),
            learner_logprobs=logprobs,
            seconds=_mean_seconds(ranks),
        )

    def _skip(self, minibatch: Minibatch, steps: Sequence[RankStep]) -> SkippedStep:
        suspects = [name for step in steps for name in step.suspects]
        skip = SkippedStep(step=self.num_steps, sample_ids=tuple(suspects), num_samples=minibatch.num_samples)
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.recipe.learner.max_skipped_steps:
            raise RunStopped(
                f"optimizer step {skip.step}: the loss or its gradient was not finite, for the "
                f"{self._skipped_in_a_row}. step in a row (learner.max_skipped_steps); {skip.suspects}"
            )
        return skip

    async def _one(self, rank: int, method: str, *args: Any) -> Any:
        (result,) = await self._gather(method, {rank: args}, self.timeout_s)
        return result

    async def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        return await self._gather(method, dict.fromkeys(range(len(self._actors)), args), timeout_s or self.timeout_s)

    async def _each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return await self._gather(method, dict(enumerate(args)), self.timeout_s)

    async def _gather(self, method: str, args: Mapping[int, tuple[Any, ...]], timeout_s: float) -> list[Any]:
        """Calls ranks together and returns their results in order; raises what went wrong first of all."""
        calls = {
            rank: asyncio.wrap_future(getattr(self._actors[rank], method).remote(*arguments).future())
            for rank, arguments in args.items()
        }
        for call in calls.values():
            # A run that ends for another reason stops waiting, and a failure that nobody waits for is no news then.
            call.add_done_callback(lambda call: call.cancelled() or call.exception())
        done, pending = await asyncio.wait(calls.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if any(call.exception() for call in done):
            # A rank that loses its peer fails too: give the one that began it the time to say so.
            await asyncio.wait(calls.values(), timeout=15.0)
            _raise_cause(method, {rank: call.exception() for rank, call in calls.items() if call.done()})
        if pending:
            silent = ", ".join(str(rank) for rank, call in calls.items() if call in pending)
            raise LearnerFailed(f"learner rank {silent} did not finish {method.strip('_')} within {timeout_s:.0f} s")
        return [call.result() for call in calls.values()]


def _raise_cause(method: str, errors: Mapping[int, BaseException | None]) -> None:
    """A user's mistake before a death, and a death before the failures that follow from it."""
    failed = {rank: error for rank, error in errors.items() if error is not None}
    for error in failed.values():
        if isinstance(error, UserError):
            raise (error.cause if isinstance(error, RayTaskError) else error) from None
    for rank, error in failed.items():
        if isinstance(error, RayActorError):
            raise LearnerFailed(f"learner rank {rank} died during {method}: {_first_line(error)}") from error
    rank, error = next(iter(failed.items()))
    if isinstance(error, RayTaskError) and _comes_from_outside(error.cause):
        raise LearnerFailed(f"learner rank {rank} failed in {method}: {_first_line(error)}") from error
    raise RuntimeError(f"learner rank {rank} failed in {method}: {_first_line(error)}") from error


def _comes_from_outside(cause: BaseException) -> bool:
    """Whether a device or another rank failed this one; on CPUs gloo says so by a plain RuntimeError."""
    return isinstance(cause, DEVICE_ERRORS) or (isinstance(cause, RuntimeError) and "gloo" in str(cause))


def _first_line(error: BaseException) -> str:
    return first_line(error.cause if isinstance(error, RayTaskError) else error)


def _mean_seconds(ranks: Sequence[Sequence[RankStep]]) -> dict[str, float]:
    """Of each part: over all optimizer steps, the mean over the ranks."""
    seconds: dict[str, float] = {}
    for step in (step for rank in ranks for step in rank):
        for part, spent in step.seconds.items():
            seconds[part] = seconds.get(part, 0.0) + spent / len(ranks)
    return seconds


def _step_metrics(steps: Sequence[RankStep]) -> dict[str, Mean]:
    """What an optimizer step has once, not once a rank."""
    outcome = steps[0].outcome
    return {
        "loss/total": Mean(sum(step.loss for step in steps), 1),
        "grad_norm": Mean(outcome.grad_norm, 1),
        "lr": Mean(outcome.lr, 1),
    }


def _actors(recipe: Recipe, options: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One actor per rank, each with its own CPUs and, where the cluster has GPUs, its GPU or its share of one."""
    ranks, threads = recipe.learner.ranks, recipe.learner.threads
    room = ray.cluster_resources().get("CPU", 0)
    if ranks * threads > room:
        raise RecipeError(
            f"learner.ranks {ranks} with learner.threads {threads} need {ranks * threads} CPUs, "
            f"but the Ray cluster has {room:.0f}"
        )
    shares = gpu_shares(recipe, ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(LearnerRank)
    return [
        actor.options(num_cpus=threads, num_gpus=shares.rank, **(options[rank] if options else {})).remote(
            recipe, rank=rank, world_size=ranks
        )
        for rank in range(ranks)
    ]


def _one_node() -> bool:
    return sum(node["Alive"] for node in ray.nodes()) == 1
