"""vLLM's layout of a model over the workers of an engine, put together by hand."""

from __future__ import annotations

import math

import torch

Weights = dict[str, torch.Tensor]


class Shapes:
    """Sizes of a model, small and uneven enough to tell axes apart."""

    heads, head_dim, hidden, inner, expert_inner, experts, vocab = 8, 8, 24, 64, 32, 6, 83

    def __init__(self, kv_heads: int = 2) -> None:
        self.kv_heads = kv_heads


def rows_of(tensor: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    step = len(tensor) // parts
    return tensor[index * step : (index + 1) * step]


def columns_of(tensor: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    return rows_of(tensor.T, parts, index).T


def as_vllm(weights: Weights, s: Shapes, rank: int, size: int, *, by_expert: bool) -> Weights:
    """What worker ``rank`` of ``size`` holds, put together by hand."""
    live = {}
    left = dict(weights)
    padded = math.ceil(s.vocab / 64) * 64
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = torch.full((padded, s.hidden), -1.0, dtype=torch.bfloat16)
        table[: s.vocab] = left.pop(name)
        live[name] = rows_of(table, size, rank)
    for name in list(left):
        path, _, kind = name.rpartition(".")
        owner, _, module = path.rpartition(".")
        if module == "q_proj":
            keys, values = left.pop(f"{owner}.k_proj.{kind}"), left.pop(f"{owner}.v_proj.{kind}")
            if size <= s.kv_heads:
                keys, values = rows_of(keys, size, rank), rows_of(values, size, rank)
            else:
                head = rank // (size // s.kv_heads)
                keys, values = rows_of(keys, s.kv_heads, head), rows_of(values, s.kv_heads, head)
            live[f"{owner}.qkv_proj.{kind}"] = torch.cat([rows_of(left.pop(name), size, rank), keys, values])
        elif module == "gate_proj":
            both = [rows_of(left.pop(f"{owner}.{part}_proj.{kind}"), size, rank) for part in ("gate", "up")]
            live[f"{owner}.gate_up_proj.{kind}"] = torch.cat(both)
        elif module == "q_a_proj":
            parts = [left.pop(name), left.pop(f"{owner}.kv_a_proj_with_mqa.{kind}")]
            live[f"{owner}.fused_qkv_a_proj.{kind}"] = torch.cat(parts)
        elif module == "wk":
            parts = [left.pop(name), left.pop(f"{owner}.weights_proj.{kind}")]
            live[f"{owner}.wk_weights_proj.{kind}"] = torch.cat(parts)
        elif module in ("q_b_proj", "kv_b_proj"):
            live[name] = rows_of(left.pop(name), size, rank)
        elif module in ("o_proj", "down_proj"):
            live[name] = columns_of(left.pop(name), size, rank)
        elif kind == "gate_up_proj":
            stack = left.pop(name)
            mine = [e for e in range(s.experts) if not by_expert or e in experts_of(s, rank, size)]
            cut = (1, 0) if by_expert else (size, rank)
            live[f"{path}.routed_experts.w13_weight"] = torch.stack(
                [torch.cat([rows_of(half, *cut) for half in stack[e].chunk(2)]) for e in mine]
            )
            down = left.pop(f"{path}.down_proj")
            live[f"{path}.routed_experts.w2_weight"] = torch.stack([columns_of(down[e], *cut) for e in mine])
    # What is left has a whole copy on every worker; vLLM keeps routers in fp32 where it is told to.
    live |= {name: tensor.float() if ".gate." in name else tensor for name, tensor in left.items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in live.items()}


def experts_of(s: Shapes, rank: int, size: int) -> list[int]:
    """Dealt out in order, the first workers taking what is left over."""
    hands = [[] for _ in range(size)]
    counts = [s.experts // size + (worker < s.experts % size) for worker in range(size)]
    order = iter(range(s.experts))
    for hand, count in zip(hands, counts, strict=True):
        hand += [next(order) for _ in range(count)]
    return hands[rank]
