"""The torch engine generating with models of transformers, against their full forwards and against other company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model import checksums, load_model, save_model
from rollout.engine import Completion
from rollout.torch_engine import TorchEngine
from tests.model import families

FAMILIES = ["qwen3", "mistral", "qwen3_moe", "deepseek_v3"]


def engine_of(family: str, *, max_num_seqs: int = 16, prefill_tokens: int = 512) -> TorchEngine:
    module = families.make(family)
    return TorchEngine(module, max_num_seqs=max_num_seqs, max_context=80, prefill_tokens=prefill_tokens)


def assert_same(one: Completion, other: Completion) -> None:
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert (one.routes is None) == (other.routes is None)
    if one.routes is not None and other.routes is not None:
        np.testing.assert_array_equal(one.routes[one.routed], other.routes[other.routed])


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_routes_are_those_of_transformers(make_request, family: str):
    engine = engine_of(family)
    theirs = families.twin(families.make(family))
    requests = [make_request(name, length=length, top_p=1.0) for name, length in (("a", 30), ("b", 3), ("c", 17))]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        begin = len(request.token_ids)
        tokens = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids])).long()[None]
        with torch.no_grad():
            logprobs = theirs(tokens).logits[0, begin - 1 : -1].log_softmax(-1)
            routes = engine.module.backbone(tokens, record_routes=True).routes
        wanted = logprobs.gather(1, tokens[0, begin:, None]).squeeze(1).numpy()
        np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-4, rtol=0)
        assert (completion.routes is None) == (family not in families.MOE_LAYERS)
        if completion.routes is not None and completion.routed is not None:
            assert routes is not None
            np.testing.assert_array_equal(completion.routes[completion.routed], routes[0, :-1].numpy())


@pytest.fixture(scope="module")
def lone() -> dict[str, dict[str, Completion]]:
    """Completions of engines that had nothing else to do, by family; filled as they are needed."""
    return {}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking whole engine runs takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_tokens_do_not_depend_on_company_order_or_slots(make_request, lone, family: str, data: st.DataObject):
    requests = {f"r{number}": make_request(f"r{number}", max_tokens=4 + 4 * number) for number in range(6)}
    if family not in lone:
        engine = engine_of(family)
        lone[family] = {name: engine.generate([request])[0] for name, request in requests.items()}
    engine = engine_of(
        family, max_num_seqs=data.draw(st.integers(1, 33)), prefill_tokens=data.draw(st.sampled_from([32, 512]))
    )
    together: dict[str, Completion] = {}
    for name in data.draw(st.permutations(list(requests))):
        engine.submit(requests[name])
        for _ in range(data.draw(st.integers(0, 4))):
            together.update(engine.step())
    while engine.has_work:
        together.update(engine.step())
    assert together.keys() == requests.keys()
    for name, completion in lone[family].items():
        assert_same(together[name], completion)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_weights_change_under_transformers_names(make_request, tmp_path: Path, family: str):
    save_model(families.make(family, seed=0), tmp_path / "before")
    after = families.make(family, seed=1)
    engine = TorchEngine(load_model(tmp_path / "before"), max_num_seqs=4, max_context=80)
    weights = dict(after.named_weights())
    assert ("lm_head.weight" in weights) == (family != "qwen3"), "tied weights travel once"
    engine.sleep()  # tied weights are given up once
    assert engine.num_bytes == 0
    engine.stage({name: tensor.detach() for name, tensor in weights.items()})
    assert engine.commit(1) == checksums(weights.items())
    request = make_request("after")
    wanted = TorchEngine(families.make(family, seed=1), max_num_seqs=4, max_context=80)
    assert_same(engine.generate([request])[0], wanted.generate([request])[0])
