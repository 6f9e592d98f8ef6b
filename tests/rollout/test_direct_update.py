"""Updates of a worker's parameters, laid out by an independent hand: through a loader at first, then straight."""

import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import checksums
from rollout.direct_update import DirectUpdates, obstacle
from rollout.held_weights import HeldWeights, Verifier, lie_apart
from tests.rollout.test_vllm_layout import MODELS, deepseek_model, described, moe_model
from tests.rollout.test_vllm_sleep import Worker as SleepingWorker
from tests.rollout.vllm_shards import Shapes, Weights, as_vllm

NOPE, VALUE, LATENT = 8, 4, 8
"""Of `deepseek_model`'s kv_b_proj."""


@pytest.fixture(autouse=True, params=["small, flowing", "large, offered", "large, flowing"])
def adds_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether buckets are added up as they come."""
    size, way = request.param.split(", ")
    if size == "large":
        monkeypatch.setattr("rollout.held_weights._LARGE", 0)
    monkeypatch.setattr(Engine, "flowing", way == "flowing")
    return request.param == "large, flowing"


def module_of(live: Weights) -> nn.Module:
    """A model whose parameters have these names."""
    root = nn.Module()
    for name, tensor in live.items():
        *path, kind = name.split(".")
        owner: nn.Module = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(kind, nn.Parameter(tensor, requires_grad=False))
    return root


def absorb(model: nn.Module, *, copied: bool) -> None:
    """Gives attention layers what decoding uses in place of kv_b_proj, as vLLM's MLAAttention makes it."""
    for module in [module for module in model.modules() if "kv_b_proj" in module._modules]:
        weight = module.get_parameter("kv_b_proj.weight")
        rows = weight.view(-1, NOPE + VALUE, LATENT)
        for name, view in (("W_UK_T", rows[:, :NOPE]), ("W_UV", rows[:, NOPE:].transpose(1, 2))):
            module.register_parameter(name, nn.Parameter(view.clone() if copied else view, requires_grad=False))


def changed(weights: Weights, turn: int) -> Weights:
    return {name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(turn)).to(tensor.dtype)
            for name, tensor in weights.items()}  # fmt: skip


class Engine:
    """Workers whose parameters are written by hand where an update goes through vLLM's loader."""

    flowing = True

    def __init__(
        self, weights: Weights, s: Shapes, size: int, *, by_expert: bool = False, copied: bool = False
    ) -> None:
        self.s, self.size, self.by_expert = s, size, by_expert
        self.models = [module_of(self.laid_out(weights, rank)) for rank in range(size)]
        for model in self.models:
            absorb(model, copied=copied)
        self.updates = [DirectUpdates(model, "", rank=rank, size=size) for rank, model in enumerate(self.models)]
        self.verifier = Verifier()
        self.spoil: Callable[[Weights], Any] = lambda live: None

    def laid_out(self, weights: Weights, rank: int) -> Weights:
        return as_vllm(weights, self.s, rank, self.size, by_expert=self.by_expert)

    def live(self, rank: int) -> Weights:
        return dict(self.models[rank].named_parameters(remove_duplicate=False))

    def load(self, weights: Weights, rank: int) -> None:
        loaded = self.laid_out(weights, rank)
        self.spoil(loaded)
        live = self.live(rank)
        for name, tensor in loaded.items():
            live[name].copy_(tensor)
        for name in [name for name in live if name.endswith("W_UK_T")]:
            path = name.removesuffix(".W_UK_T")
            rows = live[f"{path}.kv_b_proj.weight"].view(-1, NOPE + VALUE, LATENT)
            live[name].copy_(rows[:, :NOPE].clone())
            live[f"{path}.W_UV"].copy_(rows[:, NOPE:].transpose(1, 2).clone())

    def update(self, weights: Weights, forgotten: str = "") -> tuple[list[bool], dict[str, int]]:
        """In buckets of five tensors; whether each worker was written straight, and the checksums of the engine."""
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        brought = {name: tensor for name, tensor in weights.items() if name != forgotten}
        straight, answers = [], []
        for rank, updates in enumerate(self.updates):
            straight.append(updates.begin(shapes))
            for first in range(0, len(brought), 5):
                bucket = dict(list(brought.items())[first : first + 5])
                if straight[-1]:
                    updates.write(bucket, flowing=self.flowing)
                else:
                    updates.note(bucket)
            if straight[-1]:
                updates.finish()
            else:
                self.load(weights, rank)
            held, taken = updates.taken(described(brought))
            answers.append(held.answer(self.verifier.known, taken))
        return straight, self.verifier.checksums(answers)

    def assert_holds(self, weights: Weights) -> None:
        for rank in range(self.size):
            live = self.live(rank)
            for name, tensor in self.laid_out(weights, rank).items():
                padded = name.startswith(("model.embed_tokens", "lm_head"))
                begin = rank * len(tensor)
                rows = max(0, min(len(tensor), self.s.vocab - begin)) if padded else None
                assert torch.equal(live[name][:rows], tensor[:rows]), name
            for name in [name for name in live if name.endswith("W_UK_T")]:
                path = name.removesuffix(".W_UK_T")
                rows = live[f"{path}.kv_b_proj.weight"].view(-1, NOPE + VALUE, LATENT)
                assert torch.equal(live[name], rows[:, :NOPE])
                assert torch.equal(live[f"{path}.W_UV"], rows[:, NOPE:].transpose(1, 2))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("size", "by_expert"), [(1, False), (2, False), (4, True)])
@pytest.mark.parametrize("kind", MODELS)
def test_after_a_verified_update_the_next_ones_are_written_straight(
    kind: str, size: int, by_expert: bool, copied: bool
):
    s = Shapes()
    weights = MODELS[kind](s)
    engine = Engine(weights, s, size, by_expert=by_expert, copied=copied)
    addresses = [{name: tensor.data_ptr() for name, tensor in engine.live(rank).items()} for rank in range(size)]
    for turn in range(3):
        weights = changed(weights, turn)
        straight, sums = engine.update(weights)
        assert straight == [turn > 0] * size
        assert sums == checksums(weights.items())
        engine.assert_holds(weights)
    for rank, known in enumerate(addresses):
        assert known == {name: tensor.data_ptr() for name, tensor in engine.live(rank).items()}


def swap_halves(live: Weights) -> None:
    name = "model.layers.1.mlp.experts.routed_experts.w13_weight"
    live[name] = live[name].roll(live[name].shape[1] // 2, dims=1)


@pytest.mark.parametrize(
    "spoil",
    [
        swap_halves,
        lambda live: live["model.norm.weight"].add_(1),
        lambda live: live["model.layers.1.mlp.gate.weight"].add_(0.1),
        lambda live: live["model.layers.0.self_attn.o_proj.weight"].view(-1)[-1:].add_(1),
    ],
)
def test_what_a_loader_changes_it_goes_on_loading(spoil: Callable[[Weights], Any]):
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 2)
    engine.spoil = spoil
    for _ in range(3):
        straight, sums = engine.update(weights)
        assert straight == [False, False] and sums != checksums(weights.items())
    assert "no update has shown yet" in engine.updates[0].through_loader
    engine.spoil = lambda live: None
    assert engine.update(weights) == ([False, False], checksums(weights.items()))
    assert engine.update(weights)[0] == [True, True]


def renew(model: nn.Module) -> None:
    norm = model.get_submodule("model.norm")
    norm.register_parameter("weight", nn.Parameter(norm.get_parameter("weight").clone(), requires_grad=False))


def swap_data(model: nn.Module) -> None:
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    weight.data = weight.data.clone()


def replace_module(model: nn.Module) -> None:
    mlp = model.get_submodule("model.layers.0.mlp")
    twin = nn.Module()
    twin.register_parameter("weight", mlp.get_parameter("down_proj.weight"))
    mlp.add_module("down_proj", twin)


def replace_absorbed(model: nn.Module) -> None:
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.register_parameter("W_UV", nn.Parameter(attention.get_parameter("W_UV").clone(), requires_grad=False))


@pytest.mark.parametrize("replace", [renew, swap_data, replace_module, replace_absorbed])
def test_nothing_stale_is_read_or_written(replace: Callable[[nn.Module], None]):
    """The old tensors are still there, as they would be in a captured graph."""
    s = Shapes()
    weights = deepseek_model(s)
    engine = Engine(weights, s, 1)
    assert [engine.update(weights)[0] for _ in range(2)] == [[False], [True]]
    replace(engine.models[0])
    weights = changed(weights, 5)
    straight, sums = engine.update(weights)
    assert straight == [False] and "replaced" in engine.updates[0].through_loader
    assert sums == checksums(weights.items())
    replace(engine.models[0])
    engine.models[0].get_parameter("model.norm.weight").add_(1)
    engine.models[0].get_parameter("model.layers.0.self_attn.o_proj.weight").add_(1)
    held, taken = engine.updates[0].taken(described(weights))
    actual = engine.verifier.checksums([held.answer((), taken)])
    assert {name for name, total in sums.items() if actual[name] != total} == {
        "model.norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
    }


def test_copies_for_decoding_that_do_not_follow_are_noticed():
    s = Shapes()
    weights = deepseek_model(s)
    engine = Engine(weights, s, 2, copied=True)
    assert engine.update(weights)[0] == [False, False]
    engine.models[1].get_parameter("model.layers.1.self_attn.W_UV")[0, 3, 1] += 1
    answers = [
        held.answer((), taken) for held, taken in (updates.taken(described(weights)) for updates in engine.updates)
    ]
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert [answer.unabsorbed for answer in answers] == [[], [name]]
    assert checksums(weights.items()).keys() - Verifier().checksums(answers).keys() == {name}
    assert engine.update(weights) == ([True, True], checksums(weights.items()))  # which makes them again


def test_a_direct_update_takes_nothing_else():
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 1)
    engine.update(weights)
    updates = engine.updates[0]
    assert updates.begin({})
    with pytest.raises(ValueError, match=r"model.norm.weight came as \(\(24,\), 'float32'\), but before as \(\(24,\),"):
        updates.write({"model.norm.weight": torch.zeros(24)}, flowing=True)
    with pytest.raises(ValueError, match=r"model.norms came as .* but before as None"):
        updates.write({"model.norms": torch.zeros(24)}, flowing=True)


def test_what_stays_is_written_as_it_is_now_and_kept_no_longer_than_it_comes():
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 2)
    engine.update(weights)

    def write(tensors: Weights, **how: bool) -> None:
        answers = []
        for updates in engine.updates:
            assert updates.begin({name: list(tensor.shape) for name, tensor in tensors.items()})
            updates.write(tensors, **how)
            updates.finish()
            held, taken = updates.taken(described(tensors))
            answers.append(held.answer(engine.verifier.known, taken))
        engine.assert_holds(tensors)
        assert engine.verifier.checksums(answers) == checksums(tensors.items())

    standing = changed(weights, 1)
    for turn in range(3):
        for name, tensor in changed(weights, 2 + turn).items():
            standing[name].copy_(tensor)  # as an optimizer step does
        write(standing, stays=True)
    moved = {name: tensor.clone() for name, tensor in standing.items()}
    standing["model.norm.weight"].zero_()
    write(moved, stays=True)
    passing = {name: tensor.clone() for name, tensor in moved.items()}
    gone = [weakref.ref(tensors["model.norm.weight"]) for tensors in (moved, passing)]
    write(passing)
    del moved, passing
    assert [tensor() for tensor in gone] == [None, None]
    write(standing, stays=True)


def test_a_tensor_that_was_not_written_shows(monkeypatch: pytest.MonkeyPatch):
    """Of what is written straight, the sums are those of what lies there, not of what came."""
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 2)
    engine.update(weights)
    name, copy = "model.layers.1.self_attn.o_proj.weight", torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    missed = [live[name].data_ptr() for live in map(engine.live, range(2))]

    def miss_one(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.data_ptr() not in missed]
        copy([target for target, _ in pairs], [source for _, source in pairs])

    weights = changed(weights, 5)
    monkeypatch.setattr(torch, "_foreach_copy_", miss_one)
    straight, sums = engine.update(weights)
    expected = checksums(weights.items())
    assert straight == [True, True] and sums.keys() == expected.keys()
    assert {name for name in sums if sums[name] != expected[name]} == {name}
    monkeypatch.undo()
    answers = [updates.taken(described(weights)) for updates in engine.updates]
    assert Verifier().checksums([held.answer((), taken) for held, taken in answers]) == sums  # asked once more


def test_sums_are_taken_again_where_a_tensor_may_have_been_written_since(
    monkeypatch: pytest.MonkeyPatch, adds_up: bool
):
    taken, take = [], HeldWeights.take
    monkeypatch.setattr(HeldWeights, "take", lambda held: taken.append(held) or take(held))
    s = Shapes()
    weights = moe_model(s)
    name, shapes = "model.norm.weight", {name: list(tensor.shape) for name, tensor in weights.items()}

    def write(engine: Engine, *buckets: Weights) -> dict[str, int]:
        (updates,) = engine.updates
        assert updates.begin(shapes)
        for bucket in buckets:
            updates.write(bucket, flowing=engine.flowing)
        updates.finish()
        taken.clear()
        held, found = updates.taken(described(weights))
        return engine.verifier.checksums([held.answer(engine.verifier.known, found)])

    engine = Engine(weights, s, 1)
    engine.update(weights)
    assert write(engine, weights) == checksums(weights.items()) and len(taken) == (not adds_up)
    later = weights | {name: weights[name] + 1}
    assert write(engine, weights, {name: later[name]}) == checksums(later.items()) and len(taken) == 1

    tied = Engine(weights, s, 1)
    (model,) = tied.models
    model.get_submodule("lm_head")._parameters["weight"] = model.get_parameter("model.embed_tokens.weight")
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    alike = weights | {head: weights[table]}
    tied.update(alike)
    assert write(tied, alike) == checksums(alike.items()) and len(taken) == 1
    sums = write(tied, weights)  # of which the head comes last, or the table
    assert sums[head] == sums[table] and sums != checksums(weights.items())


@given(st.data())
def test_whether_views_lie_apart(data: st.DataObject):
    storage = torch.zeros(60, dtype=torch.int16)
    views, places = [], torch.arange(60)
    for _ in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        strides = [data.draw(st.integers(0, 8)) for _ in shape]
        offset = data.draw(st.integers(0, 60 - 1 - sum(max(0, n - 1) * k for n, k in zip(shape, strides, strict=True))))
        views.append((tuple(shape), tuple(strides), offset))
    bytes_ = [at for view in views for at in places.as_strided(*view).flatten().tolist()]
    assert lie_apart(storage.as_strided(*view) for view in views) == (len(bytes_) == len(set(bytes_)))


def test_a_forgotten_tensor_shows_and_the_next_update_is_loaded():
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 1)
    engine.update(weights)
    weights = changed(weights, 3)
    straight, sums = engine.update(weights, forgotten="model.norm.weight")
    assert straight == [True]
    assert checksums(weights.items()).keys() - sums.keys() == {"model.norm.weight"}
    assert engine.update(weights) == ([False], checksums(weights.items()))
    assert engine.update(weights)[0] == [True]


@pytest.mark.parametrize("copied", [False, True])
def test_an_engine_that_slept_is_written_straight(copied: bool):
    """Its memory comes back zeroed at the same addresses."""
    s = Shapes()
    weights = deepseek_model(s)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    held = as_vllm(weights, s, 0, 1, by_expert=False)
    rooms = [-(-tensor.nbytes // 512) * 512 for tensor in held.values()]
    sleeper = SleepingWorker(weights=sum(rooms), kv_cache=64)
    places = itertools.accumulate(rooms, initial=0)
    live = {name: sleeper.tensor("weights", at, held[name]) for name, at in zip(held, places, strict=False)}
    engine = Engine(weights, s, 1)
    engine.models = [module_of(live)]
    absorb(engine.models[0], copied=copied)
    engine.updates = [DirectUpdates(engine.models[0], "", rank=0, size=1)]
    engine.update(weights)
    for turn in range(2):
        assert engine.updates[0]._held is not None
        sleeper.memory.keep(view for _, _, view in engine.updates[0]._held.parts)
        sleeper.sleep()
        sleeper.memory.wake(lambda: sleeper.resume(["weights"]))
        assert not engine.models[0].get_parameter("model.norm.weight").any()
        weights = changed(weights, turn)
        assert shapes and engine.update(weights) == ([True], checksums(weights.items()))
        engine.assert_holds(weights)
        tables = [engine.models[0].get_parameter(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")]
        assert not any(table[s.vocab :].any() for table in tables)  # as vLLM's loader pads them


def config(**changes: Any) -> Any:
    parallel = SimpleNamespace(enable_eplb=changes.pop("enable_eplb", False))
    model = SimpleNamespace(quantization=changes.pop("quantization", None))
    return SimpleNamespace(model_config=model, parallel_config=parallel, lora_config=changes.pop("lora_config", None))


def named(path: str, *bases: type, **content: Any) -> type:
    """A class that says it is vLLM's."""
    module, _, name = path.rpartition(".")
    made = type(name, bases, content)
    made.__module__ = module
    for member in content.values():
        member.__module__, member.__qualname__ = module, f"{name}.process_weights_after_loading"
    return made


def after_loading(path: str, *bases: type) -> type:
    return named(path, *bases, process_weights_after_loading=lambda *_: None)


def with_layer(**attributes: Any) -> nn.Module:
    model = module_of(deepseek_model(Shapes()))
    for name, value in attributes.items():
        setattr(model.get_submodule("model.layers.1.self_attn"), name, value)
    return model


LAYERS = "vllm.model_executor.layers"
EXPERTS = "fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"


@pytest.mark.parametrize(
    ("attributes", "changes", "sentence"),
    [
        ({}, {}, ""),
        ({}, {"quantization": "fp8"}, "quantised"),
        ({}, {"enable_eplb": True}, "moving experts"),
        ({}, {"lora_config": object()}, "adapters"),
        ({"quant_method": named(f"{LAYERS}.linear.UnquantizedLinearMethod")()}, {}, ""),
        ({"quant_method": after_loading(f"{LAYERS}.{EXPERTS}", nn.Module)()}, {}, ""),
        ({"quant_method": after_loading(f"{LAYERS}.{EXPERTS}Twin", nn.Module)()}, {}, "UnquantizedFusedMoEMethodTwin"),
        ({"quant_method": named(f"{LAYERS}.quantization.fp8.Fp8LinearMethod")()}, {}, "Fp8LinearMethod"),
        ({"impl": after_loading("vllm.v1.attention.backend.AttentionImplBase")()}, {}, ""),
        ({"impl": after_loading("vllm.v1.attention.backends.flashinfer.FlashInferImpl")()}, {}, "FlashInferImpl"),
        ({"inner": after_loading(f"{LAYERS}.attention.mla_attention.MLAAttention", nn.Module)()}, {}, ""),
        (
            {"inner": after_loading("vllm.models.kimi_k3.nvidia.mla.Latent", nn.Module)()},
            {},
            "inner transforms weights",
        ),
        ({"W_UK_T_dcp_qrep": torch.zeros(2)}, {}, "a second time"),
        ({"_scale": torch.ones(1), "bounds": torch.zeros(9, dtype=torch.int32), "kv_cache": torch.zeros(4)}, {}, ""),
        ({"fused": torch.zeros(4)}, {}, "fused may be made of weights"),
    ],
)
def test_models_of_whose_weights_more_may_be_made_are_known(
    attributes: dict[str, Any], changes: dict[str, Any], sentence: str
):
    found = obstacle(with_layer(**attributes), config(**changes))
    assert sentence in found and bool(found) == bool(sentence)


def test_what_is_barred_is_never_written_straight():
    s = Shapes()
    weights = moe_model(s)
    engine = Engine(weights, s, 1)
    engine.updates = [DirectUpdates(engine.models[0], "the model is quantised", rank=0, size=1)]
    for _ in range(3):
        assert engine.update(weights) == ([False], checksums(weights.items()))
    assert engine.updates[0].through_loader == "the model is quantised"
