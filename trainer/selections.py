"""Keep Selection in the learner: from what the samples of a micro-batch recorded to what the model replays."""

from __future__ import annotations

import numpy as np
import torch

from model import GivenKeys, KeySelection
from rl.metrics import Mean
from rl.sample import NDArray
from trainer.pack import Microbatch


def key_selection(micro: Microbatch, index_topk: int, device: torch.device | str) -> KeySelection:
    """What the model replays of a micro-batch; without any recordings, what watches it choose.

    Raises ValueError, naming the sample, where selections are not of ``index_topk`` keys.
    """
    queries: list[NDArray] = []
    keys: list[NDArray] = []
    for name, start, selections in zip(micro.sample_ids, micro.cu_seqlens[:-1], micro.selections, strict=False):
        if selections is None or not selections.recorded.any():
            continue
        if selections.top_k != index_topk:
            raise ValueError(
                f"sample {name}: its selections keep {selections.top_k} tokens, but the model attends to {index_topk}"
            )
        queries.append(int(start) + np.flatnonzero(selections.recorded))
        keys.append(selections.keys.astype(np.int16 if len(selections) <= 1 << 15 else np.int32))
    if not queries:
        return KeySelection()
    rows = np.concatenate(queries)
    missing = micro.context & (micro.positions >= index_topk)
    missing[rows] = False
    given = GivenKeys(
        queries=torch.tensor(rows, device=device),
        keys=torch.tensor(np.concatenate(keys), device=device),
        complete=not missing.any(),  # a last token was never fed, and its output is nobody's input
    )
    return KeySelection(given=given)


def measure_selections(micro: Microbatch, selection: KeySelection, index_topk: int) -> dict[str, Mean]:
    """Of positions that later tokens look back on and that leave keys out, how many were replayed; and of the replayed
    sets, how many the learner's indexer would have chosen too, where it chose at all."""
    needed = micro.context & (micro.positions >= index_topk)
    if not needed.any():
        return {}
    given = selection.given
    if given is None:
        return {"selections/replayed": Mean(0, int(np.count_nonzero(needed)))}
    replayed = np.count_nonzero(needed[given.queries.cpu().numpy()])
    tally = {"selections/replayed": Mean(int(replayed), int(np.count_nonzero(needed)))}
    if selection.identical:
        same = float(torch.stack(list(selection.identical.values())).sum())
        tally["selections/identical"] = Mean(same, given.keys.shape[0] * given.keys.shape[1])
    return tally
