"""Where vLLM keeps the tensors of a deepseek_v32 model, and reading them back from there under our names.

vLLM stacks matrices that read the same input into one parameter. The table below says so a second time, on purpose: it
shares nothing with vLLM's own loader, so what it finds in an engine is evidence about what that loader did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

_FUSED = {
    "q_a_proj": ("fused_qkv_a_proj", ()),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", ("q_a_proj",)),
    "wk": ("wk_weights_proj", ()),
    "weights_proj": ("wk_weights_proj", ("wk",)),
    "gate_proj": ("gate_up_proj", ()),
    "up_proj": ("gate_up_proj", ("gate_proj",)),
}
"""Module -> the module that holds its rows, and the modules whose rows come first there."""

_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
_PADDED = ("embed_tokens", "lm_head")
"""Vocabularies are padded with further rows."""


def read_back(
    live: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of an engine's live tensors, one for each of our in-memory names; ``shapes`` are ours too.

    Raises ValueError, naming the tensor, when the engine has nothing of that name and shape.
    """
    for name, shape in shapes.items():
        tensor = _find(live, name, shapes)
        if tensor is None:
            raise ValueError(f"the engine has no tensor that holds {name}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(shape)}, but the engine holds {tuple(tensor.shape)}")
        yield name, tensor


def _find(live: Mapping[str, torch.Tensor], name: str, shapes: Mapping[str, Sequence[int]]) -> torch.Tensor | None:
    path, _, kind = name.rpartition(".")
    owner, _, module = path.rpartition(".")
    if module == "experts":
        # The module in between has had several names, and more than one at a time.
        held = {
            tensor.data_ptr(): tensor
            for key, tensor in live.items()
            if key.startswith(f"{path}.") and key.endswith(f".{_EXPERTS[kind]}")
        }
        return next(iter(held.values())) if len(held) == 1 else None
    if module in _PADDED and name in live:
        return live[name][: shapes[name][0]]
    if module in _FUSED and name not in live:
        host, before = _FUSED[module]
        fused = live.get(f"{owner}.{host}.{kind}")
        begin = sum(shapes[f"{owner}.{other}.{kind}"][0] for other in before)
        return None if fused is None else fused[begin : begin + shapes[name][0]]
    return live.get(name)


def absorbed(kv_b: torch.Tensor, w_uk_t: torch.Tensor, w_uv: torch.Tensor) -> bool:
    """Whether the matrices that decoding uses in place of kv_b_proj are made of it.

    kv_b [H * (nope + v), latent], w_uk_t [H, nope, latent], w_uv [H, latent, v].
    """
    heads, nope, latent = w_uk_t.shape
    rows = kv_b.view(heads, -1, latent)
    return torch.equal(rows[:, :nope], w_uk_t) and torch.equal(rows[:, nope:].transpose(1, 2), w_uv)
