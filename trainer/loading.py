"""Loading a model so that no rank ever holds more of it than it keeps, but for one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from model import LanguageModel, load_model
from model.expert_exchange import exchange_of
from model.hf import empty_model
from model.shards import Stretch, can_load_stretches, load_stretches
from rl.errors import RecipeError
from trainer.deepspeed_engine import Sharding
from trainer.expert_parallel import deal_experts


def load_sharded(directory: Path, sharding: Sharding, device: torch.device) -> LanguageModel:
    """The model in ``directory`` as this rank starts with it; all ranks call it.

    At stage 3 a parameter is partitioned before it has a value; under expert parallelism a rank has its experts only.
    A checkpoint with other names for its tensors than those of memory or DeepSeek's experts is loaded whole.

    Raises ValueError and OSError as ``model.load_model``, and RecipeError for experts that cannot be shared.
    """
    if sharding.zero_stage < 3 and sharding.expert_parallel == 1:
        return load_model(directory, dtype=sharding.dtype, device=device)
    model = empty_model(directory).to(sharding.dtype)
    if not can_load_stretches(model, directory):
        if sharding.expert_parallel > 1:
            raise RecipeError(
                f"learner.expert_parallel is {sharding.expert_parallel}, but {directory} stores its experts under "
                "names that cannot be loaded in parts; set it to 1"
            )
        return load_model(directory, dtype=sharding.dtype, device=device)
    if sharding.expert_parallel > 1:
        deal_experts(model, sharding.expert_parallel)
    _materialise(model, sharding, device)
    model.fill_constants()
    load_stretches(model, directory, _stretches(model))
    return model


def _materialise(model: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Gives parameters and buffers their memory on the device; at stage 3 only that of this rank's partition."""
    from deepspeed.runtime.zero.partition_parameters import Init

    partitioner = None
    if sharding.zero_stage == 3:
        partitioner = Init(config_dict_or_path=sharding.config(), dtype=sharding.dtype)
    made: dict[int, nn.Parameter] = {}  # tied ones once
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) in made:
                setattr(part, name, made[id(parameter)])
                continue
            whole = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            for key, value in vars(parameter).items():
                setattr(whole, key, value)
            setattr(part, name, whole)
            made[id(parameter)] = whole
            if partitioner is not None:
                # As zero.Init does to every parameter of a new module, but for sending values that are not there yet.
                partitioner._convert_to_deepspeed_param(whole)
                whole.partition()  # pyright: ignore[reportAttributeAccessIssue]
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(buffer, device=device))


def _stretches(model: LanguageModel) -> Iterator[Stretch]:
    for name, tensor in model.named_weights():
        target, start = tensor.detach(), 0
        num_elements = tensor.numel()
        if (partition := getattr(tensor, "ds_tensor", None)) is not None:
            num_elements = tensor.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
            start = tensor.ds_zero_partition_rank * partition.numel()  # pyright: ignore[reportAttributeAccessIssue]
            # The last partition is padded, and where there are few elements some are nothing but padding.
            target = partition[: max(0, min(partition.numel(), num_elements - start))]
        if exchange := exchange_of(tensor):
            start += exchange.rank * num_elements
        yield Stretch(name=name, shape=model.outline.tensors[name].shape, start=start, target=target.view(-1))
