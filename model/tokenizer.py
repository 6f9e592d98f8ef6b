"""A byte-level tokenizer in Hugging Face layout for small models: 256 bytes and DeepSeek-V3.2's special tokens.

Every UTF-8 text is its own bytes, so nothing is ever out of vocabulary and a vocabulary of 264 is enough.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN_OF_SENTENCE = "<｜begin▁of▁sentence｜>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

SPECIAL_TOKENS = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD, USER, ASSISTANT, THINK, END_THINK, DSML)
"""In order of their ids, from 0."""

BYTE_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens have the ids 0 to 7, byte b the id 8 + b. No text is added around what is encoded."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {_symbol(byte): len(SPECIAL_TOKENS) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_SENTENCE,
        eos_token=END_OF_SENTENCE,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def save_byte_tokenizer(path: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a directory, which may hold a model already."""
    build_byte_tokenizer().save_pretrained(path)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, without network or code of its own. Raises ValueError when there is none."""
    config = Path(path) / "tokenizer_config.json"
    if not config.is_file():
        raise ValueError(f"{path} has no {config.name}; a model directory needs its tokenizer's files")
    try:
        named = json.loads(config.read_bytes()).get("tokenizer_class")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} cannot be read as JSON: {error}") from error
    if named == PreTrainedTokenizerFast.__name__:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    from transformers import AutoTokenizer  # which imports every part of transformers that makes models: seconds

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _symbol(byte: int) -> str:
    """The printable character that stands for a byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))
