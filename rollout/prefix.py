"""Prompts that slots of the cache hold already, so that siblings of one prompt compute it once."""

from __future__ import annotations

from rl.sample import NDArray


class PrefixIndex:
    """Maps a prompt to a slot that holds its cache rows, and to the logits after its last token.

    A slot goes on holding its prompt after its sequence has ended, until :meth:`evict`. Everything here was computed
    with one version of the weights: :meth:`clear` when they change.
    """

    def __init__(self, num_slots: int) -> None:
        self._key_of: list[bytes | None] = [None] * num_slots
        self._slots: dict[bytes, list[int]] = {}
        self._logits: dict[bytes, NDArray] = {}

    def slot(self, key: bytes) -> int | None:
        """A slot that holds the prompt, if any does."""
        slots = self._slots.get(key)
        return slots[0] if slots else None

    def logits(self, key: bytes) -> NDArray:
        """float32 [V]: the logits after the prompt's last token."""
        return self._logits[key]

    def hold(self, key: bytes, slot: int, logits: NDArray | None = None) -> None:
        """Notes that `slot` now holds the prompt; the first one to hold it brings the logits."""
        if self._key_of[slot] == key:
            return
        self.evict(slot)
        self._key_of[slot] = key
        self._slots.setdefault(key, []).append(slot)
        if logits is not None:
            self._logits[key] = logits

    def evict(self, slot: int) -> None:
        """Notes that the slot's rows are about to be overwritten."""
        key, self._key_of[slot] = self._key_of[slot], None
        if key is None:
            return
        self._slots[key].remove(slot)
        if not self._slots[key]:
            del self._slots[key], self._logits[key]

    def clear(self) -> None:
        self._key_of = [None] * len(self._key_of)
        self._slots.clear()
        self._logits.clear()
