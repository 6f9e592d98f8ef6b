"""Loading a model so that no rank ever holds more of it than it keeps, but for one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from model import DeepseekV32, load_config, load_model
from model.shards import Stretch, load_stretches
from trainer.deepspeed_engine import Sharding, full_shape
from trainer.expert_parallel import exchange_of, share_experts


def load_sharded(directory: Path, sharding: Sharding, device: torch.device) -> DeepseekV32:
    """The model in ``directory`` as this rank starts with it; all ranks call it.

    At stage 3 a parameter is partitioned before it has a value; under expert parallelism a rank has its experts only.

    Raises ValueError and OSError as ``model.load_model``, and RecipeError for experts that cannot be shared.
    """
    if sharding.zero_stage < 3 and sharding.expert_parallel == 1:
        return load_model(directory, dtype=sharding.dtype, device=device)
    config = load_config(directory)
    with torch.device("meta"):
        module = DeepseekV32(config).to(sharding.dtype)
    if sharding.expert_parallel > 1:
        share_experts(module, sharding.expert_parallel)
    _materialise(module, sharding, device)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    load_stretches(directory, _stretches(module, tied), num_layers=config.num_hidden_layers, tied=tied)
    return module


def _materialise(module: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Gives parameters and buffers their memory on the device; at stage 3 only that of this rank's partition."""
    from deepspeed.runtime.zero.partition_parameters import Init

    partitioner = None
    if sharding.zero_stage == 3:
        partitioner = Init(config_dict_or_path=sharding.config(), dtype=sharding.dtype)
    made: dict[int, nn.Parameter] = {}  # tied ones once
    for part in module.modules():
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


def _stretches(module: nn.Module, tied: list[str]) -> Iterator[Stretch]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        shape, target, start = full_shape(tensor), tensor.detach(), 0
        if (partition := getattr(tensor, "ds_tensor", None)) is not None:
            start = tensor.ds_zero_partition_rank * partition.numel()  # pyright: ignore[reportAttributeAccessIssue]
            # The last partition is padded, and where there are few elements some are nothing but padding.
            target = partition[: max(0, min(partition.numel(), shape.numel() - start))]
        if exchange := exchange_of(tensor):
            start += exchange.rank * shape.numel()
            shape = torch.Size([exchange.num_experts, *shape[1:]])
        yield Stretch(name=name, shape=tuple(shape), start=start, target=target.view(-1))
