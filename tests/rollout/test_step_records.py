"""What steps recorded, given out by request, against what each token's forward pass said."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest

from rollout.engine_step import Step
from rollout.prefix_rows import PrefixRows
from rollout.step_records import StepRecords

BLOCK, WIDTH, VOCAB = 4, 6, 40


def drawn(tokens: list[int], weights: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([purpose, weights, *tokens])


def row_of(tokens: list[int], weights: int) -> np.ndarray:
    return drawn(tokens, weights, 0).integers(0, 256, WIDTH).astype(np.uint8)


@dataclass
class Sequence:
    """A request as the engine below has it, with what is to be read of it in the end."""

    tokens: list[int]
    wanted: int
    num_prompt: int = 0
    fed: int = 0
    logprobs: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    rows: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt


class ToyEngine:
    """Feeds prompts in chunks, gives a token a step, finds whole blocks of tokens in its cache, gets new weights."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.weights, self.cache, self.running = 0, {}, {}
        self.num_found = 0

    def add(self, name: str, prompt: list[int], wanted: int) -> None:
        self.running[name] = Sequence(list(prompt), wanted)

    def update(self) -> None:
        """Everything is fed again; what was recorded of sampled tokens stays."""
        self.weights += 1
        self.cache = {}
        for sequence in self.running.values():
            sequence.fed = 0
            if not sequence.num_tokens:
                sequence.rows = {}

    def preempt(self, name: str) -> None:
        self.running[name].fed = 0

    def step(self) -> Step:
        names = [name for name in self.running if self.random.random() < 0.8] or list(self.running)[:1]
        starts, counts, sampled, rows = [], [], [], []
        tokens, logprobs, kept = [], [], []
        for name in names:
            it = self.running[name]
            if it.fed == 0:
                it.fed = self._cached(it)
            count = min(len(it.tokens) - it.fed, int(self.random.integers(1, 9)))
            starts.append(it.fed)
            counts.append(count)
            for at in range(it.fed, it.fed + count):
                rows.append(row_of(it.tokens[: at + 1], self.weights))
                it.rows.setdefault(at, rows[-1])
            it.fed += count
            for end in range(BLOCK, it.fed + 1, BLOCK):
                self.cache.setdefault(tuple(it.tokens[:end]), self.weights)
            sampled.append(it.fed == len(it.tokens))
            if sampled[-1]:
                generator = drawn(it.tokens, self.weights, 1)
                it.kept.append(np.sort(generator.choice(VOCAB, int(generator.integers(1, 5)), replace=False)).tolist())
                it.logprobs.append(float(np.float32(-generator.random())))
                it.tokens.append(int(generator.choice(it.kept[-1])))
                tokens.append(it.tokens[-1])
                logprobs.append(it.logprobs[-1])
                kept.append(it.kept[-1])
        return Step(
            names="\n".join(names),
            starts=np.array(starts),
            counts=np.array(counts),
            sampled=np.array(sampled, np.uint8),
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            kept_sizes=np.array(list(map(len, kept)), np.int32),
            **self._scattered(kept),
            rows=np.array(rows),
            block=BLOCK,
            generation=self.weights,
        )

    def _scattered(self, kept: list[list[int]]) -> dict[str, np.ndarray]:
        """The sets in any order, with ids of nobody in between."""
        starts, ids = np.full(len(kept), -1, np.int32), []
        for at in self.random.permutation(len(kept)):
            ids += [VOCAB] * int(self.random.integers(3))
            starts[at] = len(ids)
            ids += kept[at]
        return {"kept_starts": starts, "kept_ids": np.array(ids, np.int32)}

    def _cached(self, it: Sequence) -> int:
        """At least one token is fed, or there would be nothing to sample from."""
        found = 0
        while found + BLOCK < len(it.tokens) and tuple(it.tokens[: found + BLOCK]) in self.cache:
            found += BLOCK
        for at in range(found):
            it.rows.setdefault(at, row_of(it.tokens[: at + 1], self.weights))
        self.num_found += found
        return found


def check(records: StepRecords, name: str, it: Sequence, num_tokens: int) -> None:
    record = asyncio.run(records.take(name, num_tokens, width=WIDTH, timeout_s=1))
    length = it.num_prompt + num_tokens
    assert record.token_ids.tolist() == it.tokens[it.num_prompt : length]
    assert record.logprobs.tolist() == it.logprobs[:num_tokens]
    kept = record.kept
    if not num_tokens:  # its prompt may stand there as weights fed it that are gone
        return
    assert kept is not None
    ends = zip(kept.offsets[:-1], kept.offsets[1:], strict=True)
    assert [kept.ids[a:b].tolist() for a, b in ends] == it.kept[:num_tokens]
    expected = {at: row for at, row in it.rows.items() if at < length - 1}
    assert np.flatnonzero(record.recorded).tolist() == sorted(expected)
    for at, row in expected.items():
        np.testing.assert_array_equal(record.rows[at], row)
    assert not record.rows[~record.recorded].any()


@pytest.mark.parametrize("seed", range(60))
def test_every_request_gets_back_what_its_tokens_recorded(seed: int, monkeypatch: pytest.MonkeyPatch):
    """With shared prompts out of the cache, later turns of a conversation, preemptions, aborts and new weights."""
    if seed % 2:  # runs are cut whenever somebody leaves
        monkeypatch.setattr("rollout.turned_steps._THIN", 1)
    engine, records, random = ToyEngine(seed), StepRecords(1 << 20), np.random.default_rng(seed + 100)
    prompts = [random.integers(0, VOCAB, int(random.integers(2, 30))).tolist() for _ in range(3)]
    prompts.append(prompts[0] + random.integers(0, VOCAB, 9).tolist())
    for number in range(40):
        name = str(number)
        engine.add(name, prompts[int(random.integers(len(prompts)))], int(random.integers(1, 12)))
        records.open(name, np.array(engine.running[name].tokens))
        for _ in range(int(random.integers(1, 5))):
            if engine.running:
                records.add(Step.of_plain(engine.step().to_plain()))
            for done, it in [(n, it) for n, it in engine.running.items() if it.num_tokens >= it.wanted]:
                check(records, done, it, it.num_tokens)
                prompts.append(it.tokens)
                del engine.running[done]
            if not engine.running:
                continue
            some = list(engine.running)[int(random.integers(len(engine.running)))]
            if random.random() < 0.05:
                engine.update()
            if random.random() < 0.1:
                engine.preempt(some)
            if random.random() < 0.05:  # its last tokens come too late
                it = engine.running.pop(some)
                check(records, some, it, max(0, it.num_tokens - 1))
    assert engine.num_found > 40


def test_a_long_request_does_not_keep_what_others_got_beside_it():
    width, num_steps, lasting = 512, 600, 50
    records = StepRecords(cache_tokens=64)
    names = list(map(str, range(32)))
    positions = dict.fromkeys(names, 0)
    begun = {name: -at for at, name in enumerate(names[1:])}

    def step() -> Step:
        ones = np.ones(len(names), np.int64)
        nothing = np.zeros(len(names), np.int32)
        return Step(
            names="\n".join(names),
            starts=np.array([positions[name] for name in names]),
            counts=ones,
            sampled=ones.astype(np.uint8),
            token_ids=nothing,
            logprobs=nothing.astype(np.float32),
            kept_sizes=nothing,
            kept_starts=nothing,
            kept_ids=nothing[:0],
            rows=np.full((len(names), width), len(begun) % 256, np.uint8),
        )

    for name in names:
        records.open(name, np.zeros(1, np.int32))
    tracemalloc.start()
    try:
        for now in range(num_steps):
            records.add(Step.of_plain(step().to_plain()))
            for name in names:
                positions[name] += 1
            for name in [name for name in names[1:] if now - begun[name] >= lasting]:
                records.read(name, positions[name], width=width)
                names[names.index(name)] = new = f"{len(begun) + 1}"
                positions[new], begun[new] = 0, now
                records.open(new, np.zeros(1, np.int32))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    recorded = num_steps * len(names) * width
    assert held < recorded / 3
    assert records.read("0", num_steps, width=width).recorded[:-1].all()


def test_sequences_that_share_most_of_their_tokens_count_once():
    prefixes = PrefixRows(room=10 * BLOCK)
    shared = np.arange(6 * BLOCK)
    for number in range(4):
        sequence = np.concatenate([shared, np.full(BLOCK, 100 + number)])
        prefixes.add(sequence, BLOCK, [(0, np.full((len(sequence), WIDTH), number, np.uint8))])
    for number in range(4):
        found = prefixes.find(np.concatenate([shared, np.full(BLOCK, 100 + number)]), BLOCK, [])
        assert [start for start, _ in found] == list(range(0, 7 * BLOCK, BLOCK))
        assert (found[-1][1] == number).all()


def test_prefixes_that_were_not_used_for_long_are_forgotten():
    prefixes = PrefixRows(room=2 * BLOCK)
    sequences = [np.arange(BLOCK) + 10 * n for n in range(3)]
    rows = [np.full((BLOCK, WIDTH), n, np.uint8) for n in range(3)]
    for number in (0, 1):
        prefixes.add(sequences[number], BLOCK, [(0, rows[number])])
    assert prefixes.find(sequences[0], BLOCK, [])
    prefixes.add(sequences[2], BLOCK, [(0, rows[2])])
    ((start, found),) = prefixes.find(sequences[0], BLOCK, [])
    assert start == 0 and np.array_equal(found, rows[0])
    assert prefixes.find(sequences[1], BLOCK, []) == []
    assert [start for start, _ in prefixes.find(sequences[2], BLOCK, [])] == [0]


def test_what_never_comes_is_not_waited_for():
    records = StepRecords(100)
    records.open("a", np.arange(3))
    with pytest.raises(TimeoutError, match="request a: its tokens came, but not what"):
        asyncio.run(records.take("a", 1, width=0, timeout_s=0.05))
    records.close("a")
    records.open("b", np.arange(3))
    record = asyncio.run(records.take("b", 0, width=0))
    assert len(record.token_ids) == 0 and not record.recorded.any() and len(record.recorded) == 3


def test_a_model_without_experts_records_no_rows():
    """And an engine without kept sets none of those."""
    records = StepRecords(100)
    for name in ("a", "b"):
        records.open(name, np.arange(5))
    for token in range(3):
        step = Step(
            names="a\nb",
            starts=np.zeros(2),
            counts=np.zeros(2),
            sampled=np.array([token > 0, True]),
            token_ids=np.array([10 + token, 20 + token][token == 0 :]),
            logprobs=np.array([-1.0, -2.0][token == 0 :]),
            kept_sizes=None,
            kept_starts=np.zeros(2),
            kept_ids=np.zeros(0),
            rows=np.zeros((0, 0), np.uint8),
        )
        records.add(Step.of_plain(step.to_plain()))
    first = records.read("a", 2, width=0)
    assert first.token_ids.tolist() == [11, 12] and first.logprobs.tolist() == [-1, -1]
    assert first.kept is None and first.rows.shape == (7, 0) and not first.recorded.any()
    assert records.read("b", 3, width=0).token_ids.tolist() == [20, 21, 22]
