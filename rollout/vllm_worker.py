"""What vLLM's workers can do beyond vLLM: say which weights they hold. Mixed into its worker class by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from model import checksums
from rollout.vllm_layout import absorbed, read_back


class WeightReader:
    """``worker_extension_cls`` of the engines; its methods are called with ``collective_rpc`` and return plain data."""

    model_runner: Any

    @torch.inference_mode()
    def live_checksums(self, tensors: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, int]:
        """``model.checksums`` of the weights this worker runs, under our in-memory names.

        ``tensors`` are the learner's (shape, dtype) by name. A tensor that vLLM keeps in a wider dtype is compared in
        the learner's, which loses nothing of what came from there. kv_b_proj is left out, so that it does not pass for
        verified, when the matrices that decoding uses were not made of it.
        """
        model = self.model_runner.get_model()
        # With duplicates: a module that two others hold has a name in each.
        live = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        sums = {}
        for name, tensor in read_back(live, shapes):
            sums |= checksums([(name, tensor.to(getattr(torch, tensors[name][1])))])
        for name, module in model.named_modules():
            absorbs = isinstance(getattr(module, "W_UK_T", None), torch.Tensor)
            if absorbs and not absorbed(module.kv_b_proj.weight, module.W_UK_T, module.W_UV):
                sums.pop(f"{name}.kv_b_proj.weight", None)
        return sums
