"""Models that start from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import load_model
from rl.errors import RecipeError
from rl.initial_model import create_initial_model, initial_config
from tests.rl.tiny_runs import RECIPE

INIT: dict[str, Any] = RECIPE["model"]["init"]


def test_the_model_is_a_function_of_its_config_and_seed(tmp_path: Path):
    config = initial_config(INIT, max_context=40)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        create_initial_model(config, tmp_path / name, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b, c = (load_model(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_tokenizer_and_config_belong_together(tmp_path: Path):
    create_initial_model(initial_config(INIT, max_context=40), tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = theirs.config
    assert config.vocab_size >= len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert config.max_position_embeddings == 40
    text = "2 − 3 = −1 ✓"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_keys_of_the_recipe_win_over_what_is_filled_in():
    config = initial_config({**INIT, "vocab_size": 300, "max_position_embeddings": 64}, max_context=40)
    assert (config.vocab_size, config.max_position_embeddings) == (300, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hiden_size": 64}, r"model\.init has no key 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"hidden_size": -3}, r"model\.init: .*hidden_size"),
        ({"hidden_size": "wide"}, r"model\.init: .*hidden_size"),
        ({"hidden_size": 32.5}, r"model\.init: .*hidden_size"),
        ({"qk_rope_head_dim": 7}, r"model\.init: .*qk_rope_head_dim \(7\) must be even"),
        ({"index_head_dim": 4}, r"model\.init: .*index_head_dim \(4\)"),
        ({"num_experts_per_tok": 9}, r"model\.init: .*num_experts_per_tok \(9\)"),
        ({"n_group": 3}, r"model\.init: .*n_group \(3\) must divide"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"model\.init: .*linear"),
        ({"index_topk": None}, r"model\.init: .*index_topk"),
        ({"vocab_size": 100}, r"model\.init: vocab_size \(100\) is too small for the byte tokenizer"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_no_model_can_be_is_named(changes: dict[str, Any], sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        initial_config({**INIT, **changes}, max_context=40)


@pytest.mark.parametrize(
    ("init", "sentence"),
    [
        ({"model_type": "qwen3", "hiden_size": 64}, r"qwen3 has no key 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, r"model\.init: .*hidden_size"),
        ({"model_type": "qwen4000"}, r"transformers knows no model_type 'qwen4000'"),
        ({"model_type": "qwen3", "vocab_size": 100}, r"model\.init: vocab_size \(100\) is too small"),
        ({"model_type": "gemma2"}, r"model\.init: Gemma2ForCausalLM cannot be run: .*softcap"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_no_model_of_transformers_can_be_is_named(init: dict[str, Any], sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        initial_config(init, max_context=40)


def test_a_key_that_is_missing_is_named():
    with pytest.raises(RecipeError, match=r"model\.init: .*kv_lora_rank"):
        initial_config({key: value for key, value in INIT.items() if key != "kv_lora_rank"}, max_context=40)
