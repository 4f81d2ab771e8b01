"""Hooks that add stored facts to a model's forward pass without changing a weight.

Before a pass its text is matched with the facts (`fact_matching`); the value of each row that fires
is added to the output of one block, the value layer. What a text asks is compared in the hidden
states of another block's input, the key layer, in a pass of its own over the clause that asks.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.matching.relations import RelationMatcher
from dmt.memory.token_context import UNKNOWN_TOKEN
from dmt.models.architectures import get_architecture
from dmt.models.fact_matching import (
    FactMatch,
    FactMatcher,
    TextCodec,
    stack_values,
)
from dmt.models.forward import batch_by_length, inner_pass, pad_token_ids
from dmt.models.text_history import (
    find_cache,
    find_positions,
    find_token_ids,
    is_paged,
    read_history,
    write_history,
)
from dmt.store.fact_index import FactIndex

logger = logging.getLogger(__name__)

HOOKS_ATTRIBUTE = "facts"  # the attribute of a model that holds its `FactHooks`
HISTORY_NAME = "facts"  # of what a cache holds for the hooks

Matches = tuple[FactMatch, ...]

# Which rows fire depends on the text, so that a compiled model leaves its graphs for the hooks.
_not_compiled = torch.compiler.disable(reason="facts depend on the text")


class _PassState(threading.local):
    """What the hooks of one pass hand on to each other, one for each thread.

    Attributes:
        is_disabled: whether no row may fire.
        history: `(batch, time, 3)` ids, positions and facts of the text up to the end of the pass;
            the fact is the ID of that whose first row fired, or 0.
        matches: the rows that fire.
        recorded: the rows that fired in each pass, where they are recorded.
        states: of the key layer, while a clause is read.
        is_encoding: whether a clause is read.
    """

    is_disabled: bool = False
    history: Tensor | None = None
    matches: Matches | None = None
    recorded: list[Matches] | None = None
    states: Tensor | None = None
    is_encoding: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy starts afresh

    def clear(self) -> None:
        """Forget the pass."""
        self.history = self.matches = None


@dataclass(frozen=True)
class TrainedValues:
    """Values of rows to which gradients flow.

    Attributes:
        indices: of each row in `values`, by row ID.
        values: `(rows, width)`.
    """

    indices: dict[int, int]
    values: Tensor


class FactHooks(nn.Module):
    """The facts of one model and the hooks that apply them.

    Args:
        index: the facts.
        relations: compares what clauses ask; calibrated for the key layer.
        codec: the model's tokenizer.
        key_layer: the layer whose block input clauses are compared in.
        value_layer: the layer to whose block output values are added; not below `key_layer`.
        eos_ids: token ID or IDs that end a document; what was mentioned before does not count.
        bos_id: token ID that begins one; where it is another than those that end one, only both
            together separate documents, since a chat ends each turn.

    Threads may run the model at once, each with its own pass. A copy of the model has its own
    facts.

    Attributes:
        source_path: the database that the facts come from; None where there is none.
        trained_values: in place of the values that are stored.

    Raises:
        ValueError: `value_layer` is below `key_layer`.
    """

    def __init__(
        self,
        index: FactIndex,
        relations: RelationMatcher,
        codec: TextCodec,
        key_layer: int,
        value_layer: int,
        eos_ids: int | Sequence[int] | None,
        bos_id: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= key_layer <= value_layer:
            raise ValueError(
                f"value_layer must be key_layer={key_layer} or above, got {value_layer}"
            )
        self.matcher = FactMatcher(index, relations, codec)
        self.key_layer, self.value_layer = key_layer, value_layer
        self.eos_ids = set([eos_ids] if isinstance(eos_ids, int) else eos_ids or ())
        self.bos_id = bos_id
        self.source_path: Path | None = None
        self.trained_values: TrainedValues | None = None
        self._state = _PassState()
        self._argument_names: tuple[str, ...] = ()
        self._reported: set[str] = set()
        self._handles: list[Any] = []

    @property
    def index(self) -> FactIndex:
        """The facts."""
        return self.matcher.index

    def register(self, model: PreTrainedModel) -> None:
        """Register the hooks on `model`; `unregister` removes them."""
        arch = get_architecture(model.config.model_type)
        backbone, blocks = model.get_submodule(arch.backbone), arch.blocks(model)
        self._argument_names = tuple(inspect.signature(backbone.forward).parameters)
        # Methods, not closures: a copy of the model is hooked to its own copy of the facts.
        self._handles = [
            backbone.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            backbone.register_forward_hook(self._after_pass),
            blocks[self.key_layer].register_forward_pre_hook(self._before_key_block),
            # First, so that hooks that record a block's output see it with the facts.
            blocks[self.value_layer].register_forward_hook(self._after_value_block, prepend=True),
        ]

    @_not_compiled
    def _before_pass(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._state.is_encoding:
            return
        arguments = dict(zip(self._argument_names, args, strict=False)) | kwargs
        self._state.clear()
        if is_paged(backbone, arguments):
            self._report("the pass holds parts of several texts (continuous batching)")
            return
        past = arguments.get("past_key_values")
        tokens = find_token_ids(backbone, arguments, search=not self.index.is_empty)
        if tokens is not None:
            self._begin_pass(backbone, tokens, past, find_positions(tokens, arguments))

    @_not_compiled
    def _after_pass(self, _: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self._state.is_encoding:
            self._end_pass(find_cache(output))

    @_not_compiled
    def _before_key_block(self, _: Any, args: tuple[Any, ...]) -> None:
        if self._state.is_encoding:
            self._state.states = args[0].detach()

    @_not_compiled
    def _after_value_block(self, _: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        matches = self._state.matches
        if matches is None or self._state.is_encoding:
            return output
        if self._state.recorded is not None:
            self._state.recorded.append(matches)
        return _add_values(output, matches, self.trained_values)

    def _report(self, reason: str) -> None:
        """Warn once that facts are switched off."""
        if reason not in self._reported and not self.index.is_empty:
            self._reported.add(reason)
            logger.warning("facts are switched off: %s", reason)

    def unregister(self) -> None:
        """Remove the hooks from the model that they are registered on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Let no row fire in this thread within the context."""
        was_disabled, self._state.is_disabled = self._state.is_disabled, True
        try:
            yield
        finally:
            self._state.is_disabled = was_disabled

    @contextmanager
    def record_matches(self) -> Iterator[list[Matches]]:
        """Record which rows fire inside the block in this thread; an outer recording is paused.

        Yields:
            The matches of each pass, which grow while the block runs.
        """
        previous, recorded = self._state.recorded, list[Matches]()
        self._state.recorded = recorded
        try:
            yield recorded
        finally:
            self._state.recorded = previous

    def __len__(self) -> int:
        return len(self.index)

    def _begin_pass(
        self, backbone: nn.Module, tokens: Tensor, past: Any, positions: Tensor | None
    ) -> None:
        """Match facts with tokens that continue a cache.

        Args:
            backbone: runs the pass.
            tokens: token ids `(batch, time)`.
            past: cache of the text before them; None where there is none.
            positions: `(batch, time)`; where one does not follow the one before it, another
                document begins, of which nothing before is known. They count on where it is None.
        """
        state = self._state
        earlier = self._read_history(tokens, past)
        if positions is None:
            first = earlier[:, -1:, 1] + 1 if earlier.shape[1] else tokens.new_zeros(1, 1)
            positions = first + torch.arange(tokens.shape[1], device=tokens.device)
        no_facts = torch.zeros_like(tokens)
        new = torch.stack([tokens, positions.expand_as(tokens).to(tokens), no_facts], dim=-1)
        state.history = torch.cat([earlier, new], dim=1)
        if state.is_disabled or self.index.is_empty:
            return
        history = state.history.tolist()  # the host waits once
        ids = [[token for token, _, _ in sequence] for sequence in history]
        fired = [[fact for _, _, fact in sequence] for sequence in history]
        matches = self.matcher.match(
            ids,
            [self._find_starts(sequence) for sequence in history],
            fired,
            tokens.shape[1],
            lambda texts: self._encode_texts(backbone, texts, tokens.device),
        )
        if matches:
            state.history[..., 2] = torch.tensor(fired, device=tokens.device)
        state.matches = tuple(matches)

    def _find_starts(self, sequence: Sequence[Sequence[int]]) -> list[bool]:
        """Return whether each token begins a document, from ids and positions."""
        starts = [False]
        for (token, position, _), (next_token, next_position, _) in pairwise(sequence):
            ends = token in self.eos_ids and (
                self.bos_id is None or self.bos_id in self.eos_ids or next_token == self.bos_id
            )
            is_unknown = token == UNKNOWN_TOKEN or next_token == UNKNOWN_TOKEN
            starts.append(ends or is_unknown or next_position != position + 1)
        return starts

    def _encode_texts(
        self, backbone: nn.Module, texts: list[list[int]], device: torch.device
    ) -> Tensor:
        """Return the states `(texts, width)` of the key layer after texts, on the CPU."""
        config: Any = backbone.config
        # A clause may be longer than the text it is from: a name of many tokens stands in it.
        texts = [text[-config.max_position_embeddings :] for text in texts]
        state = self._state
        states: dict[int, Tensor] = {}
        state.is_encoding = True
        try:
            with inner_pass(backbone):
                for batch in batch_by_length([len(text) for text in texts]):
                    tokens = pad_token_ids([texts[index] for index in batch]).to(device)
                    backbone(input_ids=tokens, use_cache=False)
                    assert state.states is not None, "the key layer recorded its input"
                    rows = torch.arange(len(batch), device=device)
                    ends = torch.tensor([len(texts[index]) - 1 for index in batch], device=device)
                    chosen = state.states[rows, ends].float().cpu()
                    states |= dict(zip(batch, chosen, strict=True))
        finally:
            state.is_encoding, state.states = False, None
        return torch.stack([states[index] for index in range(len(texts))])

    def _read_history(self, tokens: Tensor, past: Any) -> Tensor:
        """Return ids, positions and facts `(batch, time, 3)` of the text in a cache."""
        history, length = read_history(past, HISTORY_NAME)
        if history is not None:
            return history.to(tokens.device)
        if length:
            self._report(
                "for text that was read before they were attached, or is in a cache that was built "
                "by hand"
            )
        history = tokens.new_full((len(tokens), length, 3), UNKNOWN_TOKEN)
        history[..., 1] = torch.arange(length, device=tokens.device)
        history[..., 2] = 0
        return history

    def _end_pass(self, past: Any) -> None:
        """Add the text to the cache of the pass."""
        history = self._state.history
        self._state.clear()
        if history is not None:
            write_history(past, HISTORY_NAME, history)


def _add_values(output: Tensor, matches: Matches, trained: TrainedValues | None = None) -> Tensor:
    """Add the values of the rows that fired to a block's output `(..., width)`."""
    if not matches:
        return output
    flat_output = output.reshape(-1, output.shape[-1])
    values = torch.from_numpy(stack_values(matches)).to(flat_output)
    for index, match in enumerate(matches if trained else ()):
        if trained and match.row_id in trained.indices:
            is_row = torch.arange(len(matches), device=values.device).unsqueeze(1) == index
            new_value = trained.values[trained.indices[match.row_id]].to(values)
            values = torch.where(is_row, new_value, values)
    tokens = torch.tensor([match.token for match in matches], device=flat_output.device)
    return flat_output.index_add(0, tokens, values).view_as(output)


def attach(model: PreTrainedModel, hooks: FactHooks) -> None:
    """Apply `hooks` in `model`'s forward pass, in place of earlier ones; `detach` ends it."""
    detach(model)
    hooks.register(model)
    setattr(model, HOOKS_ATTRIBUTE, hooks)


def detach(model: PreTrainedModel) -> None:
    """Remove the fact hooks of `model`, if it has any."""
    hooks = get_fact_hooks(model)
    if hooks is not None:
        hooks.unregister()
        delattr(model, HOOKS_ATTRIBUTE)


def get_fact_hooks(model: PreTrainedModel) -> FactHooks | None:
    """Return the fact hooks of `model`, or None."""
    hooks = getattr(model, HOOKS_ATTRIBUTE, None)
    return hooks if isinstance(hooks, FactHooks) else None


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` without its facts within the context."""
    hooks = get_fact_hooks(model)
    with nullcontext() if hooks is None else hooks.disable():
        yield


@contextmanager
def record_matches(model: PreTrainedModel) -> Iterator[list[Matches]]:
    """Collect the rows that fire in each pass within the context; none without facts."""
    hooks = get_fact_hooks(model)
    if hooks is None:
        yield []
        return
    with hooks.record_matches() as recorded:
        yield recorded
