"""Rotary position embedding, plain or stretched by YaRN, in MLA's interleaved and the indexer's half-split layout."""

from __future__ import annotations

import math

import torch

from model.config import ModelConfig, YarnScaling


class Rope:
    """Angles of one model. Not a module: it holds no weights and follows the device of the positions."""

    def __init__(self, config: ModelConfig) -> None:
        scaling = config.rope_scaling
        dim = config.qk_rope_head_dim
        self._frequencies = {torch.device("cpu"): inverse_frequencies(dim, config.rope_theta, scaling)}
        self._magnitude = 1.0 if scaling is None else _attention_factor(scaling)

    def __call__(self, positions: torch.Tensor) -> RotaryAngles:
        """The angles at `positions` (int [B, T]): cosine and sine, each fp32 [B, T, qk_rope_head_dim / 2]."""
        frequencies = self._frequencies.get(positions.device)
        if frequencies is None:
            frequencies = self._frequencies[torch.device("cpu")].to(positions.device)
            self._frequencies[positions.device] = frequencies
        angles = positions.unsqueeze(-1).float() * frequencies
        return RotaryAngles(angles.cos() * self._magnitude, angles.sin() * self._magnitude)


class RotaryAngles:
    """Rotates heads by the angles of their positions."""

    __slots__ = ("_cos", "_sin")

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._cos, self._sin = cos.unsqueeze(2), sin.unsqueeze(2)

    def of_tokens(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every token of a batch [B, T], each fp32 [B, T, qk_rope_head_dim / 2]."""
        return self._cos.squeeze(2).expand(*shape, -1), self._sin.squeeze(2).expand(*shape, -1)

    def rotate_interleaved(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotates the pairs (x0, x1), (x2, x3), ... of heads [B, T, H, dim].

        The result lists all first members, then all second ones. Queries and keys are permuted alike, which leaves
        their products as they are.
        """
        return self._rotate(heads[..., 0::2], heads[..., 1::2], heads.dtype)

    def rotate_half_split(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotates the pairs (x0, x[d/2]), (x1, x[d/2 + 1]), ... of heads [B, T, H, d], in place of themselves."""
        first, second = heads.chunk(2, dim=-1)
        return self._rotate(first, second, heads.dtype)

    def _rotate(self, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rotated = (first * self._cos - second * self._sin, second * self._cos + first * self._sin)
        return torch.cat(rotated, dim=-1).to(dtype)


def inverse_frequencies(dim: int, theta: float, scaling: YarnScaling | None) -> torch.Tensor:
    """Radians per position of every pair, fp32 [dim / 2]."""
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None:
        return plain
    low = _pair_with_rotations(scaling.beta_fast, dim, theta, scaling)
    high = _pair_with_rotations(scaling.beta_slow, dim, theta, scaling)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    # 0 for the fast pairs, which keep their frequency, rising to 1 for the slow ones, which are stretched in full.
    stretch = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * stretch + plain * (1 - stretch)


def softmax_scale(config: ModelConfig) -> float:
    """MLA's scale on query-key products: qk_head_dim ** -0.5, times YaRN's magnitude squared."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * scaling.magnitude(scaling.mscale_all_dim) ** 2


def _pair_with_rotations(rotations: float, dim: int, theta: float, scaling: YarnScaling) -> float:
    """The (fractional) pair index that turns `rotations` times over the original context."""
    wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
    return dim * math.log(wavelength) / (2 * math.log(theta))


def _attention_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
    return scaling.magnitude()
