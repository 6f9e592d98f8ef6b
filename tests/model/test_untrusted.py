"""Model directories that would like to run code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from model import load_model
from model.tokenizer import load_tokenizer, save_byte_tokenizer


class Touches:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pickled_weights_are_refused_unread(directory: Path, tmp_path: Path):
    weights = directory / "model.safetensors"
    torch.save({"weight": torch.zeros(1), "more": Touches(tmp_path / "ran")}, directory / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(directory, dtype=torch.float32, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(directory: Path, tmp_path: Path):
    save_byte_tokenizer(directory)
    (directory / "theirs.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nConfig = Model = Tokens = None\n"
    )
    for name, changes in {
        "config.json": {"auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["theirs.Tokens", None]}, "tokenizer_class": "Tokens"},
    }.items():
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    load_model(directory, dtype=torch.float32, device="cpu")  # transformers knows the architecture without them
    load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()


def test_an_architecture_that_is_code_is_refused(directory: Path, tmp_path: Path):
    (directory / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nConfig = Model = None\n")
    path = directory / "config.json"
    own = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(directory, dtype=torch.float32, device="cpu")
    assert not (tmp_path / "ran").exists()
