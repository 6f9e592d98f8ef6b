"""One rank of the learner: a process of its own, driven by :class:`trainer.learner.Learner`.

Almost every method is collective: the driver calls it on all ranks at once.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from model.checksum import Checksums
from model.transport import open_store
from rl.choices import Offload, Placement
from rl.config import Recipe
from rl.durable import FileRecord
from rl.errors import DataError, RecipeError
from rl.sample import NDArray
from trainer.checkpoint_writer import CheckpointWriter
from trainer.deepspeed_engine import DeepSpeedEngine, Sharding, join_ranks, shard_frozen
from trainer.domain_gradients import DomainGradients
from trainer.generators import generator_states, restore_generators
from trainer.loading import load_sharded
from trainer.pack import Minibatch
from trainer.phase import Phase, freeze, optimization, trains_indexer
from trainer.policy import Policy
from trainer.sender import Offer, Sent, WeightSender
from trainer.step import RankStep, Reference, grpo_step, score
from trainer.supervised import supervised_step
from trainer.training_state import SavedState
from trainer.weights import resident_weights, save_whole_model, weight_checksums, whole_weights

LOOPBACK = "127.0.0.1"
GATHER_BYTES = 1 << 30
"""Weights that are whole at the same time when nothing leaves the process."""


class LearnerRank:
    """Holds one rank's engine. Methods take and return plain data, so that it runs under Ray or in a test's process."""

    def __init__(self, recipe: Recipe, *, rank: int, world_size: int, sharding: Sharding | None = None) -> None:
        torch.set_num_threads(recipe.learner.threads)
        torch.manual_seed(recipe.seed + rank)
        self.recipe = recipe
        self.rank = rank
        self.world_size = world_size
        self.sharding = sharding or sharding_of(recipe)
        self.phase = Phase.REINFORCEMENT
        self.reference: Reference | None = None
        self._store: Store | None = None
        self._sender: WeightSender | None = None
        self._writer = CheckpointWriter()
        self._asleep = False
        self._engine: DeepSpeedEngine | None = None

    def open_store(self, host: str) -> int:
        """On rank 0: opens the rendezvous on a free port and returns it."""
        store = open_store(host, self.world_size)
        self._store = store
        return store.port

    def join(self, host: str, port: int, timeout_s: float) -> None:
        """Meets the other ranks; ``timeout_s`` also bounds how long a collective waits for a rank."""
        if host == LOOPBACK:
            # gloo would look for an interface by the host's name, which may resolve to none.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = self._store or TCPStore(host, port, self.world_size, is_master=False)
        timeout = timedelta(seconds=timeout_s)
        self.device = join_ranks(rank=self.rank, world_size=self.world_size, store=store, timeout=timeout)

    def begin(self, phase: Phase, model_dir: Path) -> None:
        """Loads the weights of ``model_dir`` and builds the phase's engine, with a fresh optimizer.

        RL with any KL also loads the reference from there: the policy that RL starts from.
        """
        if self._engine is not None:
            self.wake()
            self.reference = None
            self._engine.close()
            self._engine = None
        self.phase = phase
        torch.set_num_threads(threads_of(self.recipe, phase))
        temperature = self.recipe.sampling.temperature if phase == Phase.REINFORCEMENT else 1.0
        policy = self._policy(model_dir, temperature)
        freeze(policy.model, self.recipe, phase)
        if phase == Phase.REINFORCEMENT and len(self.recipe.domains) > 1:
            hidden_size = policy.model.outline.hidden_size
            policy.domain_gradients = DomainGradients(list(self.recipe.domains), hidden_size, self.device)
        self._engine = DeepSpeedEngine(policy, optimization(self.recipe, phase), self.sharding)
        if phase == Phase.REINFORCEMENT and any(domain.kl_beta != 0 for domain in self.recipe.domains.values()):
            frozen = shard_frozen(self._policy(model_dir, temperature), self.sharding)
            together = self.sharding.zero_stage == 3 or self.sharding.expert_parallel > 1
            self.reference = Reference(frozen, partitioned=together)

    def _policy(self, model_dir: Path, temperature: float) -> Policy:
        try:
            model = load_sharded(model_dir, self.sharding, self.device)
        except RecipeError:
            raise
        except (ValueError, OSError) as error:
            raise DataError(f"the model in {model_dir} cannot be loaded: {error}") from error
        # Ranks may disagree on whether a micro-batch outgrows index_topk, but must gather the same parameters.
        model.always_index = self.sharding.zero_stage == 3
        model.index_arithmetic = "vllm" if self.recipe.rollout.selects_as_vllm else "plain"
        if self.recipe.learner.activation_checkpointing:
            model.recompute_activations()
        return Policy(model, temperature=temperature)

    @property
    def sender(self) -> WeightSender:
        if self._sender is None:
            self._sender = WeightSender(rank=self.rank, device=self.device)
        return self._sender

    @property
    def engine(self) -> DeepSpeedEngine:
        assert self._engine is not None, "begin() comes first"
        return self._engine

    @property
    def policy(self) -> Policy:
        policy = self.engine.module
        assert isinstance(policy, Policy)
        return policy

    def step(self, minibatches: list[Minibatch]) -> list[RankStep]:
        """One GRPO optimizer step for each of this rank's shares, in order."""
        learner = self.recipe.learner
        indexer_weight = learner.indexer_weight if self._with_indexer else None
        return [
            grpo_step(
                self.engine,
                minibatch,
                self.recipe.objective,
                device=self.device,
                reference=self.reference,
                indexer_weight=indexer_weight,
                domain_gradients=self.policy.domain_gradients,
                index_topk=self.policy.model.index_topk,
            )
            for minibatch in minibatches
        ]

    def logprobs(self, minibatch: Minibatch) -> dict[str, NDArray]:
        """float32 [T] of every sample in this rank's share, with the current weights."""
        index_topk = self.policy.model.index_topk
        return score(self.engine, minibatch, self.recipe.objective, device=self.device, index_topk=index_topk)

    def supervised_step(self, minibatch: Minibatch) -> RankStep:
        """One step of the cold start."""
        return supervised_step(self.engine, minibatch, self.phase, device=self.device, with_indexer=self._with_indexer)

    @property
    def _with_indexer(self) -> bool:
        return self.policy.model.has_indexer and trains_indexer(self.recipe, self.phase)

    def sleep(self) -> None:
        """Moves to host memory what only an optimizer step needs, where ``learner.sleep`` asks for it.

        Weights stay on the device, so that they can be sent and saved. Memory that a step has reserved and no longer
        uses goes back to the device, where an engine waits for it.
        """
        if self.recipe.learner.sleep and not self._asleep:
            self.engine.sleep()
            self._asleep = True
        if self.device.type == "cuda" and self.recipe.placement == Placement.shared:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undoes :meth:`sleep`; comes before the next step, checkpoint or phase."""
        if self._asleep:
            self.engine.wake()
            self._asleep = False

    def weight_buckets(self, max_bytes: int) -> tuple[list[Any], Sent]:
        """On rank 0: Ray references to dicts of CPU tensors, and what they amount to. Nothing on the other ranks."""
        refs, sums, num_bytes = [], Checksums(), 0
        for bucket in whole_weights(self.policy.model, max_bytes):
            if self.rank == 0:
                sums.add(bucket)  # before the copies, which wait for it: afterwards the bucket's memory is given up
                refs.append(ray.put({name: tensor.cpu() for name, tensor in bucket.items()}))
                num_bytes += sum(tensor.nbytes for tensor in bucket.values())
        return refs, Sent(num_bytes=num_bytes, checksums=sums.result())

    def open_transfer(self, host: str) -> int:
        """On rank 0: opens the group that engines join for weight updates, and returns its port."""
        return self.sender.open(host)

    def join_transfer(self, host: str, size: int, timeout_s: float) -> None:
        """On rank 0: waits for the engines' workers."""
        self.sender.join(host, size=size, timeout_s=timeout_s)

    def send_weights(self, max_bytes: int) -> Sent | None:
        """Rank 0 broadcasts the weights to the engines; None on the other ranks."""
        model = self.policy.model
        return self.sender.send(whole_weights(model, max_bytes), partial(resident_weights, model))

    def offer_weights(self, max_bytes: int, first: bool) -> Offer | Sent:
        """The next part of the weights, in this rank's GPU memory, for the engine on the same GPU; at last, the sum."""
        model = self.policy.model
        return self.sender.offer(whole_weights(model, max_bytes) if first else None, partial(resident_weights, model))

    def drop_offer(self) -> None:
        """Ends an update out of shared memory that broke off; comes before anything else that reads weights."""
        self.sender.drop_offer()

    def node(self) -> tuple[str, str]:
        """The address of this rank's node, and the GPUs that it has there."""
        return ray.util.get_node_ip_address(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def peak_memory_gb(self) -> float:
        """The most that this rank has had reserved on its GPU so far, in units of 1e9 bytes; 0 without one."""
        return torch.cuda.max_memory_reserved(self.device) / 1e9 if self.device.type == "cuda" else 0.0

    def checksums(self) -> dict[str, int]:
        """Of the tensors that ``weight_buckets`` sends."""
        return weight_checksums(self.policy.model, GATHER_BYTES)

    def save_model(self, path: Path) -> None:
        """Writes the current weights in Hugging Face layout."""
        save_whole_model(self.policy.model, path, writer=self.rank == 0, max_bytes=GATHER_BYTES)
        dist.barrier()

    def copy_checkpoint(self) -> int:
        """Copies everything that the next step depends on to host memory; returns its bytes."""
        self._writer.release()
        tensors, progress = self.engine.copy_state()
        generators, words = generator_states()
        tensors |= {f"generator/{name}/{self.rank}": state for name, state in generators.items()}
        header = {"ranks": self.world_size, "dtype": self._dtype, "generators": words, **progress}
        self._writer.hold(tensors, header)
        return sum(tensor.nbytes for tensor in tensors.values())

    def write_checkpoint(self, directory: Path) -> None:
        """Begins to write the copies to a file of this rank's in ``directory``, beside what else the rank does."""
        self._writer.begin(directory, self.rank)

    def checkpoint_written(self) -> FileRecord | OSError | None:
        """What was written, or why it could not be; None while it is being written."""
        return self._writer.outcome()

    def load_checkpoint(self, directory: Path) -> None:
        """Restores a checkpoint, of any number of ranks, into a phase that has just begun.

        Raises:
            DataError: there is no whole checkpoint in ``directory``.
            RecipeError: it was written with another dtype, or when other parameters were trained.
        """
        with SavedState(directory) as saved:
            dtype = saved.headers[0].get("dtype")
            if dtype != self._dtype:
                raise RecipeError(
                    f"{directory} was written with model.dtype {dtype}, but the recipe says {self._dtype}"
                )
            trained = {name for name, one in self.policy.named_parameters() if one.requires_grad}
            if others := sorted(trained ^ saved.parameters):
                when = "was not" if others[0] in trained else "was"
                raise RecipeError(
                    f"{directory} was written when {others[0]} {when} trained; keep learner.indexer and the model"
                )
            self.engine.restore_state(saved)
            if self.rank < len(saved.headers):
                kinds = ("torch", "cuda") if torch.cuda.is_available() else ("torch",)
                keys = {kind: f"generator/{kind}/{self.rank}" for kind in kinds}
                tensors = {kind: saved.read(key) for kind, key in keys.items() if key in saved}
                restore_generators(tensors, saved.headers[self.rank]["generators"])

    @property
    def _dtype(self) -> str:
        return str(self.sharding.dtype).removeprefix("torch.")


def sharding_of(recipe: Recipe) -> Sharding:
    """How the recipe spreads the training state."""
    dtype = getattr(torch, recipe.model.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError(f"model.dtype is {recipe.model.dtype!r}; the learner trains in float32 or bfloat16")
    learner = recipe.learner
    return Sharding(
        zero_stage=learner.zero_stage,
        dtype=dtype,
        offload_optimizer=learner.offload_optimizer == Offload.cpu,
        offload_parameters=learner.offload_parameters == Offload.cpu,
        expert_parallel=learner.expert_parallel,
    )


def threads_of(recipe: Recipe, phase: Phase) -> int:
    """CPU threads of a rank: the cold start has the cores to itself."""
    return (
        recipe.learner.threads if phase == Phase.REINFORCEMENT else recipe.supervised.threads or recipe.learner.threads
    )
