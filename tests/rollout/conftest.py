"""A model small enough for milliseconds a step, with every part that generation touches."""

import numpy as np
import pytest
import torch

from model import DeepseekV32, ModelConfig
from rl.config import Sampling
from rollout.engine import Request


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Attention outgrows index_topk after 8 tokens; layers 1 and 2 route to 2 of 8 experts, in 2 of 4 groups."""
    return ModelConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        first_k_dense_replace=1,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


@pytest.fixture
def make_model(tiny_config):
    """Called with a seed; models of one seed are equal."""

    def make(seed: int = 0) -> DeepseekV32:
        torch.manual_seed(seed)
        model = DeepseekV32(tiny_config)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("e_score_correction_bias"):
                    tensor.normal_(std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def make_request():
    """Called with a name; tokens, seed and sampling follow from it unless given."""

    def make(name: str, *, length: int | None = None, seed: int | None = None, stops=(), **sampling) -> Request:
        generator = np.random.default_rng(list(name.encode()))
        length = int(generator.integers(1, 40)) if length is None else length
        return Request(
            id=name,
            token_ids=generator.integers(0, 264, length).astype(np.int32),
            sampling=Sampling(**{"max_tokens": 20, "top_p": 0.9, **sampling}),
            seed=int(generator.integers(2**32)) if seed is None else seed,
            stop_token_ids=tuple(stops),
        )

    return make
