"""Sampled distributions as records of one length: which outcomes, and how likely each is, in 300 bytes for 128 of 50,257.

A record is, in bytes: the low bits of the ids, ascending; their high bits in unary; a byte for each probability; three for the
scale. Ids take `k (2 + log2(V / k))` bits, near the least that k of V outcomes can take.

Source: the ids' code is that of Elias 1974 and Fano 1971 for ascending numbers.
"""

from __future__ import annotations

from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmt.distill.sampling import Sampled

CODES = 255
FINE = 65_535
SPAN = 0.5
"""Nats in which the range of a record is counted: 7 bits of them."""
FLAT = 128
"""Bit that says that nothing was there for certain; the threshold is then 1 / k and the largest probability is kept instead."""


def record_bytes(k: int, vocabulary: int) -> int:
    """Bytes of one token's record."""
    low, high = _bits(k, vocabulary)
    return -(-k * low // 8) + -(-high // 8) + k + 3


def pack(sampled: Sampled, vocabulary: int) -> NDArray[np.uint8]:
    """Records `(tokens, record_bytes)`.

    Logarithms are kept as the square of a byte over the token's range: finest where probabilities are largest.
    """
    ids, logs = sampled.ids.cpu().numpy(), sampled.logs.double().cpu().numpy()
    tokens, k = ids.shape
    low, high = _bits(k, vocabulary)
    lows = np.packbits(((ids[..., None] >> np.arange(low)) & 1).astype(np.uint8).reshape(tokens, -1), axis=-1)
    unary = np.zeros((tokens, high), np.uint8)
    np.put_along_axis(unary, (ids >> low) + np.arange(k), 1, axis=-1)
    largest = logs.max(-1, keepdims=True)
    spans = np.clip(np.ceil((largest - logs.min(-1, keepdims=True)) / SPAN), 1, FLAT - 1)
    depths = np.clip((largest - logs) / (spans * SPAN), 0, 1)
    threshold = np.log(sampled.threshold.double().cpu().numpy())
    flat = threshold > largest
    kept = np.where(flat, -largest / (2 * log(vocabulary)), (largest - threshold) / (spans * SPAN))
    fine = np.round(np.clip(kept, 0, 1) * FINE).astype(np.uint16)
    scale = np.concatenate([spans + FLAT * flat, fine & 255, fine >> 8], -1)
    codes = np.round(np.sqrt(depths) * CODES)
    return np.concatenate([lows, np.packbits(unary, axis=-1), codes.astype(np.uint8), scale.astype(np.uint8)], -1)


def unpack(records: NDArray[np.uint8], k: int, vocabulary: int) -> Sampled:
    """What was packed, ids exactly, logarithms as near as a byte tells, on the CPU.

    The largest probability is the one with which all that counts sums to one.
    """
    low, high = _bits(k, vocabulary)
    parts = np.split(records, np.cumsum([-(-k * low // 8), -(-high // 8), k]), axis=-1)
    bits = np.unpackbits(parts[0], axis=-1, count=k * low).reshape(len(records), k, low)
    lows = (bits * (1 << np.arange(low, dtype=np.int32))).sum(-1) if low else 0
    highs = np.nonzero(np.unpackbits(parts[1], axis=-1, count=high))[1].reshape(len(records), k) - np.arange(k)
    scale = torch.from_numpy(parts[3].astype(np.float32))
    flat, span = scale[:, :1] >= FLAT, scale[:, :1] % FLAT * SPAN
    fine = (scale[:, 1:2] + 256 * scale[:, 2:]) / FINE
    logs = (torch.from_numpy(parts[2].astype(np.float32)) / CODES).square_().mul_(-span)
    threshold = -fine * span
    largest = torch.where(flat, -fine * 2 * log(vocabulary), -torch.maximum(logs, threshold).logsumexp(-1, keepdim=True))
    threshold = torch.where(flat, torch.full_like(threshold, -log(k)), threshold + largest)
    return Sampled(torch.from_numpy(lows + (highs << low)), logs + largest, threshold.exp())


def _bits(k: int, vocabulary: int) -> tuple[int, int]:
    """Low bits of an id, and bits of all high parts of a record in unary."""
    low = max(0, (vocabulary // k).bit_length() - 1)
    return low, k + ((vocabulary - 1) >> low) + 1


def on(sampled: Sampled, device: torch.device | str) -> Sampled:
    """The same on another device."""
    moved: list[Tensor] = [part.to(device) for part in (sampled.ids, sampled.logs, sampled.threshold)]
    return Sampled(*moved)
