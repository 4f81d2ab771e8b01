"""A model that has read something: what it says about texts from there on, and what it goes on with.

What a model says about a batch, in one typed object, so that losses know nothing of models.

Hidden states of a model at the places that matter to facts, in padded batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from dmt.data.windows import get_prefix_ids
from dmt.errors import UserError
from dmt.models.architectures import get_architecture

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True)
class ForwardOutputs:
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
    layer_outputs: tuple[Tensor, ...] = ()

    @property
    def logits(self) -> Tensor:
        """`(batch, time, vocabulary)`, made anew at each call."""
        return self.head(self.hidden)


@dataclass
class Activations(Generic[KeyT]):
    """Activations of modules, by the key under which each module was passed to `capture`.

    Attributes:
        inputs: first positional argument of each module's last call.
        outputs: output of each module's last call, of a tuple its first element.
    """

    inputs: dict[KeyT, Tensor] = field(default_factory=dict)
    outputs: dict[KeyT, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    modules: Mapping[KeyT, nn.Module],
    *,
    on_input: Callable[[KeyT, Tensor], None] | None = None,
    on_output: Callable[[KeyT, Tensor], Tensor | None] | None = None,
) -> Iterator[Activations[KeyT]]:
    """Record inputs and outputs of `modules` while the context is open; the hooks are removed after.

    Args:
        modules: modules by any key, such as blocks by layer.
        on_input: called with key and input before a module runs.
        on_output: called with key and output after a module ran; a tensor that it returns
            replaces the output.

    Yields:
        The activations; dictionaries are in the order of the first call.
    """
    activations: Activations[KeyT] = Activations()

    def pre_hook(key: KeyT) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                activations.inputs[key] = args[0]
                if on_input is not None:
                    on_input(key, args[0])

        return record

    def post_hook(key: KeyT) -> Callable[..., Any]:
        def record(_: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = None if on_output is None else on_output(key, hidden)
            activations.outputs[key] = hidden if edited is None else edited
            if edited is None or not isinstance(output, tuple):
                return edited
            return (edited, *output[1:])

        return record

    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_pre_hook(pre_hook(key)))
            handles.append(module.register_forward_hook(post_hook(key)))
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def forward_with_activations(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    capture_blocks: bool = False,
    past_key_values: Cache | None = None,
) -> ForwardOutputs:
    """Run `model` on token ids `(batch, time)`; gradients flow where the caller allows them.

    Args:
        model: a causal language model of a supported architecture.
        tokens: token ids `(batch, time)`.
        attention_mask: as transformers has it.
        capture_blocks: whether to record the inputs and outputs of feed-forward blocks and the
            outputs of layers.
        past_key_values: cache of the same batch; it grows by these tokens.
    """
    arch = get_architecture(model.config.model_type)
    backbone = model.get_submodule(arch.backbone)
    cache_kwargs: dict[str, Any] = (
        {"use_cache": False}
        if past_key_values is None
        else {"use_cache": True, "past_key_values": past_key_values}
    )
    block_modules: list[Any] = list(arch.blocks(model)) if capture_blocks else []
    layer_modules: list[Any] = list(arch.transformer_blocks(model)) if capture_blocks else []
    with (
        capture(dict(enumerate(block_modules))) as blocks,
        capture(dict(enumerate(layer_modules))) as layers,
    ):
        hidden = backbone(tokens, attention_mask=attention_mask, **cache_kwargs).last_hidden_state
    return ForwardOutputs(
        hidden,
        model.get_output_embeddings(),
        tuple(blocks.inputs.values()),
        tuple(blocks.outputs.values()),
        tuple(layers.outputs.values()),
    )


@torch.no_grad()
def forward_teacher(
    teacher: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    capture_blocks: bool = False,
) -> ForwardOutputs:
    """`observe` in eval mode and without gradient."""
    assert not teacher.training, "a teacher stays in eval mode"
    return forward_with_activations(teacher, tokens, attention_mask, capture_blocks)


MAX_BATCH_TOKENS = 2_048
"""Tokens, padding included, that a batch has at most where it has more than one text."""


def encode_text(tokenizer: Any, text: str, add_prefix: bool = True) -> list[int]:
    """Token ids of a text, with the token that begins a document where `start`."""
    return (get_prefix_ids(tokenizer) if add_prefix else []) + tokenizer(
        text, add_special_tokens=False, verbose=False
    )["input_ids"]


def check_length(model: PreTrainedModel, ids: Sequence[int], label: str) -> None:
    """Raise `UserError` where `what` has more tokens than the model has positions."""
    max_length = model.config.max_position_embeddings
    if len(ids) > max_length:
        raise UserError(
            f"{label} has {len(ids):,} tokens, the model reads {max_length:,} at most; give a shorter text"
        )


@torch.no_grad()
def collect_hidden_states(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
) -> dict[int, Tensor]:
    """What the feed-forward block of each of `layers` is given, `(n, width)`, at the `wanted` positions of `texts` (token ids).

    In the order of the texts, and of the positions of each.
    """
    states_by_layer: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    device = next(model.parameters()).device
    for batch in batch_by_length([len(sequence) for sequence in sequences]):
        outputs = forward_with_activations(
            model, pad_token_ids([sequences[i] for i in batch]).to(device), capture_blocks=True
        )
        rows = torch.tensor(
            [batch_index for batch_index, i in enumerate(batch) for _ in positions[i]],
            device=device,
        )
        columns = torch.tensor(
            [position for i in batch for position in positions[i]], device=device
        )
        for layer in layers:
            states_by_layer[layer].append(outputs.block_inputs[layer][rows, columns])
        order += batch
    restore_order = torch.tensor([i for i in order for _ in positions[i]], device=device).argsort(
        stable=True
    )
    return {layer: torch.cat(states)[restore_order] for layer, states in states_by_layer.items()}


def batch_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts in batches of about `TOKENS` tokens, those of like length together."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_token_ids(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `(batch, time)`; padding stands on the right, where a causal model cannot see it."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(sequence)) for sequence in sequences], batch_first=True
    )


def forward_with_prefix(
    model: PreTrainedModel, prefix: Sequence[int], tokens: Tensor, blocks: bool = False
) -> ForwardOutputs:
    """What `model` says of token ids `(batch, time)` that follow `before` `(n,)`: signals of those tokens alone, with gradient."""
    prefix_ids = torch.tensor(list(prefix), dtype=torch.long, device=tokens.device).expand(
        len(tokens), len(prefix)
    )
    signals = forward_with_activations(
        model, torch.cat([prefix_ids, tokens], 1), capture_blocks=blocks
    )
    prefix_len = len(prefix)
    layer_states = (
        tuple(state[:, prefix_len:] for state in states)
        for states in (signals.block_inputs, signals.block_outputs, signals.layer_outputs)
    )
    return ForwardOutputs(signals.hidden[:, prefix_len:], signals.head, *layer_states)


class ContextTeacher:
    """A model in eval mode that has read `ids` once and keeps what it remembers of them.

    Args:
        ids: token ids `(time,)`, from the start of a document on.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        assert not model.training, "a teacher stays in eval mode"
        self.model, self.ids = model, list(ids)
        self._cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward_with_activations(model, self._to_tensor(self.ids), past_key_values=self._cache)

    @property
    def cache_bytes(self) -> int:
        """What keeping the read text takes: keys and values of every layer."""
        tensors: list[Tensor] = [
            tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)
        ]  # type: ignore[misc]
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors
            if tensor.is_floating_point()
        )

    @torch.no_grad()
    def predict(self, tokens: Tensor, blocks: bool = False) -> ForwardOutputs:
        """What the model says of token ids `(batch, time)` that follow, padded on the right."""
        return forward_with_activations(
            self.model, tokens, capture_blocks=blocks, past_key_values=self._copy_cache(len(tokens))
        )

    @torch.no_grad()
    def sample(
        self,
        prefix: Sequence[int],
        num_samples: int,
        max_length: int,
        temperature: float,
        seed: int,
        eos_token_id: int | None,
    ) -> list[list[int]]:
        """`count` texts of at most `length` tokens that begin with `opener`, drawn; without the token that ends a text.

        The generator of everybody else's random numbers is left where it was.
        """
        max_new_tokens = min(
            max_length - len(prefix),
            self.model.config.max_position_embeddings - len(self.ids) - len(prefix),
        )
        if max_new_tokens < 1:
            return []
        input_ids = self._to_tensor([*self.ids, *prefix]).repeat(num_samples, 1)
        sampling_args: dict[str, Any] = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
        }
        device = self._to_tensor([0]).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # Of what has been read the last token is read again: somebody has to be asked what comes next.
            past = self._copy_cache(num_samples)
            if not prefix:
                past.crop(-1)
            output_ids = self.model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=past,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                pad_token_id=eos_token_id if eos_token_id is not None else 0,
                **sampling_args,
            )
        texts = output_ids[:, len(self.ids) :].tolist()
        return [
            text[: text.index(eos_token_id, len(prefix))]
            if eos_token_id is not None and eos_token_id in text[len(prefix) :]
            else text
            for text in texts
        ]

    def _copy_cache(self, batch_size: int) -> DynamicCache:
        """What was read, for so many texts."""
        cache = copy.deepcopy(self._cache)
        if batch_size > 1:
            cache.batch_repeat_interleave(batch_size)
        return cache

    def _to_tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)
