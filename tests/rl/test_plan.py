"""The plan of a run: sums by hand, seats, sentences and what they advise, and every recipe that ships."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.costs import ModelCosts, model_costs
from model.tokenizer import build_byte_tokenizer
from rl.choices import EngineKind, Placement
from rl.config import Recipe
from rl.demonstrations import load_demonstrations
from rl.engine_memory import ASLEEP_BYTES, worker_memory, worker_weight_bytes
from rl.errors import RecipeError
from rl.fit import check_plan, problems, with_keys
from rl.hardware import GIB, Hardware, parse_nvidia_smi, peak_flops
from rl.initial_model import initial_config
from rl.plan import assumed_hardware, gpus_needed, make_plan, recipe_costs
from rl.plan_text import render
from rl.prompts import load_prompts
from rl.recipe import load_recipe
from rl.system import encode
from rl.train import main
from rollout.conversation import Conversation
from tests.model.published import DEEPSEEK_V32, QWEN3_8B
from tests.rl.tiny_runs import REPOSITORY, tiny_recipe

RECIPES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "recipes").rglob("*.yaml")
    if path.parent.name != "hardware"
)
PUBLISHED = {"Qwen3-8B": QWEN3_8B, "DeepSeek-V3.2-bf16": DEEPSEEK_V32}
Write = Callable[[dict[str, Any]], ModelCosts]


@pytest.fixture
def costs(tmp_path: Path) -> Write:
    def write(config: dict[str, Any]) -> ModelCosts:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_costs(tmp_path)

    return write


def vllm_recipe(tmp_path: Path, *overrides: str) -> Recipe:
    return tiny_recipe(tmp_path, "rollout.engine=vllm", "model.dtype=bfloat16", *overrides)


def node(num_gpus: int = 8, gib: float = 80, **more: Any) -> Hardware:
    return Hardware(num_gpus=num_gpus, gpu_bytes=round(gib * GIB), **more)


def shipped(path: str, folder: Path, *overrides: str) -> tuple[Recipe, ModelCosts]:
    """A recipe of the repository, with a config.json in place of the model that it names."""
    recipe = load_recipe(REPOSITORY / path, overrides)
    if recipe.model.path is not None:
        (folder / "config.json").write_text(json.dumps(PUBLISHED[Path(recipe.model.path).name]))
        recipe = with_keys(recipe, {"model.path": str(folder)})
    return recipe, recipe_costs(recipe)


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_fits_what_it_asks_for(path: str, tmp_path: Path):
    """On GPUs of 80 GiB, or of as many as its first lines say."""
    recipe, model = shipped(path, tmp_path)
    said = re.search(r"--gpu-memory (\d+)", (REPOSITORY / path).read_text())
    gpu_bytes = (int(said[1]) if said else 80) * GIB
    hardware = assumed_hardware(recipe, num_gpus=None, num_nodes=None, gpu_bytes=gpu_bytes)
    assert check_plan(recipe, model, hardware).num_gpus == hardware.num_gpus


def test_the_arithmetic_in_the_671b_recipe_is_what_the_plan_prints(tmp_path: Path):
    path = "recipes/gpu/dsv32_671b.yaml"
    recipe, model = shipped(path, tmp_path)
    hardware = assumed_hardware(recipe, num_gpus=None, num_nodes=None, gpu_bytes=268 * GIB)
    printed = render(make_plan(recipe, model, hardware))
    comments = [line[2:] for line in (REPOSITORY / path).read_text().splitlines() if line.startswith("#")]
    first = comments.index(printed.partition("\n")[0])
    assert "\n".join(comments[first:]) + "\n" == printed


def test_what_the_documentation_shows_of_a_refusal_is_what_it_says(tmp_path: Path):
    recipe, model = shipped("recipes/gpu/dsv32_671b.yaml", tmp_path, "learner.ranks=32")
    hardware = assumed_hardware(recipe, num_gpus=None, num_nodes=None, gpu_bytes=268 * GIB)
    with pytest.raises(RecipeError) as refused:
        check_plan(recipe, model, hardware)
    shown = " ".join((REPOSITORY / "docs/gpu.md").read_text().split())
    assert f"keel: {refused.value}" in shown


def test_weights_that_are_stored_quantized_are_refused(tmp_path: Path, costs: Write):
    model = costs(DEEPSEEK_V32 | {"quantization_config": {"quant_method": "fp8"}})
    (first, *_) = problems(make_plan(vllm_recipe(tmp_path), model, node(8)))
    assert first[0] == "model.path" and "convert them first" in first[1]


@pytest.mark.parametrize("path", [path for path in RECIPES if "dsv32_shared" in path or "quickstart" in path])
def test_recipes_that_start_from_nothing_fit_their_context(path: str):
    """And outgrow index_topk, so that attention is sparse in them."""
    recipe = load_recipe(REPOSITORY / path, ["domains.spell_backward.prompts.size=60"])
    prompts = load_prompts("spell_backward", recipe.domains["spell_backward"])
    conversation = Conversation(build_byte_tokenizer())
    config = initial_config(recipe.model.init or {}, recipe.model.max_context)
    lengths = [len(encode(conversation, prompt)) for prompt in prompts]
    assert max(lengths) + recipe.sampling.max_tokens <= recipe.model.max_context
    written = load_demonstrations(recipe.supervised.demonstrations, prompts, seed=0)
    ids = [conversation.encode_demonstration(one.messages, thinking=True)[0] for one in written]
    longest = max(len(one) for one in ids)
    assert longest <= recipe.model.max_context
    assert longest - max(lengths) <= recipe.sampling.max_tokens
    assert 2 * config.index_topk < max(lengths) + 20 or path.endswith("quickstart.yaml")
    assert config.index_topk < min(len(one) for one in ids)


def test_671b_by_hand(costs: Write):
    """ZeRO-3 over 256 ranks: 18 bytes a parameter, 671.9e9 parameters."""
    model = costs(DEEPSEEK_V32)
    total = model.outline.num_parameters
    recipe = with_keys(
        Recipe(name="big"),
        {"model.dtype": "bfloat16", "learner.ranks": 256, "learner.zero_stage": 3, "model.max_context": 16384},
    )
    plan = make_plan(recipe, model, node(256, num_nodes=32))
    named = {item.name: item.num_bytes for item in plan.rank.resident}
    assert named["parameters"] + named["gradients"] + named["optimizer"] == pytest.approx(18 * total / 256)
    assert 18 * total / 256 / GIB == pytest.approx(44.0, abs=0.1)
    # bf16, and the routers' 58 correction biases of 256 in fp32.
    assert plan.sync.num_bytes == 2 * total + 58 * 256 * 4
    assert plan.sync.num_bytes / 1e9 == pytest.approx(1343.8, abs=0.1)


def test_an_engines_weights_over_gpus(costs: Write):
    """One layer's tensors of the 671B model, by hand: what is spread, and what each worker holds whole."""
    small = DEEPSEEK_V32 | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    whole = 7168 * 1536 + 7168 * 576 + 256 * 7168 + 1536 * 8192 + 7168 * 128 + 7168 * 64 + 2 * 128
    whole += 2 * 7168 + 1536 + 512 + 7168  # norms
    spread = 2 * 129280 * 7168 + 1536 * 24576 + 512 * 32768 + 16384 * 7168 + 257 * 3 * 7168 * 2048
    assert worker_weight_bytes(costs(small), 8, 2) == 2 * (whole + spread / 8) + 256 * 4
    qwen = costs(QWEN3_8B | {"num_hidden_layers": 1})
    heads = 2 * 4096 * 128  # one key-value head is the least that a worker has
    rest = 2 * 151936 * 4096 + 2 * 4096 * 4096 + 3 * 4096 * 12288
    assert worker_weight_bytes(qwen, 16, 2) == 2 * (heads + rest / 16 + 3 * 4096 + 2 * 128)


def test_what_is_left_is_cache(tmp_path: Path, costs: Write):
    recipe = with_keys(vllm_recipe(tmp_path), {"model.max_context": 9216, "rollout.gpu_memory": 0.5})
    worker = worker_memory(recipe, costs(QWEN3_8B), 80 * GIB)
    assert worker.cache_bytes + worker.fixed_bytes == 40 * GIB
    assert worker.cache_tokens == math.floor(worker.cache_bytes / 147_456)
    assert worker.full_sequences == worker.cache_tokens / 9216


@pytest.mark.parametrize(
    ("overrides", "num_gpus"),
    [
        ((), 2),
        (("learner.ranks=2", "rollout.engines=3"), 5),
        (("placement=shared",), 1),
    ],
)
def test_gpus_needed(tmp_path: Path, overrides: tuple[str, ...], num_gpus: int):
    recipe = vllm_recipe(tmp_path, *overrides)
    assert gpus_needed(recipe) == num_gpus
    plan = make_plan(recipe, recipe_costs(recipe), node(8))
    assert len(plan.seats) == num_gpus
    roles = [role for seat in plan.seats for role in seat.roles]
    assert len(set(roles)) == len(roles) == recipe.learner.ranks + recipe.rollout.engines


def test_a_judge_of_the_runs_own_has_gpus_too(tmp_path: Path):
    served = {"judge.path": "models/judge", "judge.engine": EngineKind.vllm, "judge.engines": 2}
    recipe = with_keys(vllm_recipe(tmp_path), served)
    assert gpus_needed(recipe) == 1 + 1 + 2
    assert gpus_needed(with_keys(recipe, {"judge.url": "http://judge"})) == 2
    plan = make_plan(recipe, recipe_costs(recipe), node(3))
    assert [seat.roles for seat in plan.seats] == [("engine 0",), ("rank 0",), ("judge",), ("judge",)]
    assert "+ 2 for the judge), but there are 3" in next(iter(problems(plan)))[1]


def test_no_engine_spans_two_nodes(tmp_path: Path):
    changes = {"rollout.engines": 2, "rollout.tensor_parallel": 3, "learner.ranks": 2}
    recipe = with_keys(vllm_recipe(tmp_path), changes)
    seats = make_plan(recipe, recipe_costs(vllm_recipe(tmp_path)), node(8, num_nodes=2)).seats
    by_role = {role: seat.node for seat in seats for role in seat.roles}
    assert {by_role[f"engine 1 worker {worker}"] for worker in range(3)} == {1}
    assert {by_role[f"engine 0 worker {worker}"] for worker in range(3)} == {0}
    assert by_role["rank 0"] == 0  # the place that engine 1 could not take


def advised(recipe: Recipe, model: ModelCosts, hardware: Hardware) -> tuple[str, dict[str, str], int]:
    """The sentence, the changes it advises, and the GPUs these take."""
    with pytest.raises(RecipeError) as caught:
        check_plan(recipe, model, hardware)
    sentence = str(caught.value)
    assert "\n" not in sentence
    found = re.search(r"; (\S+=.+?)(?: on (\d+) GPUs)? would fit$", sentence)
    assert found, sentence
    return sentence, dict(pair.split("=") for pair in found[1].split()), int(found[2] or hardware.num_gpus)


def test_advice_is_true(tmp_path: Path, costs: Write):
    """A learner of 8B parameters on one 80 GiB GPU: 133 GiB of state. What the sentence says does fit."""
    model = costs(QWEN3_8B)
    recipe = vllm_recipe(tmp_path)
    sentence, changes, num_gpus = advised(recipe, model, node(2))
    assert sentence.startswith("learner: a rank needs ")
    better = load_like(tmp_path, changes)
    assert not list(problems(make_plan(better, model, node(num_gpus))))


def load_like(tmp_path: Path, changes: dict[str, str]) -> Recipe:
    return vllm_recipe(tmp_path, *(f"{name}={value}" for name, value in changes.items()))


def test_too_few_gpus(tmp_path: Path):
    recipe = vllm_recipe(tmp_path)
    sentence, changes, _ = advised(recipe, recipe_costs(recipe), node(1))
    assert "needs 2 GPUs (learner.ranks 1 + rollout.engines 1 x tensor_parallel 1), but there are 1" in sentence
    assert changes["placement"] == "shared"


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 5])
def test_fewer_gpus_than_it_asks_for(num_gpus: int, tmp_path: Path, costs: Write):
    model = costs(QWEN3_8B)
    recipe = vllm_recipe(tmp_path, "rollout.engines=4", "learner.ranks=4", "learner.zero_stage=3")
    sentence, changes, advised_gpus = advised(recipe, model, node(num_gpus, 141))
    assert "needs 8 GPUs" in sentence and advised_gpus == num_gpus
    unchanged = ["rollout.engines=4", "learner.ranks=4", "learner.zero_stage=3"]
    better = vllm_recipe(tmp_path, *unchanged, *(f"{name}={value}" for name, value in changes.items()))
    assert not list(problems(make_plan(better, model, node(num_gpus, 141))))


def test_an_engine_without_room_for_a_sequence(tmp_path: Path):
    recipe = vllm_recipe(tmp_path, "rollout.gpu_memory=0.01")
    sentence, changes, _ = advised(recipe, recipe_costs(recipe), node(2))
    assert sentence.startswith("rollout.gpu_memory: an engine's share of a GPU is 0.8 GiB")
    assert float(changes["rollout.gpu_memory"]) > 0.01


def test_sharing_counts_both_sides(tmp_path: Path):
    asleep = vllm_recipe(tmp_path, "placement=shared", "rollout.gpu_memory=0.95")
    plan = make_plan(asleep, recipe_costs(asleep), node(1, 40))
    assert plan.learning_bytes == plan.rank.peak_bytes + ASLEEP_BYTES
    assert plan.generating_bytes == plan.rank.resident_bytes + 0.95 * 40 * GIB
    recipe = with_keys(asleep, {"rollout.sleep": False})
    plan = make_plan(recipe, plan.costs, node(1, 40))
    assert plan.learning_bytes == plan.rank.peak_bytes + 0.95 * 40 * GIB
    sentence, changes, _ = advised(recipe, plan.costs, node(1, 40))
    assert "beside" in sentence
    assert float(changes["rollout.gpu_memory"]) < 0.95


def test_host_memory_that_is_known_bounds_it(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    model = recipe_costs(recipe)
    assert not list(problems(make_plan(recipe, model, Hardware(num_gpus=0, host_bytes=64 * GIB))))
    (problem,) = problems(make_plan(recipe, model, Hardware(num_gpus=0, host_bytes=1 * GIB)))
    assert "a node needs" in problem[1]


def test_the_copy_that_a_checkpoint_takes_counts_on_every_node(costs: Write):
    """12 bytes a parameter over 64 ranks, and the ranks of the fullest of 12 nodes; vLLM's 32 GPUs come first."""
    model = costs(DEEPSEEK_V32)
    recipe = with_keys(
        load_recipe(REPOSITORY / "recipes/gpu/dsv32_671b.yaml"), {"learner.ranks": 64, "rollout.engines": 4}
    )
    copied = 8 * 12 * model.outline.num_parameters / 64
    others = 25 * 2 * GIB + 64 * 16 * 2 * 18432 * (14 + 58 * 8)
    for spare, fits in ((1 << 20, True), (-(1 << 20), False)):
        machines = node(96, 268, num_nodes=12, host_bytes=round(copied + others + spare))
        found = list(problems(make_plan(recipe, model, machines)))
        assert not found if fits else "most of it for checkpoint (8 ranks, fp32 weights and two moments" in found[0][1]
    with pytest.raises(RecipeError, match=r"learner\.ranks: a node needs 1,005 GiB of host memory.*, but has 900 GiB"):
        check_plan(recipe, model, node(96, 268, num_nodes=12, host_bytes=900 * GIB))


def test_recorded_selections_are_counted(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    sizes = {}
    for keep in (False, True):
        kept = replace(recipe, objective=replace(recipe.objective, keep_selection=keep))
        (item,) = (item for item in make_plan(kept, recipe_costs(kept), node(0)).host if item.name == "samples")
        sizes[keep] = item.num_bytes
        assert ("4 B of routes and 15 B of selections a token" in item.how) == keep
    # 3 layers of 40 bits; 4 prompts of 4 siblings, of one step, which fill 40 tokens each.
    assert sizes[True] - sizes[False] == 16 * 40 * 3 * 40 / 8


def test_vllm_carries_selections_on_both_sides(tmp_path: Path):
    """Of 3 layers and a context of 40 tokens: two words each."""
    recipe = vllm_recipe(tmp_path, "rollout.dsa=keel", "rollout.engines=2", "objective.keep_selection=true")
    plan = make_plan(recipe, recipe_costs(recipe), node(4))
    assert plan.worker is not None
    (buffer,) = (item for item in plan.worker.items if item.name == "selections buffer")
    assert buffer.num_bytes == 3 * 8192 * 3 * 8
    (cached,) = (item for item in plan.host if item.name == "cached selections")
    assert cached.num_bytes == 2 * plan.worker.cache_tokens * 3 * 8
    off = replace(recipe, objective=replace(recipe.objective, keep_selection=False))
    without = make_plan(off, recipe_costs(off), node(4))
    assert without.worker is not None
    names = [item.name for item in (*without.worker.items, *without.host)]
    assert "samples" in names and not {"selections buffer", "cached selections"} & set(names)


def test_on_cpus_engines_that_sleep_have_the_memory_of_a_step_in_turn(tmp_path: Path):
    def held(*overrides: str) -> dict[str, float]:
        recipe = tiny_recipe(tmp_path, *overrides)
        plan = make_plan(recipe, recipe_costs(recipe), Hardware(num_gpus=0))
        stepping = plan.rank.peak_bytes - plan.rank.resident_bytes
        return {item.name: item.num_bytes for item in plan.host} | {"resident": plan.rank.resident_bytes, "a": stepping}

    awake, asleep = held("placement=shared", "rollout.sleep=false"), held("placement=shared")
    assert awake == held()
    assert asleep["learner"] == asleep["resident"] and awake["learner"] == awake["resident"] + awake["a"]
    assert asleep["step or engines"] == max(awake["a"], awake["engines"])


def test_more_ranks_never_need_more_of_each(costs: Write):
    model = costs(QWEN3_8B)
    recipe = with_keys(Recipe(name="r"), {"model.dtype": "bfloat16", "learner.zero_stage": 3})
    peaks = [
        make_plan(with_keys(recipe, {"learner.ranks": ranks}), model, node(ranks)).rank.peak_bytes
        for ranks in (1, 2, 4, 8, 16)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(REPOSITORY / "recipes/gpu/dsv32_shared_1gpu.yaml")
    assert main([path, "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "needs 1 GPU: 1 x 1 for engines, 1 for learner ranks, shared" in printed
    assert re.search(r"^  node 0 GPU 0 +rank 0 \+ engine 0$", printed, re.MULTILINE)
    assert printed.endswith("\nfits, where a node has that much host memory (--host-memory GIB)\n")
    assert main([path, "--plan", "--gpu-memory", "10"]) == 1
    output = capsys.readouterr()
    assert output.out.rpartition("\n\n")[2].startswith("does not fit: ")
    assert output.err.count("\n") == 1 and "would fit" in output.err
    assert main([path, "--plan", "--host-memory", "2"]) == 1
    assert "a node needs" in capsys.readouterr().err


def test_a_plan_needs_no_prompts_and_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    path = str(REPOSITORY / "recipes/gpu/qwen3_math.yaml")
    assert main([path, f"model.path={tmp_path}", "--plan"]) == 0
    assert "Qwen3ForCausalLM, 8.2G parameters" in capsys.readouterr().out
    assert main([path, f"model.path={tmp_path / 'nothing'}", "--plan"]) == 1
    assert capsys.readouterr().err.startswith("keel: model.path: ")


def test_devices():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    text = "NVIDIA H200, 143771\nNVIDIA H200, 143771\n"
    assert parse_nvidia_smi(text) == [("NVIDIA H200", 143771 << 20)] * 2
    assert parse_nvidia_smi("Failed to initialize NVML: no driver\n") == []


def test_shared_placement_pairs_ranks_with_workers(tmp_path: Path):
    recipe = replace(vllm_recipe(tmp_path), placement=Placement.shared)
    recipe = with_keys(recipe, {"learner.ranks": 4, "rollout.engines": 2, "rollout.tensor_parallel": 2})
    seats = make_plan(recipe, recipe_costs(recipe), node(4)).seats
    assert [seat.roles for seat in seats] == [
        (f"rank {rank}", f"engine {rank // 2} worker {rank % 2}") for rank in range(4)
    ]
