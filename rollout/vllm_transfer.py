"""Tensors on this process's GPU, offered to vLLM's ``ipc`` weight transfer: handles instead of bytes."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from model import split_experts


def transfer_info(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The ``update_info`` of one update, from CUDA tensors under in-memory names.

    The tensors' memory stays valid until the receiver has let go of it, whatever becomes of them here.
    """
    named = [pair for name, tensor in tensors.items() for pair in split_experts(name, tensor.contiguous())]
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    handles = [{uuid: reduce_tensor(tensor)[1]} for _, tensor in named]  # vLLM knows which function rebuilds them
    return {
        "names": [name for name, _ in named],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
        "shapes": [list(tensor.shape) for _, tensor in named],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
