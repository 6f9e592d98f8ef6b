"""The byte tokenizer as transformers loads it from disk."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.tokenizer import BYTE_VOCAB_SIZE, SPECIAL_TOKENS, load_tokenizer, save_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    save_byte_tokenizer(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@given(st.text())
def test_any_text_is_its_bytes_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    if not any(token in text for token in SPECIAL_TOKENS):
        assert [index - len(SPECIAL_TOKENS) for index in ids] == list(text.encode())


def test_every_byte_has_an_id_of_its_own(tokenizer):
    assert len(tokenizer) == BYTE_VOCAB_SIZE == 264
    symbols = tokenizer.convert_ids_to_tokens(list(range(264)))
    assert len(set(symbols)) == 264
    # Each code point below 0x80 is one byte; the continuation and lead bytes show in two-byte characters.
    for code in (*range(0x80), *range(0x80, 0x800, 7)):
        expected = np.frombuffer(chr(code).encode(), np.uint8) + np.int64(8)
        assert tokenizer.encode(chr(code), add_special_tokens=False) == expected.tolist()


def test_special_tokens_have_v32_s_strings_and_first_ids(tokenizer):
    text = "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜><｜▁pad▁｜><｜User｜><｜Assistant｜><think></think>｜DSML｜"
    assert tokenizer.encode(text) == list(range(8))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_a_directory_without_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
