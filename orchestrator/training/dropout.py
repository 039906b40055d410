"""Dropout masks as a hash of (seed, layer, epoch, sample id): no random state, the same on any worker and device."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.data import keyed
from orchestrator.models.network import Masks, Network


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch computes with (it wraps around)."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _mix(values: Tensor) -> Tensor:
    """data.keyed.mix on int64 tensors; torch shifts arithmetically, so the shifted-in sign bits are cleared."""
    z = values + _GAMMA
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def mask(base: int, ids: Tensor, units: int, probability: float) -> Tensor:
    """N x units float32: 0 with `probability`, else 1 / (1 - probability). ids: N int64."""
    rows = _mix(ids ^ _signed(base))
    counters = rows[:, None] + torch.arange(units, device=ids.device)[None, :] * _GAMMA
    # The low 24 bits of the mixed counter as a fraction: exact in float32 on every device.
    uniform = (_mix(counters) & ((1 << 24) - 1)).float() * 2.0**-24
    return (uniform >= probability).float() / (1.0 - probability)


def masks(model: Network, seed: int, epoch: int, ids: Tensor) -> Masks:
    """The masks of a batch for every place of the network that drops units."""
    return {
        place: mask(keyed.key(seed, "dropout/" + place, epoch), ids, units, probability)
        for place, (units, probability) in model.dropout_units().items()
    }
