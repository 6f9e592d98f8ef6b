"""vLLM's outputs as completions, from stand-ins with the fields that vLLM documents."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kernels.reference import selection_bitmask
from model import DeepseekV32
from rl.errors import DataError, RunStopped
from rl.sample import Kept, Prompt
from rollout.engine import Finish, Request
from rollout.samples import to_sample
from rollout.step_records import Record
from rollout.vllm_requests import Recording, check_request, sampling_arguments, to_completion


@pytest.fixture
def recording(tiny_config) -> Recording:
    return Recording.of(DeepseekV32(tiny_config).outline, kept=True, max_context=96)


@pytest.fixture
def request_of_5(make_request) -> Request:
    return make_request("five", length=5, max_tokens=7, top_p=0.9, stops=(1,))


def span(version: str, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(version=version, start=start, end=end)


def output_of(token_ids: list[int], **changes: Any) -> SimpleNamespace:
    """What vLLM returns of a request."""
    fields = {"token_ids": token_ids, "weight_versions": [span("4", 0, len(token_ids))], "finish_reason": "length"}
    return SimpleNamespace(**{**fields, **changes})


def record_of(tokens: list[int], **changes: Any) -> Record:
    """After a prompt of 5 a row for every token but the last: 2 experts of 3 layers."""
    length = 5 + len(tokens)
    rows = np.arange(length * 3 * 2, dtype=np.uint8).reshape(length, 6) % 8
    sets = [sorted({0, token, 200 + t}) for t, token in enumerate(tokens)]
    fields = {
        "token_ids": np.array(tokens, np.int32),
        "logprobs": np.array([-0.5 - t for t in range(len(tokens))], np.float32),
        "kept": Kept(ids=np.array([i for ids in sets for i in ids], np.int32), offsets=np.cumsum([0, *map(len, sets)])),
        "rows": rows,
        "recorded": np.arange(length) < length - 1,
    }
    return Record(**{**fields, **changes})


def test_every_stream_is_aligned_with_the_tokens(recording, request_of_5):
    output = output_of([9, 8, 7, 1], weight_versions=[span("4", 0, 3), span("6", 3, 4)], finish_reason="stop")
    record = record_of([9, 8, 7, 1])
    completion = to_completion(output, record, request_of_5, recording)
    assert completion.token_ids.tolist() == [9, 8, 7, 1] and completion.token_ids.dtype == np.int32
    assert completion.logprobs.tolist() == [-0.5, -1.5, -2.5, -3.5]
    assert completion.versions.tolist() == [4, 4, 4, 6]
    assert completion.finish == Finish.STOP
    kept = completion.kept
    assert kept is not None
    rows = [kept.ids[a:b].tolist() for a, b in zip(kept.offsets[:-1], kept.offsets[1:], strict=True)]
    assert rows == [[0, 9, 200], [0, 8, 201], [0, 7, 202], [0, 1, 203]]
    assert completion.routed is not None and completion.routes is not None
    assert completion.routed.tolist() == [True] * 8 + [False]
    # Layer 0 of the tiny model is dense: what vLLM has there is no expert's number.
    np.testing.assert_array_equal(completion.routes[:8], record.rows[:8].reshape(8, 3, 2)[:, 1:])
    assert completion.routes.dtype == np.uint8 and completion.routes.shape == (9, 2, 2)
    prompt = Prompt(id="p", domain="d", token_ids=request_of_5.token_ids)
    assert to_sample(prompt, 0, request_of_5, completion, "").num_sampled == 4


def test_a_set_that_came_without_ids_holds_all_of_them(recording, request_of_5):
    kept = Kept(ids=np.array([4, 9, 1], np.int32), offsets=np.array([0, 2, 2, 3]))
    completion = to_completion(output_of([9, 8, 1]), record_of([9, 8, 1], kept=kept), request_of_5, recording)
    assert completion.kept is not None
    assert completion.kept.sizes.tolist() == [2, recording.vocab_size, 1]
    assert completion.kept.ids.tolist() == [4, 9, *range(recording.vocab_size), 1]
    assert completion.kept.contains(completion.token_ids).all()


def test_rows_that_are_missing_are_not_recorded(recording, request_of_5):
    recorded = np.array([True] * 3 + [False] * 3 + [True, False])
    completion = to_completion(output_of([9, 8, 7]), record_of([9, 8, 7], recorded=recorded), request_of_5, recording)
    assert completion.routed is not None
    assert completion.routed.tolist() == recorded.tolist()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 3), (300, 3), (8, 1)])
def test_what_attention_kept_stands_behind_the_experts(recording, request_of_5, num_experts, top_k):
    """As `kernels.selection_bitmask` writes it: words of 32 keys, whichever way a sample then keeps them."""
    recording = replace(recording, num_experts=num_experts, index_topk=top_k)
    experts = np.arange(8 * 3 * 2).reshape(8, 3, 2).astype(recording.route_dtype) % num_experts
    generator = np.random.default_rng(0)
    keys = np.full((8, 3, top_k), -1)
    for at in range(8):
        for layer in range(3):
            chosen = generator.choice(at + 1, min(top_k, at + 1), replace=False)
            keys[at, layer, : len(chosen)] = np.sort(chosen)
    words = selection_bitmask(torch.tensor(keys.reshape(24, top_k)), 96).numpy().reshape(8, 3, 3)
    fed = np.concatenate([experts.view(np.uint8), words.view(np.uint8)], axis=2).reshape(8, -1)
    assert fed.shape[1] == recording.row_bytes
    rows = np.concatenate([fed, np.zeros_like(fed[:1])])
    completion = to_completion(output_of([9, 8, 7, 1]), record_of([9, 8, 7, 1], rows=rows), request_of_5, recording)
    assert completion.routes is not None and completion.selections is not None
    np.testing.assert_array_equal(completion.routes[:8], experts[:, 1:])
    assert completion.selections.fault() is None
    assert completion.selections.recorded.tolist() == [False] * top_k + [True] * (8 - top_k) + [False]
    np.testing.assert_array_equal(completion.selections.keys, keys[top_k:])
    aborted = to_completion(
        output_of([], weight_versions=None, finish_reason="abort"),
        record_of([], rows=np.zeros((5, fed.shape[1]), np.uint8), recorded=np.zeros(5, bool)),
        request_of_5,
        recording,
    )
    assert aborted.selections is not None and len(aborted.selections) == 5 and not aborted.selections.recorded.any()
    continued = aborted.selections.extended(9).filled(completion.selections)
    np.testing.assert_array_equal(continued.keys, completion.selections.keys)


def test_an_abort_before_the_first_token(recording, request_of_5):
    output = output_of([], weight_versions=None, finish_reason="abort")
    completion = to_completion(output, record_of([], recorded=np.zeros(5, bool)), request_of_5, recording)
    assert completion.finish == Finish.ABORT and len(completion.token_ids) == 0
    assert completion.routed is not None and not completion.routed.any() and len(completion.routed) == 5
    assert completion.kept is not None and len(completion.kept) == 0


@pytest.mark.parametrize(
    ("output", "record", "sentence"),
    [
        (
            {},
            {"kept": Kept(ids=np.array([9], np.int32), offsets=np.array([0, 1]))},
            "as many kept sets as its 2 tokens",
        ),
        ({}, {"kept": None}, "as many kept sets as its 2 tokens"),
        ({"weight_versions": [span("4", 0, 1)]}, {}, "weight versions do not cover its 2 tokens"),
        ({"weight_versions": [span("4", 1, 2)]}, {}, "weight versions do not cover its 2 tokens"),
        ({"weight_versions": None}, {}, "weight versions do not cover its 2 tokens"),
        ({}, {"token_ids": np.array([9, 7], np.int32)}, "are not vLLM's 2 tokens"),
    ],
)
def test_streams_that_do_not_fit_are_refused(recording, request_of_5, output, record, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        to_completion(output_of([9, 8], **output), record_of([9, 8], **record), request_of_5, recording)


@pytest.mark.parametrize(
    ("logprobs", "sentence"),
    [
        ([-0.5, float("nan"), float("nan")], r"five: 2 of vLLM's 3 .* nan of reply token 1 \(id 8, out of 3 that"),
        ([float("-inf"), -0.5, -0.5], r"five: 1 of vLLM's 3 .* -inf of reply token 0 \(id 9, .* a prompt of 5;"),
    ],
)
def test_log_probabilities_that_are_no_numbers_are_told_apart(recording, request_of_5, logprobs, sentence: str):
    record = record_of([9, 8, 7], logprobs=np.array(logprobs, np.float32))
    with pytest.raises(RunStopped, match=sentence):
        to_completion(output_of([9, 8, 7]), record, request_of_5, recording)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_p": 0.9, "top_k": 0}, {"temperature": 1.0, "top_k": 264, "top_p": 0.9, "min_p": 0.0}),
        ({"top_p": 1.0, "min_p": 0.1, "temperature": 0.7}, {"temperature": 0.7, "top_k": 264, "min_p": 0.1}),
        ({"top_k": 5000}, {"top_k": 264}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"temperature": 0.0, "top_p": 0.5, "min_p": 0.3}, {"temperature": 1.0, "top_k": 1, "top_p": 1, "min_p": 0}),
    ],
)
def test_sampling_that_a_mask_can_be_asked_for(make_request, recording, sampling, expected):
    arguments = sampling_arguments(make_request("r", length=5, **sampling), recording)
    assert arguments["temperature"] > 0 and arguments["top_k"] > 0
    assert {key: arguments[key] for key in expected} == expected
    assert arguments["ignore_eos"], "only the request says what ends it, as in the torch engine"


def test_seeds_and_lengths_stay_in_range(make_request, recording):
    for seed in (-1, 0, 2**64 - 1):
        assert 0 <= sampling_arguments(make_request("r", length=5, seed=seed), recording)["seed"] < 2**63
    assert sampling_arguments(make_request("r", length=90, max_tokens=20), recording)["max_tokens"] == 6


def test_requests_that_vllm_would_misread(make_request, recording):
    with pytest.raises(DataError, match=r"request long: the prompt has 96 tokens .* holds 96"):
        check_request(make_request("long", length=96), recording)
    with pytest.raises(DataError, match=r"request cold: sampling.temperature is 0.001, but vLLM samples at 0.01 to 2"):
        check_request(make_request("cold", temperature=0.001), recording)
    request = make_request("foreign", length=3)
    request.token_ids[1] = 264
    with pytest.raises(DataError, match="request foreign: token id 264 is outside the model's vocabulary of 264"):
        check_request(request, recording)
    check_request(make_request("greedy", temperature=0.0), recording)
