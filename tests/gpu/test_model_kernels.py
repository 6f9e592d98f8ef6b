"""A deepseek_v32 model with V3.2's attention dimensions on the GPU: our kernels against the plain-torch path."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.crossover import AttentionForm
from model import CacheView, DeepseekV32, LatentCache, ModelConfig

LENGTHS = [700, 90, 301]


def make_model() -> DeepseekV32:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=256,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_n_heads=32,
        index_head_dim=128,
        index_topk=128,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    )
    return DeepseekV32(config).cuda()


def outcome(module: DeepseekV32, ids: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    module = module.to(dtype)
    module.zero_grad()
    cu_seqlens = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0)
    output = module.backbone(ids, cu_seqlens=cu_seqlens, indexer_loss="sparse")
    assert output.indexer_loss is not None
    direction = torch.randn(output.hidden.shape, generator=torch.Generator().manual_seed(1)).cuda()
    ((output.hidden.float() * direction).sum() + output.indexer_loss).backward()
    weight = module.get_parameter("model.layers.0.self_attn.kv_b_proj.weight")
    index = module.get_parameter("model.layers.0.self_attn.indexer.wq_b.weight")
    assert weight.grad is not None and index.grad is not None
    return [output.hidden.detach().double(), weight.grad.double(), index.grad.double()]


@pytest.mark.parametrize("form", [AttentionForm.MASKED, AttentionForm.SPARSE])
def test_training(form: AttentionForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.attention.attention_form", lambda *args, **kwargs: form)
    ids = torch.randint(512, (1, sum(LENGTHS)), device="cuda")
    found = outcome(make_model(), ids, torch.bfloat16)
    monkeypatch.setitem(kernels._IMPLEMENTATIONS, "cuda", {})
    plain = outcome(make_model(), ids, torch.bfloat16)
    exact = outcome(make_model(), ids, torch.float32)
    for name, ours, torch_s, wanted in zip(("hidden", "kv_b_proj", "wq_b"), found, plain, exact, strict=True):
        error, torch_error = (float((x - wanted).norm() / wanted.norm()) for x in (ours, torch_s))
        print(f"{form.value} {name}: {error:.2e} (torch {torch_error:.2e})")
        assert error <= 2 * torch_error + 1e-3


def test_decode_is_the_forward() -> None:
    """Prefill, then tokens one by one against the cache, in bfloat16: as near as the two forms are to each other."""
    module = make_model().bfloat16()
    ids = torch.randint(512, (2, 260), device="cuda")
    cache = LatentCache(module.config, num_slots=2, max_len=300, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(2, device="cuda")
    with torch.no_grad():
        wanted = module.backbone(ids).hidden.float()
        parts = []
        for start, end in [(0, 250), *((place, place + 1) for place in range(250, 260))]:
            view = CacheView(cache=cache, slots=slots, lengths=torch.full((2,), end, device="cuda"))
            positions = torch.arange(start, end, device="cuda").expand(2, -1)
            parts.append(module.backbone(ids[:, start:end], positions=positions, cache=view).hidden.float())
    error = float((torch.cat(parts, dim=1) - wanted).norm() / wanted.norm())
    print(f"decode against forward: {error:.2e}")
    assert error < 3e-2
