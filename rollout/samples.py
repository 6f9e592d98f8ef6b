"""From an engine's completion to the sample that rewards score and the learner trains on."""

from __future__ import annotations

import numpy as np

from rl.sample import Kept, Prompt, Sample, Status
from rollout.engine import Completion, Finish, Request

_STATUS = {Finish.STOP: Status.FINISHED, Finish.LENGTH: Status.TRUNCATED, Finish.ABORT: Status.ABORTED}


def to_sample(prompt: Prompt, index: int, request: Request, completion: Completion, reply: str) -> Sample:
    """Joins a request's tokens and its completion into one flat sequence, every stream padded over the prompt."""
    num_prompt, num_sampled = len(request.token_ids), len(completion.token_ids)
    kept = completion.kept
    if kept is not None:
        kept = Kept(ids=kept.ids, offsets=np.concatenate([np.zeros(num_prompt, np.int64), kept.offsets]))
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=np.concatenate([request.token_ids, completion.token_ids]),
        sampled=np.arange(num_prompt + num_sampled) >= num_prompt,
        rollout_logprobs=np.concatenate([np.zeros(num_prompt, np.float32), completion.logprobs]),
        versions=np.concatenate([np.full(num_prompt, -1, np.int32), completion.versions]),
        routes=completion.routes,
        routed=completion.routed,
        selections=completion.selections,
        kept=kept,
        status=_STATUS[completion.finish],
        reply=reply,
    )
