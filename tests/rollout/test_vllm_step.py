"""What leaves a worker of a step, from the logits that vLLM samples from. Streams and events are stand-ins."""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from rollout import vllm_step
from rollout.drawn import Drawn
from rollout.vllm_step import PendingRows, Processed, StepOutput

NOTHING = SimpleNamespace(wait_stream=lambda other: None)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(vllm_step, "stream", lambda to, back: contextlib.nullcontext())


def output_of(logits: torch.Tensor, tokens: torch.Tensor, num_sampled: list[int], room: int | None, rows: Any) -> Any:
    counted = torch.tensor(num_sampled, dtype=torch.int32)
    sampled = SamplerOutput(
        sampled_token_ids=tokens[:, None],
        logprobs_tensors=Processed.from_scores(logits, 0, tokens, None, max_per_req_token_ids=0),  # type: ignore
        num_nans=None,
        num_sampled=counted,
        num_rejected=torch.zeros_like(counted),
        sampling_mask_tensors=None if room is None else Processed.from_logits(logits, None, counted, room),  # type: ignore
    )
    names = [f"{n}.r" for n in range(len(tokens))]
    output = StepOutput(
        model_runner_output=ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}),
        sampler_output=sampled,
        num_sampled_tokens=counted,
        main_stream=NOTHING,
        copy_stream=NOTHING,
        check_ep_fault=False,
        pending_aux_output=rows,
    )
    return output.get_output()


def kept_in(drawn: Drawn) -> list[np.ndarray]:
    assert drawn.kept_sizes is not None
    spans = zip(drawn.kept_starts.tolist(), drawn.kept_sizes.tolist(), strict=True)
    return [drawn.kept_ids[start : start + size] if size else drawn.kept_ids[:0] for start, size in spans]


@pytest.mark.parametrize("room", [None, 2, 3, 40])
def test_a_step_leaves_with_what_it_drew(room: int | None):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=generator)
    logits[torch.rand(5, 40, generator=generator) < 0.9] = float("-inf")
    logits[3], logits[4] = torch.randn(2, 40, generator=generator)
    logits[3, 7] = float("-inf")  # all but one; row 4 keeps all, which goes without saying
    tokens = logits.argmax(dim=1)
    rows = torch.arange(24, dtype=torch.uint8).reshape(6, 2, 2)
    pending = PendingRows(np.array([0, 7, 3, 9, 4]), np.array([0, 1, 2, 4, 5, 6]), rows)
    output = output_of(logits, tokens, [1, 1, 0, 1, 1], room, pending)
    drawn = output.aux_output_connector_output
    assert output.sampled_token_ids == [[t] if n != 2 else [] for n, t in enumerate(tokens.tolist())]
    assert drawn.sampled.tolist() == [True, True, False, True, True]
    wanted = logits.log_softmax(dim=1)[torch.arange(5), tokens].numpy()
    np.testing.assert_allclose(drawn.logprobs[drawn.sampled], wanted[drawn.sampled], rtol=1e-6)
    np.testing.assert_array_equal(drawn.rows.rows, np.arange(24, dtype=np.uint8).reshape(6, 4))
    if room is None:
        assert drawn.kept_sizes is None and not len(drawn.kept_ids)
        return
    kept = [row.isfinite().nonzero().squeeze(1).tolist() if n not in (2, 4) else [] for n, row in enumerate(logits)]
    assert drawn.kept_sizes.tolist() == list(map(len, kept))
    assert [ids.tolist() for ids in kept_in(drawn)] == kept
    assert drawn.kept_ids.dtype == np.int32


def test_a_model_without_experts_has_no_rows():
    logits = torch.randn(2, 9)
    logits[0, 1:] = float("-inf")
    drawn = output_of(logits, logits.argmax(dim=1), [1, 1], 9, None).aux_output_connector_output
    assert drawn.rows is None and drawn.kept_ids.tolist() == [0] and drawn.kept_sizes.tolist() == [1, 0]
