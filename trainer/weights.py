"""Reading the weights of a model that ranks may hold together, a bounded number of bytes at a time.

Everything here is collective at ZeRO stage 3 and under expert parallelism: all ranks call it together and go through it
to the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from model import LanguageModel, write_checkpoint
from model.checksum import Checksums
from model.expert_exchange import exchange_of
from trainer.deepspeed_engine import full_shape, gathered, is_partitioned


def whole_weights(model: LanguageModel, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """All parameters and persistent buffers by their in-memory names, in ``state_dict`` order, tied ones once.

    Each item holds at most ``max_bytes`` (or a single larger tensor) and is valid until the next one is asked for.
    """
    bucket: dict[str, Tensor] = {}
    room = max_bytes
    for name, tensor in model.named_weights():
        num_bytes = full_shape(tensor).numel() * tensor.element_size()
        if exchange := exchange_of(tensor):
            num_bytes *= exchange.num_ranks
        if bucket and num_bytes > room:
            yield from _whole(bucket)
            bucket, room = {}, max_bytes
        bucket[name] = tensor
        room -= num_bytes
    yield from _whole(bucket)


def _whole(bucket: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    with gathered(bucket.values()):
        tensors = {name: _with_all_experts(tensor) for name, tensor in bucket.items()}
        yield tensors
        tensors.clear()  # whoever still has this would keep it whole beside the next one


def resident_weights(model: LanguageModel) -> dict[str, Tensor] | None:
    """All of :func:`whole_weights` at once, where they lie; None where ranks hold some of them together.

    And where words of 8 bytes do not begin with them: their checksums are taken of copies, which would all be there at
    once.
    """
    weights = dict(model.named_weights())
    if any(is_partitioned(tensor) or exchange_of(tensor) or tensor.data_ptr() % 8 for tensor in weights.values()):
        return None
    return {name: tensor.detach() for name, tensor in weights.items()}


def _with_all_experts(tensor: Tensor) -> Tensor:
    exchange = exchange_of(tensor)
    return tensor.detach() if exchange is None else exchange.gather(tensor.detach())


def weight_checksums(model: LanguageModel, max_bytes: int) -> dict[str, int]:
    """``model.checksums`` of every tensor of :func:`whole_weights`."""
    sums: dict[str, int] = {}
    for bucket in whole_weights(model, max_bytes):
        of_bucket = Checksums()
        of_bucket.add(bucket)
        sums |= of_bucket.result()  # waits: gathered tensors give their memory up at the end of their turn
    return sums


def save_whole_model(model: LanguageModel, path: Path, *, writer: bool, max_bytes: int) -> None:
    """Streams the weights into a Hugging Face directory, written by the one rank that is the ``writer``."""
    buckets = whole_weights(model, max_bytes)
    try:
        if writer:
            write_checkpoint(
                model.config_json(), _checkpoint_tensors(model, buckets), path, dtype=model.lm_head.weight.dtype
            )
    finally:
        # The other ranks go through all buckets; a writer that leaves early would let them wait for ever.
        for _ in buckets:
            pass


def _checkpoint_tensors(model: LanguageModel, buckets: Iterator[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for bucket in buckets:
        for name, tensor in bucket.items():
            yield from model.checkpoint_names(name, tensor)
