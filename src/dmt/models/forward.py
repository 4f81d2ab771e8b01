"""Forward passes that return activations: whole batches, chosen positions, and after a context."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from dmt.data.tokenizer import get_prefix_ids
from dmt.errors import UserError, format_value
from dmt.models.architectures import get_architecture

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True)
class ForwardOutputs:
    """Outputs and activations of one model on one batch of windows.

    Attributes:
        hidden: last hidden states `(batch, time, width)`, after the final norm.
        head: maps hidden states to logits `(..., vocab_size)`; separate, so that losses can
            compute logits in chunks.
        block_inputs: input of each feed-forward block or memory, by layer; empty unless captured.
        block_outputs: output of each block.
        layer_outputs: residual stream after each layer.
    """

    hidden: Tensor
    head: nn.Module
    block_inputs: tuple[Tensor, ...] = ()
    block_outputs: tuple[Tensor, ...] = ()
    layer_outputs: tuple[Tensor, ...] = ()

    @property
    def logits(self) -> Tensor:
        """Logits `(batch, time, vocab_size)`, computed at each access."""
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


class _InnerPass(threading.local):
    is_running: bool = False


_inner_pass = _InnerPass()


@contextmanager
def inner_pass(backbone: nn.Module) -> Iterator[None]:
    """Run a pass of this thread within another one, of which nothing is recorded or written.

    Args:
        backbone: in eval mode inside the block.
    """
    paused = (getattr(module, "usage_paused", None) for module in backbone.modules())
    # Not `train`: it would also switch modules that are in eval mode.
    training_modules = [module for module in backbone.modules() if module.training]
    _inner_pass.is_running = True
    try:
        with ExitStack() as stack, torch.no_grad():
            for pause in paused:
                if pause is not None:
                    stack.enter_context(pause())
            for module in training_modules:
                module.training = False
            yield
    finally:
        _inner_pass.is_running = False
        for module in training_modules:
            module.training = True


@contextmanager
def capture(
    modules: Mapping[KeyT, nn.Module],
    *,
    on_input: Callable[[KeyT, Tensor], None] | None = None,
    on_output: Callable[[KeyT, Tensor], Tensor | None] | None = None,
) -> Iterator[Activations[KeyT]]:
    """Record inputs and outputs of `modules` while the context is open.

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
            if not _inner_pass.is_running and args and isinstance(args[0], Tensor):
                activations.inputs[key] = args[0]
                if on_input is not None:
                    on_input(key, args[0])

        return record

    def post_hook(key: KeyT) -> Callable[..., Any]:
        def record(_: nn.Module, args: Any, output: Any) -> Any:
            if _inner_pass.is_running:
                return None
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


class _NoCache(Cache):
    """A cache that stores nothing: attention sees the states of the pass alone.

    Without a cache, transformers looks in the position ids for several texts in one window, and the
    host waits for the answer in each pass. Windows here never have position ids of their own.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the states `(batch, heads, time, width)` themselves."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of earlier tokens."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the first token."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many tokens are attended to, and the position of the first."""
        return query_length, 0


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
        {"use_cache": False, "past_key_values": _NoCache()}
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
    """Run `forward_with_activations` on a teacher in eval mode, without gradients."""
    assert not teacher.training, "a teacher stays in eval mode"
    return forward_with_activations(teacher, tokens, attention_mask, capture_blocks)


MAX_BATCH_TOKENS = 2_048  # of a batch of several texts, padding included
# Generation settings of a model that choose another way of decoding than one token after the other,
# or another kind of result, and the values that choose neither.
TOKENWISE_DECODING: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
    "is_assistant": False,
    "return_dict_in_generate": False,
}


def override_decoding(model: PreTrainedModel) -> dict[str, Any]:
    """Return arguments of `generate` that decode token by token, whatever a model's settings say.

    Its other generation settings stay, such as the tokens that end a text and penalties.
    """
    settings: Any = model.generation_config
    return {
        name: value
        for name, value in TOKENWISE_DECODING.items()
        if getattr(settings, name, None) not in (None, value)
    }


def encode_text(tokenizer: Any, text: str, add_prefix: bool = True) -> list[int]:
    """Return the token ids of a text, after the tokens that begin a document if `add_prefix`."""
    return (get_prefix_ids(tokenizer) if add_prefix else []) + tokenizer(
        text, add_special_tokens=False, verbose=False
    )["input_ids"]


def check_length(model: PreTrainedModel, tokenizer: Any, ids: Sequence[int], label: str) -> None:
    """Check that a model can read a text.

    Args:
        model: the model.
        tokenizer: its tokenizer, which may have more tokens than the model has embeddings.
        ids: token ids of the text.
        label: name of the text in messages.

    Raises:
        UserError: it has more tokens than the model has positions, or one that the model lacks.
    """
    max_length = model.config.max_position_embeddings
    if len(ids) > max_length:
        raise UserError(
            f"{label} has {len(ids):,} tokens, the model reads {max_length:,} at most; "
            "give a shorter text"
        )
    check_vocabulary(model, tokenizer, torch.tensor(ids), label)


def check_vocabulary(model: PreTrainedModel, tokenizer: Any, ids: Tensor, label: str) -> None:
    """Check that a model has an embedding of each token id of a text of any shape.

    Raises:
        UserError: it lacks one; the message names the token.
    """
    vocab_size = model.config.vocab_size
    beyond = ids[ids >= vocab_size]
    if memory_tokens := getattr(model.config, "memory_tokens", None):
        first = memory_tokens["first"]
        beyond = beyond[(beyond < first) | (beyond >= first + memory_tokens["count"])]
    if beyond.numel():
        token = tokenizer.convert_ids_to_tokens(int(beyond.flatten()[0]))
        raise UserError(
            f"{label} has the token {format_value(token)}, which the tokenizer has and the model "
            f"with its {vocab_size:,} embeddings does not; remove it from the text, or train a "
            "model with model.resize_token_embeddings(len(tokenizer))"
        )


@torch.no_grad()
def collect_hidden_states(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
) -> dict[int, Tensor]:
    """Collect the inputs of feed-forward blocks at chosen positions of texts.

    Args:
        model: a causal language model of a supported architecture.
        sequences: token ids of each text.
        positions: positions to collect, for each text.
        layers: layers whose block inputs are collected.

    Returns:
        States `(n, width)` by layer, in the order of the texts and of their positions.
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
    """Yield indices of texts in batches of at most `MAX_BATCH_TOKENS`, similar lengths together."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_token_ids(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Pad token ids to `(batch, time)`, on the right, which a causal model does not see."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(sequence)) for sequence in sequences], batch_first=True
    )


def forward_with_prefix(
    model: PreTrainedModel, prefix: Sequence[int], tokens: Tensor, blocks: bool = False
) -> ForwardOutputs:
    """Run `model` on `tokens` `(batch, time)` after `prefix` `(n,)`, with gradients.

    Returns:
        Outputs at the positions of `tokens` alone.
    """
    prefix_ids = torch.tensor(list(prefix), dtype=torch.long, device=tokens.device).expand(
        len(tokens), len(prefix)
    )
    outputs = forward_with_activations(
        model, torch.cat([prefix_ids, tokens], 1), capture_blocks=blocks
    )
    prefix_len = len(prefix)
    layer_states = (
        tuple(state[:, prefix_len:] for state in states)
        for states in (outputs.block_inputs, outputs.block_outputs, outputs.layer_outputs)
    )
    return ForwardOutputs(outputs.hidden[:, prefix_len:], outputs.head, *layer_states)


class ContextTeacher:
    """A model in eval mode with a context in its KV cache.

    Args:
        model: a causal language model in eval mode.
        ids: token ids `(time,)` of the context, from the start of a document.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        assert not model.training, "a teacher stays in eval mode"
        self.model, self.ids = model, list(ids)
        self._cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward_with_activations(model, self._to_tensor(self.ids), past_key_values=self._cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache: keys and values of every layer."""
        tensors: list[Any] = [
            tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)
        ]
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors
            if tensor.is_floating_point()
        )

    @torch.no_grad()
    def predict(self, tokens: Tensor, blocks: bool = False) -> ForwardOutputs:
        """Run the model on token ids `(batch, time)` after the context, padded on the right."""
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
        """Sample continuations of the context, without changing the global random state.

        Args:
            prefix: token ids that every sample begins with.
            num_samples: number of samples.
            max_length: tokens per sample at most, `prefix` included.
            temperature: sampling temperature.
            seed: random seed.
            eos_token_id: token that ends a sample; it is removed.

        Returns:
            Token ids of each sample; none where the context leaves no room.
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
            # Without a prefix, run the last context token again: its logits predict the next one.
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
                **override_decoding(self.model),
            )
        texts = output_ids[:, len(self.ids) :].tolist()
        return [
            text[: text.index(eos_token_id, len(prefix))]
            if eos_token_id is not None and eos_token_id in text[len(prefix) :]
            else text
            for text in texts
        ]

    def _copy_cache(self, batch_size: int) -> DynamicCache:
        """Copy the KV cache of the context for a batch."""
        cache = copy.deepcopy(self._cache)
        if batch_size > 1:
            cache.batch_repeat_interleave(batch_size)
        return cache

    def _to_tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)
