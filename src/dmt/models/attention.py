"""Attention for training on a CPU in half precision, where torch's own kernel is slow.

On processors without matrix units for bfloat16 the fused kernel of torch 2.13 takes 2 to 4 times as long, forward and
backward, as the same sums written as two batched products (256 tokens, heads of 32; EXPERIMENTS.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BATCHED = "dmt_batched"
LONGEST = 1_024
"""Tokens up to which all scores of a window are held at once."""


def batched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Causal attention as two batched products, in bfloat16 on a CPU over a whole window; anything else is torch's kernel.

    Shapes as transformers has them: `(batch, heads, time, size)` in, `(batch, time, heads, size)` out.
    """
    batch, heads, time, size = query.shape
    special = attention_mask is not None or how.get("dropout") or how.get("position_bias") is not None or how.get("cache")
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or special or key.shape[2] != time or not 1 < time <= LONGEST:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if groups := heads // key.shape[1] if heads != key.shape[1] else 0:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = how.get("scaling") or size**-0.5
    flat = [states.reshape(batch * heads, time, size) for states in (query, key, value)]
    scores = torch.baddbmm(_future(time), flat[0], flat[1].transpose(1, 2), alpha=scale)
    read = torch.bmm(torch.softmax(scores, dim=-1), flat[2])
    return read.view(batch, heads, time, size).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=4)
def _future(time: int) -> Tensor:
    return torch.full((1, time, time), float("-inf"), dtype=torch.bfloat16).triu(1)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let `model` attend by `batched` or by `sdpa`, torch's own kernel."""
    model.set_attn_implementation(BATCHED if name == "batched" else "sdpa")


AttentionInterface.register(BATCHED, batched_attention)
AttentionMaskInterface.register(BATCHED, sdpa_mask)
