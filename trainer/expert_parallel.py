"""Expert parallelism under ZeRO: which ranks share experts, and what DeepSpeed must know about their parameters.

The exchange of tokens is ours (:mod:`model.expert_exchange`), because DeepSpeed's AutoEP replaces the block's forward,
and with it the fp32 router and Keep Routing. DeepSpeed's part is to reduce each expert's gradient over the ranks that
hold that expert only, to partition its state over them, and to count all experts in the gradient's norm; these are the
marks by which its own mixture of experts (stages 1 and 2) and AutoEP (stage 3) ask for that.
"""

from __future__ import annotations

from torch import nn

from model.expert_exchange import share_experts
from rl.errors import RecipeError


def deal_experts(model: nn.Module, expert_parallel: int) -> None:
    """Leaves this rank its experts of every layer, before weights are loaded. All ranks call it.

    ``expert_parallel`` consecutive ranks share the experts. Raises RecipeError when they cannot share them equally.
    """
    from deepspeed.utils import groups

    name = f"ep_size_{expert_parallel}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    try:
        shared = share_experts(model, groups._get_expert_parallel_group(name))
    except ValueError as error:
        raise RecipeError(f"learner.expert_parallel is {expert_parallel}, but {error}") from error
    if not shared:
        raise RecipeError(f"learner.expert_parallel is {expert_parallel}, but the model has no routed experts")
    marks = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": name,
        "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(name),
    }
    for parameter in shared:
        for key, value in marks.items():
            setattr(parameter, key, value)


def announce(module: nn.Module) -> None:
    """Makes DeepSpeed (stages 1 and 2) treat marked parameters as experts: it looks for a module of its own class."""
    from deepspeed.moe.layer import MoE

    class Announcement(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there already."""

    module.add_module("expert_parallelism", Announcement())
