"""DeepSpeed as the learner uses it: loss in, one verified optimizer step out, the same at every ZeRO stage.

deepspeed is imported where it is used, not with this module: the driver imports the learner's handle without paying for
it, and ``DS_ACCELERATOR`` must be in the environment before the first import.
"""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from model.expert_exchange import exchange_of
from rl.errors import RecipeError
from trainer.expert_parallel import announce
from trainer.parking import Parking
from trainer.stopwatch import Stopwatch
from trainer.training_state import SavedState, copy_state, num_updates, pieces, restore_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """How the parameters that require gradients are trained."""

    lr: float
    warmup_steps: int = 0
    decay_steps: int | None = None  # the step from which on the rate is 0; None keeps it
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # largest global norm; 0 never clips

    def lr_at(self, applied_steps: int) -> float:
        """Linear warm-up: the first step already moves, and step ``warmup_steps`` is the first at full rate.

        Then a constant rate, or one that falls linearly and would be 0 at step ``decay_steps``, counted from 0.
        """
        rise = min(1.0, (applied_steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = 1.0 if self.decay_steps is None else max(0.0, 1.0 - applied_steps / self.decay_steps)
        return self.lr * min(rise, fall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """What of the training state is spread over the ranks (ZeRO stage 0 to 3), and in which dtype weights are kept."""

    zero_stage: int = 2
    dtype: torch.dtype = torch.float32
    bucket_elements: int = 50_000_000
    persistence_elements: int = 100_000
    """Parameters smaller than this stay whole on every rank at stage 3."""
    offload_optimizer: bool = False
    """fp32 weights and optimizer state live in host memory, and the optimizer runs there."""
    offload_parameters: bool = False
    """Parameters live in host memory outside their own layer's computation (stage 3)."""
    expert_parallel: int = 1
    """Consecutive ranks that share the routed experts of a layer."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise RecipeError(f"learner.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise RecipeError(f"model.dtype is {self.dtype}; the learner trains in float32 or bfloat16")
        if self.zero_stage == 0 and self.dtype == torch.bfloat16:
            # DeepSpeed has no fp32 gradient accumulation there, and bf16 accumulation loses small gradients.
            raise RecipeError("learner.zero_stage 0 trains float32 only; use stage 1, 2 or 3 with model.dtype bfloat16")

    def config(self, *, grad_clip: float = 0.0, optimizes: bool = True) -> dict[str, Any]:
        """The DeepSpeed config, of a module that is trained or (``optimizes`` False) only run."""
        config: dict[str, Any] = {
            # Micro-batches are ours, so DeepSpeed's own counts are placeholders; step() is the only boundary.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": grad_clip,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": False,
                # Would replace torch.nn.functional.linear for the whole process, with other bf16 rounding.
                "memory_efficient_linear": False,
                "reduce_bucket_size": self.bucket_elements,
                "stage3_prefetch_bucket_size": self.bucket_elements,
                "stage3_param_persistence_threshold": self.persistence_elements,
            },
            "log_level": "error",
        }
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.offload_optimizer and optimizes:
            config["zero_optimization"]["offload_optimizer"] = host
            # Torch's fused AdamW runs on a CPU as it comes; DeepSpeed's own would be compiled at first use.
            config["zero_force_ds_cpu_optimizer"] = False
        if self.offload_parameters:
            config["zero_optimization"]["offload_param"] = host
        if self.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = "fp32"
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank."""

    applied: bool  # False: a gradient was not finite, and nothing changed
    grad_norm: float  # global, before clipping; nan when not applied
    lr: float


def join_ranks(*, rank: int, world_size: int, store: Store, timeout: timedelta) -> torch.device:
    """Enters the process group of the learner (nccl with a GPU, gloo without) and returns this rank's device."""
    gpu = torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    # A Ray actor sees its own GPU only, so that one is always the first.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_SIZE="1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    backend = "nccl" if gpu else "gloo"
    device_id = device if gpu else None
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, store=store, timeout=timeout, device_id=device_id
    )
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("error")
    # Would build a shared-memory collective with g++ at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    _import_muon()
    return device


def _import_muon() -> None:
    """What DeepSpeed imports of it at the latest with the first optimizer, and what nobody here trains with.

    A function in it is compiled when it is imported, which takes two seconds to import the compiler's back end.
    """
    setting = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(setting)
    os.environ[setting] = "1"
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        del os.environ[setting]
        if before is not None:
            os.environ[setting] = before


class DeepSpeedEngine:
    """Trains ``module``. Call it for a forward pass; every forward is followed by its own ``backward``.

    Ranks must make the same calls in the same order, equally many micro-batches included.
    """

    def __init__(self, module: nn.Module, optimization: Optimization, sharding: Sharding) -> None:
        import deepspeed

        self.module = module
        self.optimization = optimization
        self.sharding = sharding
        self.applied_steps = 0
        self._stage0_norm = math.nan
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, optimization.weight_decay),
            lr=optimization.lr,
            betas=optimization.betas,
            fused=torch.cuda.is_available() or sharding.offload_optimizer,
        )
        if sharding.expert_parallel > 1 and sharding.zero_stage < 3:
            announce(module)
        # DeepSpeed clips at stage 0 without telling the norm, so there the optimizer's own hook does both.
        if sharding.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip_at_stage0)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=sharding.config(grad_clip=optimization.grad_clip if sharding.zero_stage else 0.0),
        )
        # From here on our experts are saved like all other parameters, each rank's shard of the optimizer its own.
        engine.has_moe_layers = False
        self._engine: Any = engine
        self._parking = Parking()
        self._watch = Stopwatch()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch("forward"):
            return self._engine(*args, **kwargs)

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass that nothing is learned from and no backward follows."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> bool:
        """Accumulates the gradient of this rank's part of a loss whose parts add up over ranks and micro-batches.

        Returns whether the loss is finite. One that is not gets NaN gradients, so that all ranks reject the step.
        """
        finite = bool(torch.isfinite(loss))
        # DeepSpeed averages gradients over the ranks; the loss is a sum.
        scale = dist.get_world_size() if finite else math.nan
        with self._watch("backward"):
            self._engine.backward(loss * scale, scale_wrt_gas=False)
        return finite

    def step(self) -> StepOutcome:
        """Clips, updates the weights and clears the gradients; leaves the weights alone if a gradient is not finite."""
        lr = self.optimization.lr_at(self.applied_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self.sharding.zero_stage == 0 and not self._finite_at_stage0():
            self._engine.zero_grad()
            return StepOutcome(applied=False, grad_norm=math.nan, lr=lr)
        with self._watch("optimizer"):
            self._engine.step()
        if not self._engine.was_step_applied():
            return StepOutcome(applied=False, grad_norm=math.nan, lr=lr)
        self.applied_steps += 1
        norm = self._stage0_norm if self.sharding.zero_stage == 0 else float(self._engine.get_global_grad_norm())
        return StepOutcome(applied=True, grad_norm=norm, lr=lr)

    def seconds(self) -> dict[str, float]:
        """What ``forward``, ``backward`` and ``optimizer`` took on this rank since the last call.

        Waiting for other ranks is part of it; forward passes of the reference are not.
        """
        return self._watch.lap()

    def _finite_at_stage0(self) -> bool:
        """Stages 1 to 3 look for themselves; stage 0 would apply NaN."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all().float()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _clip_at_stage0(self, *_: Any) -> None:
        bound = self.optimization.grad_clip or math.inf
        self._stage0_norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), bound))

    def copy_state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Copies in host memory of what this rank alone holds of weights and optimizer state, and how far they are."""
        optimizer = self._engine.optimizer
        held = list(pieces(self.module, optimizer, self.sharding.zero_stage))
        count = num_updates(held, optimizer)
        if self.sharding.zero_stage == 0:  # every rank holds everything
            held = held[dist.get_rank() :: dist.get_world_size()]
        return copy_state(held, optimizer), {"applied_steps": self.applied_steps, "num_updates": count}

    def restore_state(self, saved: SavedState) -> None:
        """Goes on from what :meth:`copy_state` gave on any number of ranks. All ranks call it, on a fresh engine."""
        optimizer, stage = self._engine.optimizer, self.sharding.zero_stage
        if stage == 3:
            optimizer.checkpoint_event_prologue()  # small parameters are whole between steps
        held = pieces(self.module, optimizer, stage)
        restore_state(held, optimizer, saved, max(header["num_updates"] for header in saved.headers))
        self.applied_steps = int(saved.headers[0]["applied_steps"])
        if stage in (1, 2):
            optimizer.update_lp_params()
        elif stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def sleep(self) -> None:
        """Moves fp32 weights, optimizer state and gradient buffers to host memory; the module stays where it is.

        Comes between two steps. Needs ZeRO, with the optimizer on the device.
        """
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        pinned = torch.cuda.is_available()
        if self.sharding.zero_stage == 3:
            # There DeepSpeed moves the state of its own, compiled optimizer only.
            buffers = [State.lp_grads, State.contiguous_grad_buffer]
            self._engine.offload_states(include=buffers, pin_memory=pinned)
            self._parking.park(_optimizer_tensors(self._engine.optimizer.optimizer))
        else:
            states = [State.optim_states, State.hp_params, State.lp_grads]
            self._engine.offload_states(include=states, pin_memory=pinned)
        if pinned:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undoes :meth:`sleep`."""
        self._parking.unpark()
        self._engine.reload_states()

    def close(self) -> None:
        """Releases the optimizer state and DeepSpeed's hooks; the module is not usable afterwards.

        At stage 3 this process runs nothing else that DeepSpeed has partitioned.
        """
        self._engine.destroy()
        del self._engine
        if self.sharding.zero_stage == 3:
            _forget_modules()
        gc.collect()


def _forget_modules() -> None:
    """Empties what stage 3 keeps of modules for the process's life, and with them of all that their hooks know of."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    FWD_MODULE_STACK.clear()
    remembered = Coordinator._PartitionedParameterCoordinator__params_to_release  # pyright: ignore[reportAttributeAccessIssue]
    for cell in remembered.__closure__:  # DeepSpeed's decorator around functools.lru_cache
        getattr(cell.cell_contents, "cache_clear", lambda: None)()


def shard_frozen(module: nn.Module, sharding: Sharding) -> Callable[..., Any]:
    """A module that is only run, never trained: partitioned over the ranks at stage 3, whole otherwise."""
    module.requires_grad_(False)
    if sharding.zero_stage < 3:
        return module.to(sharding.dtype)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=sharding.config(optimizes=False))
    return engine


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of which every rank has a part."""
    return hasattr(tensor, "ds_id")


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Makes partitioned parameters whole within the context; the ranks enter it together, with the same parameters.

    Ends when what the current stream was asked to do with them is done.
    """
    partitioned = list(filter(is_partitioned, tensors))
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        try:
            yield
        finally:
            if (device := partitioned[0].device).type == "cuda":
                # They give their memory up on a stream of their own, which does not wait for this one.
                torch.cuda.current_stream(device).synchronize()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """fp32 weights and their moments, in a fixed order."""
    for weight, state in optimizer.state.items():
        yield weight
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole parameter, also while it is partitioned."""
    return getattr(tensor, "ds_shape", tensor.shape)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay shrinks matrices; norms and biases keep their scale. Shared-out experts are apart, as ZeRO asks."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    everywhere = [parameter for parameter in trained if exchange_of(parameter) is None]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in everywhere if len(full_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in everywhere if len(full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    shared = [parameter for parameter in trained if exchange_of(parameter) is not None]
    if shared:
        name = getattr(shared[0], "group_name")  # noqa: B009
        groups.append({"params": shared, "weight_decay": weight_decay, "moe": True, "name": name})
    return [group for group in groups if group["params"]]
