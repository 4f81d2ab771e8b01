"""What a model says about a batch, in one typed object, so that losses know nothing of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dmt.models.architectures import architecture_of


@dataclass(frozen=True)
class Signals:
    """One model's answer to one batch of windows.

    Attributes:
        hidden: last hidden states `(batch, time, width)`, after the final norm.
        head: turns hidden states into logits `(..., vocabulary)`; kept apart so that logits can be made in chunks.
        block_inputs: what each feed-forward block or memory was given, by layer; empty unless asked for.
        block_outputs: what each answered.
        streams: the hidden state after each layer, to which that answer has been added.
    """

    hidden: Tensor
    head: nn.Module
    block_inputs: tuple[Tensor, ...] = ()
    block_outputs: tuple[Tensor, ...] = ()
    streams: tuple[Tensor, ...] = ()

    @property
    def logits(self) -> Tensor:
        """`(batch, time, vocabulary)`, made anew at each call."""
        return self.head(self.hidden)


def observe(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, blocks: bool = False, past: Cache | None = None
) -> Signals:
    """Run `model` on token ids `(batch, time)`; with `blocks`, record what enters and leaves feed-forward blocks and layers.

    Gradients flow where the caller allows them; hooks are gone when it returns.

    Args:
        past: what the model has read before, of the same batch; it grows by these tokens.
    """
    arch = architecture_of(model.config.model_type)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    hooks = []
    if blocks:
        for layer, (block, whole) in enumerate(zip(arch.blocks(model), arch.whole_layers(model), strict=True)):

            def record(_: nn.Module, given: tuple[Tensor, ...], answered: Tensor, layer: int = layer) -> None:
                inputs[layer], outputs[layer] = given[0], answered

            def follow(_: nn.Module, given: tuple[Tensor, ...], answered: Any, layer: int = layer) -> None:
                streams[layer] = answered[0] if isinstance(answered, tuple) else answered

            hooks += [block.register_forward_hook(record), whole.register_forward_hook(follow)]
    try:
        backbone = model.get_submodule(arch.backbone)
        cached: dict[str, Any] = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        hidden = backbone(tokens, attention_mask=mask, **cached).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    in_order = [tuple(found[layer] for layer in sorted(found)) for found in (inputs, outputs, streams)]
    return Signals(hidden, model.get_output_embeddings(), *in_order)


@torch.no_grad()
def observe_teacher(teacher: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, blocks: bool = False) -> Signals:
    """`observe` in eval mode and without gradient."""
    assert not teacher.training, "a teacher stays in eval mode"
    return observe(teacher, tokens, mask, blocks)
