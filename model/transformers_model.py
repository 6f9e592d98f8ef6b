"""Causal language models of every other architecture: transformers' own modules, seen as `LanguageModel`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from model import transformers_attention as attention
from model import transformers_experts as stacks
from model.cache import CacheStep, CacheView
from model.key_selection import KeySelection
from model.language_model import BackboneOutput, IndexerLoss, LanguageModel
from model.moe import Routing
from model.outline import ModelOutline, tensor_specs
from model.packing import Batch
from model.recompute import recomputed
from model.transformers_routing import RouterSpec, RouterTrial, taps_of

_UNDECLARED = {"model_type", "head_dim", "rope_theta", "rope_scaling"}
"""Keys that config classes read without declaring them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What a trial forward on the meta device shows of an architecture."""

    num_layers: int
    keys: tuple[int, int]  # heads and dimension of a layer's rotated keys
    values: tuple[int, int]
    routers: tuple[RouterSpec, ...]  # in the order of their layers


class TransformersModel(LanguageModel):
    """A module of transformers. Its children are that module's own, so that parameters bear transformers' names."""

    def __init__(self, module: PreTrainedModel, anatomy: Anatomy, attn_implementation: str | None = None) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self._module = (module,)  # in a tuple, so that it is not a child itself
        self._anatomy = anatomy
        self._own_attention = attn_implementation is None
        self._taps = list(taps_of(module, anatomy.routers))
        self.outline = _outline(module, anatomy)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # the learner's probabilities are to be those of the engine

    @classmethod
    def empty(cls, config: PretrainedConfig) -> TransformersModel:
        """On the meta device. Raises ValueError, in one sentence, for an architecture that Keel cannot run."""
        module = _empty_module(config)
        return cls(module, examine(module))

    @property
    def index_topk(self) -> None:
        return None

    @property
    def config(self) -> PretrainedConfig:
        return self._module[0].config

    def backbone(
        self,
        input_ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: CacheView | None = None,
        routes: Routing | None = None,
        record_routes: bool = False,
        indexer_loss: IndexerLoss | None = None,
        selection: KeySelection | None = None,
    ) -> BackboneOutput:
        """As `LanguageModel.backbone`."""
        if indexer_loss is not None or selection is not None:
            raise ValueError(f"{self.outline.architecture} has no indexer, neither to train nor to replay")
        self._set_routes(routes)
        if cache is None:
            hidden = self._whole_sequences(input_ids, positions, cu_seqlens)
        elif positions is None or cu_seqlens is not None:
            raise ValueError("backbone with a cache takes positions, and not cu_seqlens")
        else:
            with torch.no_grad():
                hidden = self._against_cache(input_ids, positions, cache)
        chosen = None
        if record_routes and self._taps:
            layers = [tap.chosen for tap in self._taps if tap.chosen is not None]
            chosen = torch.stack(layers, dim=1).unflatten(0, input_ids.shape)
        return BackboneOutput(hidden=hidden, routes=chosen, indexer_loss=None)

    def new_cache(self, num_slots: int, max_len: int) -> attention.KeyValueCache:
        if not self._own_attention:
            raise ValueError("a model that was loaded with an attn_implementation of transformers cannot generate")
        return attention.KeyValueCache(
            num_slots,
            max_len,
            num_layers=self._anatomy.num_layers,
            keys=self._anatomy.keys,
            values=self._anatomy.values,
            dtype=self.lm_head.weight.dtype,
            device=self.lm_head.weight.device,
        )

    def config_json(self) -> dict[str, Any]:
        values = json.loads(self.config.to_json_string())
        values.pop("dtype", None)
        return values | {"architectures": [self.outline.architecture]}

    def checkpoint_names(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from revert_weight_conversion(self._module[0], {name: tensor}).items()

    def fill_constants(self) -> None:
        for part in self.modules():
            if part._non_persistent_buffers_set:
                self._module[0]._init_weights(part)

    def recompute_activations(self) -> None:
        self._module[0].gradient_checkpointing_enable()
        for part in self.modules():
            if hasattr(part, "_gradient_checkpointing_func"):
                vars(part)["_gradient_checkpointing_func"] = _recomputed_layer

    def _whole_sequences(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        batch = Batch(input_ids, cu_seqlens)
        if not self._own_attention:
            how = attention.transformers_packing(batch, cu_seqlens)
            return self._decode(input_ids, batch.positions, **how)
        rows = attention.PackedRows.of(batch, cu_seqlens, self.lm_head.weight.dtype)
        return self._decode(input_ids, batch.positions if positions is None else positions, **{attention.KEYWORD: rows})

    def _against_cache(self, input_ids: torch.Tensor, positions: torch.Tensor, view: CacheView) -> torch.Tensor:
        cache = view.cache
        if not isinstance(cache, attention.KeyValueCache):
            raise ValueError(f"{self.outline.architecture} needs a cache that its new_cache made")
        rows = attention.CachedRows(step=CacheStep(view, positions), cache=cache)
        return self._decode(input_ids, positions, **{attention.KEYWORD: rows})

    def _decode(self, input_ids: torch.Tensor, positions: torch.Tensor, **how: Any) -> torch.Tensor:
        decoder = self._module[0].base_model
        return decoder(input_ids=input_ids, position_ids=positions, use_cache=False, **how).last_hidden_state

    def _set_routes(self, routes: Routing | None) -> None:
        if routes is not None and routes.experts.shape[2] != len(self._taps):
            raise ValueError(
                f"routes of {routes.experts.shape[2]} layers, but {self.outline.architecture} has {len(self._taps)} "
                "with routed experts"
            )
        recorded = None if routes is None or bool(routes.recorded.all()) else routes.recorded.flatten().unsqueeze(1)
        for layer, tap in enumerate(self._taps):
            tap.replay = None if routes is None else routes.experts[:, :, layer].flatten(0, 1).long()
            tap.recorded = recorded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TransformersModel:
        """Conversions such as `.bfloat16()` leave fp32 buffers alone: rotary frequencies and correction biases."""
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, attribute = name.rpartition(".")
            live = self.get_buffer(name)
            if live.dtype != torch.float32:
                self.get_submodule(owner)._buffers[attribute] = buffer.to(live.device)
        return self


def _recomputed_layer(layer: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return recomputed(lambda *inputs: (layer(*inputs), None, None), *args)[0]


def read_config(path: Path) -> PretrainedConfig:
    """transformers' config object. Raises ValueError when the directory needs code of its own or makes no sense."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path / 'config.json'}: {_sentence(error)}") from error


def config_of(values: Mapping[str, Any]) -> PretrainedConfig:
    """The config object of config.json's keys. Raises ValueError naming the key that the architecture does not have."""
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {model_type!r}")
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for key in values:
        if key not in known | _UNDECLARED:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{model_type} has no key '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    try:
        return config_class(**{key: value for key, value in values.items() if key != "model_type"})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(_sentence(error)) from error


def random_model(config: PretrainedConfig) -> TransformersModel:
    """Random weights by transformers' own initialisation and the global generator, in fp32. As `empty` otherwise."""
    anatomy = examine(_empty_module(config))
    with _quiet():
        module = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=False,
            attn_implementation=attention.NAME,
            experts_implementation=stacks.NAME,
        )
    return TransformersModel(module, anatomy)


def load_transformers(
    path: Path, *, dtype: torch.dtype, device: torch.device | str, attn_implementation: str | None
) -> TransformersModel:
    """As `model.load_model`, for an architecture of transformers."""
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path}: its weights are quantised; convert them to bfloat16 first")
    anatomy = examine(_empty_module(config))
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,  # a .bin file is a pickle
                attn_implementation=attn_implementation or attention.NAME,
                experts_implementation=stacks.NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (ValueError, OSError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {_sentence(error)}") from error
    module, info = loaded
    for tensor, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path}: tensor {tensor} has shape {tuple(found)}, but config.json asks for {tuple(wanted)}")
    for problem, names in (
        ("missing from the checkpoint", "missing_keys"),
        ("not part of the model", "unexpected_keys"),
    ):
        if info[names]:
            first, *others = sorted(info[names])
            raise ValueError(f"{path}: tensor {first}{f' (and {len(others)} more)' if others else ''} is {problem}")
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.to(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.untyped_storage().resizable():  # the checkpoint's file, mapped: an engine could not give it up
            tensor.data = tensor.data.clone()
    return TransformersModel(module, anatomy, attn_implementation)


def examine(module: PreTrainedModel) -> Anatomy:
    """Runs a model on the meta device and returns what showed. Raises ValueError for what Keel cannot run.

    The forward is the whole model's, so that everything between its layers and its logits is seen.
    """
    name = type(module).__name__
    config: Any = module.config.get_text_config()
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head is not getattr(module, "lm_head", None) or head.bias is not None:
        raise ValueError(f"{name} cannot be run: it has no lm_head without bias")
    trial = attention.Trial()
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    positions = torch.arange(4, device="meta").unsqueeze(0)
    try:
        with torch.no_grad(), RouterTrial(module) as routers, _AfterLayers(module.base_model) as tail:
            module(input_ids=ids, position_ids=positions, use_cache=False, **{attention.KEYWORD: trial})
    except Exception as error:  # whatever foreign code raises on inputs it does not expect
        raise ValueError(f"{name} cannot be run: {_sentence(error)}") from error
    if trial.layers != list(range(config.num_hidden_layers)) or len(trial.shapes) != 1:
        raise ValueError(f"{name} cannot be run: not all of its layers attend to the keys and values of all tokens")
    for kind, window in zip(getattr(config, "layer_types", None) or [], trial.windows, strict=False):
        # What other kinds hide would be in a mask, which transformers does not make for a function of ours.
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
            raise ValueError(f"{name} cannot be run: {kind} is not supported")
    if tail.foreign:
        raise ValueError(f"{name} cannot be run: it does more than its head on the way to logits ({tail.foreign[0]})")
    experts = [(part_name, part) for part_name, part in module.named_modules() if stacks.is_stack(part)]
    for _, part in experts:
        if reason := stacks.refusal(part):
            raise ValueError(f"{name} cannot be run: {reason}")
    if [layer_of(part_name) for part_name, _ in experts] != [layer_of(spec.name) for spec in routers.specs]:
        raise ValueError(f"{name} cannot be run: which experts its routers choose cannot be recorded")
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})")
    ((keys, values),) = trial.shapes
    return Anatomy(num_layers=config.num_hidden_layers, keys=keys, values=values, routers=tuple(routers.specs))


class _AfterLayers(TorchFunctionMode):
    """Notes what is computed after the layers, but for slicing, the head's product and casts."""

    _PLAIN = ("__get__", "__getitem__", "linear", "float", "to")

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self._after = False
        self._hook = decoder.register_forward_hook(self._enter)

    def _enter(self, *_: Any) -> None:
        self._after = True

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if self._after and name not in self._PLAIN:
            self.foreign.append(name)
        return func(*args, **(kwargs or {}))


def layer_of(name: str) -> int:
    """The layer that a module belongs to: the first number in its name."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        raise ValueError(f"module {name} is in no layer")
    return int(number[1])


def _empty_module(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"), _quiet():
            return AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                attn_implementation=attention.NAME,
                experts_implementation=stacks.NAME,
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"transformers has no causal language model for model_type {config.model_type!r}: {_sentence(error)}"
        ) from error


def _outline(module: PreTrainedModel, anatomy: Anatomy) -> ModelOutline:
    text: Any = module.config.get_text_config()
    routers = anatomy.routers
    return ModelOutline(
        architecture=type(module).__name__,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=anatomy.num_layers,
        moe_layers=tuple(layer_of(router.name) for router in routers),
        num_experts=routers[0].num_experts if routers else 0,
        experts_per_token=routers[0].top_k if routers else 0,
        tensors=tensor_specs(module),
        max_context=getattr(text, "max_position_embeddings", None),
    )


class _quiet:
    """Keeps transformers' progress bars and reports off the terminal; what matters becomes an error here."""

    def __enter__(self) -> None:
        self._verbosity, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()


def _sentence(error: Exception) -> str:
    """What an error of another library says, on one line of bounded length."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")
