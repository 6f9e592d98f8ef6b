"""Reading and writing Hugging Face checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from model.deepseek_v32 import DeepseekV32
from model.fp8 import dequantise
from model.language_model import LanguageModel
from model.layout import split_experts
from model.outline import ModelOutline

DEEPSEEK_V32 = "deepseek_v32"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a deepseek_v32 checkpoint. Raises ValueError in one sentence when there is none to read."""
    return ModelConfig.from_dict(read_json(Path(path) / "config.json"))


def model_type_of(path: str | os.PathLike[str]) -> str:
    """config.json's `model_type`. Raises ValueError when there is no config.json or it names no type."""
    file = Path(path) / "config.json"
    model_type = read_json(file).get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{file} names no model_type")
    return model_type


def empty_model(path: str | os.PathLike[str]) -> LanguageModel:
    """The model that config.json describes, on the meta device: all of its shape, none of its weights.

    Raises ValueError, in one sentence, for a config.json that cannot be read and for a model that Keel cannot run.
    """
    directory = Path(path)
    if model_type_of(directory) != DEEPSEEK_V32:
        # transformers takes seconds to import, which models of our own architecture need not wait for.
        from model.transformers_model import TransformersModel, read_config

        return TransformersModel.empty(read_config(directory))
    config = load_config(directory)
    with torch.device("meta"):
        return DeepseekV32(config)


def outline(path: str | os.PathLike[str]) -> ModelOutline:
    """The outline of a checkpoint directory, from its config.json alone; raises as :func:`empty_model`."""
    return empty_model(path).outline


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> LanguageModel:
    """The model of a checkpoint directory (config.json and safetensors, in one file or sharded), without network.

    deepseek_v32 is ours; every other architecture is transformers' own module behind `LanguageModel`. Experts may be
    stored one by one or stacked; block-scaled FP8 weights are dequantised (deepseek_v32 only); layers from
    num_hidden_layers on (multi-token prediction) are skipped. Parameters get `dtype`; a router's correction bias stays
    fp32.

    `attn_implementation`: one of transformers' names, for its own attention over whole sequences; None is Keel's, which
    also generates. Raises ValueError, naming the tensor, when one is missing, has the wrong shape, or is not the
    model's, and for an architecture that Keel cannot run.
    """
    directory = Path(path)
    if model_type_of(directory) != DEEPSEEK_V32:
        from model.transformers_model import load_transformers

        return load_transformers(directory, dtype=dtype, device=device, attn_implementation=attn_implementation)
    if attn_implementation is not None:
        raise ValueError(f"{directory}: deepseek_v32 has attention of its own; leave attn_implementation out")
    return load_deepseek_v32(directory, dtype=dtype, device=device)


def load_deepseek_v32(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DeepseekV32:
    """As `load_model`, for our own architecture."""
    directory = Path(path)
    config = load_config(directory)
    with torch.device("meta"):
        module = DeepseekV32(config).to(dtype)
    # As Module.to_empty, which for meta tensors imports torch's symbolic shapes: most of a second.
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    module.tie_weights()
    with CheckpointReader(directory) as checkpoint, torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if config.tie_word_embeddings and name == "lm_head.weight":
                checkpoint.ignore(name)
                continue
            whole = name in checkpoint
            for source, target in [(name, tensor)] if whole else split_experts(name, tensor):
                target.copy_(checkpoint.read(source, target.shape))
        checkpoint.refuse_leftovers(config.num_hidden_layers)
    return module


def save_model(module: LanguageModel, path: str | os.PathLike[str], *, max_shard_bytes: int = 5 << 30) -> None:
    """Writes a checkpoint directory that transformers, vLLM and `load_model` read; see `write_checkpoint`."""
    write_checkpoint(
        module.config_json(),
        checkpoint_tensors(module),
        path,
        dtype=module.lm_head.weight.dtype,
        max_shard_bytes=max_shard_bytes,
    )


def checkpoint_tensors(module: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a live model, detached, under checkpoint names; tied ones once."""
    for name, tensor in module.named_weights():
        yield from module.checkpoint_names(name, tensor.detach())


def write_checkpoint(
    config: Mapping[str, Any],
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes tensors under checkpoint names, as `checkpoint_tensors` yields them, and `config` as the config.json.

    `dtype` is what config.json will say of the weights.

    At most one shard is held in memory besides the tensors themselves. Everything is written beside `path` first and
    then put in its place, so that a reader never finds half a checkpoint. Files of an older `path` that are not
    weights (a tokenizer, say) are kept.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        _write_shards(named_tensors, staging, max_shard_bytes)
        values = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
        (staging / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        _put_in_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_shards(named_tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(named_tensors, max_shard_bytes):
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / _SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(
    named_tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        # A copy, because safetensors refuses tensors that share storage, as the experts of one stack do.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    yield shard


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    for file in target.iterdir():
        if file.name not in ("config.json", _INDEX) and file.suffix != ".safetensors":
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, staging / file.name)
    replaced = staging.with_name(staging.name + ".replaced")
    target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced)


class CheckpointReader:
    """The tensors of a checkpoint directory, read one at a time and ticked off."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._open = contextlib.ExitStack()
        self._read: set[str] = set()
        quantization = read_json(directory / "config.json").get("quantization_config") or {}
        if quantization and quantization.get("quant_method") != "fp8":
            raise ValueError(
                f"{directory}: quant_method {quantization.get('quant_method')!r} is not supported, only fp8"
            )
        rows, columns = quantization.get("weight_block_size") or (128, 128)
        self._block = (int(rows), int(columns))

    def __enter__(self) -> CheckpointReader:
        index = self._directory / _INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: has no weight_map")
            opened = {file: self._open_file(file) for file in sorted(set(weight_map.values()))}
            self._files = {name: opened[file] for name, file in weight_map.items()}
        else:
            file = self._open_file(_SINGLE)
            self._files = dict.fromkeys(file.keys(), file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def ignore(self, name: str) -> None:
        self._read.add(name)

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor `name`, dequantised if need be; ValueError when it is missing or its shape is not `shape`."""
        self.check(name, shape)
        tensor = self._tensor(name)
        if tensor.dtype not in _FP8:
            return tensor
        try:
            return dequantise(tensor, self._tensor(f"{name}_scale_inv"), self._block)
        except ValueError as error:
            raise ValueError(f"{self._directory}: FP8 tensor {name}: {error}") from None

    def check(self, name: str, shape: torch.Size) -> None:
        """Raises ValueError when the tensor `name` is missing or its shape is not `shape`; ticks it off, unread."""
        header = self._file_of(name).get_slice(name)
        self._read.add(name)
        if header.get_dtype().startswith("F8"):
            self._read.add(f"{name}_scale_inv")
        found, wanted = tuple(header.get_shape()), tuple(shape)
        if found != wanted:
            raise ValueError(f"{self._directory}: tensor {name} has shape {found}, but config.json asks for {wanted}")

    def refuse_leftovers(self, num_layers: int) -> None:
        """Raises ValueError when the checkpoint holds tensors that the model has no place for."""
        leftovers = sorted(name for name in set(self._files) - self._read if not _is_skipped(name, num_layers))
        if leftovers:
            raise ValueError(f"{self._directory}: tensor {leftovers[0]}{_and_more(leftovers)} is not part of the model")

    def _tensor(self, name: str) -> torch.Tensor:
        file = self._file_of(name)
        self._read.add(name)
        try:
            return file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self._directory}: tensor {name} cannot be read: {error}") from None

    def _file_of(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self._directory}: tensor {name} is missing from the checkpoint")
        return self._files[name]

    def _open_file(self, file: str) -> Any:
        path = self._directory / file
        try:
            return self._open.enter_context(safetensors.safe_open(path, framework="pt"))
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def _is_skipped(name: str, num_layers: int) -> bool:
    """Multi-token prediction layers, and rotary frequencies that old checkpoints carry along."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (layer is not None and int(layer[1]) >= num_layers) or name.endswith("rotary_emb.inv_freq")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError in one sentence."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; a model path is a checkpoint's directory (names on the Hugging Face Hub are not "
            f"downloaded: hf download NAME --local-dir {path.parent}; --plan needs its config.json only)"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return values
