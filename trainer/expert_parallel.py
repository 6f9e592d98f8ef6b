"""Expert parallelism under ZeRO: which ranks share experts, and what DeepSpeed must know about their parameters.

The exchange of tokens is ours (:mod:`model.expert_exchange`), because DeepSpeed's AutoEP replaces the block's forward,
and with it the fp32 router and Keep Routing. DeepSpeed's part is to reduce each expert's gradient over the ranks that
hold that expert only, to partition its state over them, and to count all experts in the gradient's norm; these are the
marks by which its own mixture of experts (stages 1 and 2) and AutoEP (stage 3) ask for that.
"""

from __future__ import annotations

from torch import nn

from model import DeepseekV32
from model.expert_exchange import ExpertExchange
from model.moe import Experts
from rl.errors import RecipeError


def group_name(expert_parallel: int) -> str:
    """DeepSpeed's name for the groups of so many ranks."""
    return f"ep_size_{expert_parallel}"


def share_experts(model: DeepseekV32, expert_parallel: int) -> None:
    """Leaves this rank its experts of every layer, before weights are loaded. All ranks call it.

    ``expert_parallel`` consecutive ranks share the experts. Raises RecipeError when they cannot share them equally.
    """
    from deepspeed.utils import groups

    name = group_name(expert_parallel)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    group = groups._get_expert_parallel_group(name)
    for module in model.modules():
        if isinstance(module, Experts):
            try:
                module.share(ExpertExchange(group, module.num_experts))
            except ValueError as error:
                raise RecipeError(f"learner.expert_parallel is {expert_parallel}, but {error}") from error
            for parameter in module.parameters():
                _mark(parameter, module.exchange, name)


def _mark(parameter: nn.Parameter, exchange: ExpertExchange | None, name: str) -> None:
    from deepspeed.utils import groups

    marks = {
        "expert_exchange": exchange,
        "allreduce": False,
        "group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": name,
        "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(name),
    }
    for key, value in marks.items():
        setattr(parameter, key, value)


def exchange_of(parameter: object) -> ExpertExchange | None:
    """Through which the ranks hold a parameter together; None for one that is not shared out."""
    return getattr(parameter, "expert_exchange", None)


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
