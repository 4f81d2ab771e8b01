"""A model that has read something: what it says about texts from there on, and what it goes on with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from dmt.distill.signals import Signals, observe


def after(model: PreTrainedModel, before: Sequence[int], tokens: Tensor, blocks: bool = False) -> Signals:
    """What `model` says of token ids `(batch, time)` that follow `before` `(n,)`: signals of those tokens alone, with gradient."""
    start = torch.tensor(list(before), dtype=torch.long, device=tokens.device).expand(len(tokens), len(before))
    seen = observe(model, torch.cat([start, tokens], 1), blocks=blocks)
    count = len(before)
    parts = (tuple(state[:, count:] for state in states) for states in (seen.block_inputs, seen.block_outputs, seen.streams))
    return Signals(seen.hidden[:, count:], seen.head, *parts)


class Hearing:
    """A model in eval mode that has read `ids` once and keeps what it remembers of them.

    Args:
        ids: token ids `(time,)`, from the start of a document on.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        assert not model.training, "a teacher stays in eval mode"
        self.model, self.ids = model, list(ids)
        self._cache = DynamicCache(config=model.config)
        with torch.no_grad():
            observe(model, self._tensor(self.ids), past=self._cache)

    @property
    def bytes(self) -> int:
        """What keeping the read text takes: keys and values of every layer."""
        held: list[Tensor] = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]  # type: ignore[misc]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.is_floating_point())

    @torch.no_grad()
    def signals(self, tokens: Tensor, blocks: bool = False) -> Signals:
        """What the model says of token ids `(batch, time)` that follow, padded on the right."""
        return observe(self.model, tokens, blocks=blocks, past=self._for(len(tokens)))

    @torch.no_grad()
    def sample(
        self, opener: Sequence[int], count: int, length: int, temperature: float, seed: int, end: int | None
    ) -> list[list[int]]:
        """`count` texts of at most `length` tokens that begin with `opener`, drawn; without the token that ends a text.

        The generator of everybody else's random numbers is left where it was.
        """
        room = min(length - len(opener), self.model.config.max_position_embeddings - len(self.ids) - len(opener))
        if room < 1:
            return []
        given = self._tensor([*self.ids, *opener]).repeat(count, 1)
        how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        device = self._tensor([0]).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # Of what has been read the last token is read again: somebody has to be asked what comes next.
            past = self._for(count)
            if not opener:
                past.crop(-1)
            said = self.model.generate(  # type: ignore[operator]
                given, attention_mask=torch.ones_like(given), past_key_values=past, max_new_tokens=room,
                eos_token_id=end, pad_token_id=end if end is not None else 0, **how,
            )  # fmt: skip
        texts = said[:, len(self.ids) :].tolist()
        return [text[: text.index(end, len(opener))] if end is not None and end in text[len(opener) :] else text for text in texts]

    def _for(self, count: int) -> DynamicCache:
        """What was read, for so many texts."""
        cache = copy.deepcopy(self._cache)
        if count > 1:
            cache.batch_repeat_interleave(count)
        return cache

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)
