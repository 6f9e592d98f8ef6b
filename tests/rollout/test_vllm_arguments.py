"""What vLLM is asked for, from a model's outline and an engine's settings, and when an engine of it is busy."""

import ast
import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from model.outline import ModelOutline
from rl.errors import RecipeError
from rollout.vllm_engine import EngineSettings, VllmEngineActor, engine_arguments, multicast_settings
from rollout.vllm_requests import Recording

DENSE = ModelOutline(
    architecture="Qwen3ForCausalLM",
    vocab_size=100,
    hidden_size=8,
    num_layers=2,
    moe_layers=(),
    num_experts=0,
    experts_per_token=0,
    tensors={},
    max_context=64,
)
EXPERTS = replace(DENSE, architecture="Qwen3MoeForCausalLM", moe_layers=(0, 1), num_experts=300, experts_per_token=2)
SIGMOID_IN_FP32 = {"moe_router_dtype": "float32", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SETTINGS = EngineSettings(dtype="bfloat16", max_num_seqs=4, max_context=64)


def test_routes_are_recorded_where_there_are_any():
    assert not engine_arguments("m", DENSE, SETTINGS)["enable_return_routed_experts"]
    assert engine_arguments("m", EXPERTS, SETTINGS)["enable_return_routed_experts"]
    recording = Recording.of(EXPERTS, kept=True, max_context=64)
    assert (recording.moe_layers, recording.experts_per_token, recording.route_dtype.__name__) == ((0, 1), 2, "uint16")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("Qwen3MoeForCausalLM", {}),
        ("Glm4MoeForCausalLM", {}),
        ("DeepseekV3ForCausalLM", SIGMOID_IN_FP32),
        ("DeepseekV32ForCausalLM", SIGMOID_IN_FP32),
    ],
)
def test_routers_are_told_how_to_route_only_where_that_is_read(architecture: str, overrides: dict):
    assert engine_arguments("m", replace(EXPERTS, architecture=architecture), SETTINGS)["hf_overrides"] == overrides


def test_what_attention_selected_is_asked_for_of_our_own_class():
    tree = ast.parse((Path(__file__).parents[2] / "rollout" / "vllm_dsa.py").read_text())
    (name,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SELECTIONS"
    )
    asks = replace(SETTINGS, keel_dsa=True, selections=True)
    for top_k, settings, asked in ((16, asks, {name: True}), (16, SETTINGS, {}), (64, asks, {}), (None, asks, {})):
        model = replace(EXPERTS, index_topk=top_k)
        assert engine_arguments("m", model, settings)["additional_config"] == asked


def test_selections_need_the_rows_of_experts(tmp_path: Path, tiny_config):
    dense = replace(tiny_config, first_k_dense_replace=tiny_config.num_hidden_layers)
    (tmp_path / "config.json").write_text(json.dumps(dense.to_dict()))
    with pytest.raises(RecipeError, match="keep_selection needs a model with experts under vLLM"):
        asyncio.run(VllmEngineActor().load(str(tmp_path), replace(SETTINGS, keel_dsa=True, selections=True)))


def test_whose_attention_a_sparse_model_gets():
    """vLLM's registry takes the place of a class by its path; nothing else about the engine changes."""
    sparse = replace(EXPERTS, architecture="DeepseekV32ForCausalLM")
    theirs, ours = (engine_arguments("m", sparse, replace(SETTINGS, keel_dsa=keel)) for keel in (False, True))
    assert theirs.pop("model_class_overrides") == {}
    ((architecture, path),) = ours.pop("model_class_overrides").items()
    assert architecture == sparse.architecture and theirs == ours
    module, _, name = path.partition(":")
    source = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py").read_text()
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def test_vllm_has_a_tokenizer_only_for_replies_by_a_schema():
    plain, structured = (engine_arguments("m", DENSE, replace(SETTINGS, structured=given)) for given in (False, True))
    assert plain.pop("skip_tokenizer_init") and not structured.pop("skip_tokenizer_init") and plain == structured


def test_workers_are_this_processs_own():
    """In a placement group vLLM would otherwise take Ray's executor, which asks for GPUs a second time."""
    wide = replace(SETTINGS, tensor_parallel=4, expert_parallel=True)
    arguments = engine_arguments("m", EXPERTS, wide)
    assert (arguments["tensor_parallel_size"], arguments["distributed_executor_backend"]) == (4, "mp")
    assert arguments["enable_expert_parallel"]
    assert not engine_arguments("m", DENSE, wide)["enable_expert_parallel"]
    assert engine_arguments("m", EXPERTS, SETTINGS)["distributed_executor_backend"] == "uni"
    assert engine_arguments("m", DENSE, replace(SETTINGS, sleeps=True, seed=5))["enable_sleep_mode"]


def test_multicast_is_off_in_vllm_where_it_is_off_in_nccl():
    """vLLM reads these variables, and no other, before its workers of several GPUs make a multicast object."""
    assert multicast_settings({"PATH": "/bin"}) == multicast_settings({"NCCL_NVLS_ENABLE": "1"}) == {}
    off = multicast_settings({"NCCL_NVLS_ENABLE": "0"})
    assert (off["VLLM_ALLREDUCE_USE_FLASHINFER"], off["TORCH_SYMM_MEM_DISABLE_MULTICAST"]) == ("0", "1")
    assert off["VLLM_FLASHINFER_ALLREDUCE_BACKEND"] == "trtllm"


def test_an_engine_that_holds_requests_and_stands_is_not_busy():
    """Asleep, or while it is sent weights: what it holds waits, and counts neither as work nor as its speed."""
    actor = VllmEngineActor()
    actor._enter("one", "0.one")
    time.sleep(0.02)
    actor._stand(True)
    worked = actor._busy_s
    assert worked >= 0.02 and actor._busy_since is None
    actor._enter("two", "1.two")
    actor._leave("one")
    assert actor._busy_since is None
    actor._stand(False)
    began = actor._busy_since
    assert began is not None and actor._busy_s == worked
    actor._enter("three", "2.three")
    actor._leave("two")
    assert actor._busy_since == began
    actor._leave("three")
    assert actor._busy_since is None and actor._busy_s > worked
