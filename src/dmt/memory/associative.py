"""Associative memory: kNN attention over stored rows, which is written to while it is read.

What a token retrieves among stored rows is added to the output of a base layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.config import AssociativeConfig
from dmt.distributed import all_gather, all_gather_strings, all_reduce_sum
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.featural import FeaturalMemory
from dmt.memory.insert_policy import (
    CPU,
    Comparison,
    InsertPolicy,
    apply_insert_policy,
    compare_proposals,
)
from dmt.memory.registry import register_memory
from dmt.memory.row_table import RowTable
from dmt.memory.slot_table import check_choice
from dmt.ops import CopyTask, run_copy_tasks
from dmt.store.records import IntArray, StepChanges

# What an inserted value is: a learned projection of the hidden state, the target itself, or what
# the base lacks of the target.
VALUE_TARGETS = ("projection", "teacher", "residual")
# Cosine at which a row initially weighs as much as the base: what training converged to.
INITIAL_NULL_LOGIT = 0.7
# Candidates of `calibrate_null_logit`; the last one effectively disables retrieval.
NULL_LOGIT_CANDIDATES = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.2)
# Decay of the errors of earlier passes in `calibrate_null_logit`.
ERROR_DECAY = 0.8
# Most recently written rows whose hidden states are retained, so that their projections learn.
MAX_RECENT_ROWS = 4_096


@dataclass
class PendingWrites:
    """Rows that one forward pass proposes to write.

    Attributes:
        hidden: `(tokens, width)`.
        keys: `(tokens, width)`.
        values: `(tokens, width)`; None until `set_targets` where they come from targets.
        base_output: `(tokens, width)`; None without a base.
        tag: of all of them.
    """

    hidden: Tensor
    keys: Tensor
    values: Tensor | None
    base_output: Tensor | None
    tag: str

    def select_tokens(self, mask: Tensor) -> PendingWrites:
        """Return the writes of the tokens in a mask `(tokens,)`."""
        values, base_output = (
            None if tensor is None else tensor[mask] for tensor in (self.values, self.base_output)
        )
        return PendingWrites(self.hidden[mask], self.keys[mask], values, base_output, self.tag)


@dataclass
class RetrievalStats:
    """Statistics of the reads of one memory, collected by `recording_retrieval`.

    Attributes:
        num_tokens: tokens that read.
        null_weight: weight of the base, summed over tokens.
        nearest_distances: distance of each token's nearest row, a tensor per pass.
    """

    num_tokens: int = 0
    null_weight: float = 0.0
    nearest_distances: list[Tensor] = field(default_factory=list)

    def all_reduce(self, device: torch.device) -> RetrievalStats:
        """Sum over all processes (collective: every process must call it)."""
        num_tokens, null_weight = all_reduce_sum(
            torch.tensor([self.num_tokens, self.null_weight], dtype=torch.double)
        ).tolist()
        local_distances = [distances.float() for distances in self.nearest_distances]
        nearest_distances = all_gather(torch.cat([torch.zeros(0, device=device), *local_distances]))
        return RetrievalStats(
            int(num_tokens), null_weight, [nearest_distances] if len(nearest_distances) else []
        )

    @property
    def mean_null_weight(self) -> float:
        """Mean weight of the base, from 0 to 1."""
        return self.null_weight / self.num_tokens if self.num_tokens else 1.0


@register_memory("associative", config=AssociativeConfig)
class AssociativeMemory(MemoryLayer):
    """A layer that adds the values of the stored rows nearest to a token's query to a base layer.

    Inside `writes_enabled`, a pass proposes one row per token. `commit_step` inserts the proposed
    rows, so no token sees a row of the same step, be it from later in the text, from another layer
    or from another sequence. A token's output depends on its own hidden state and on rows of
    earlier steps alone.

        layer = AssociativeMemory(width=512, k=8, base=model.mlp)
        with layer.writes_enabled(tag="chapter 1"):
            model(tokens)
        layer.commit_step()

    Keys and queries have unit length. The weights of the k rows are a softmax over
    `sharpness` x cosine, in which the base has a part too, as a row of cosine `null_logit` would:
    where nothing near is stored, the output is the base's alone.

    Args:
        width: size of a hidden state, of a key and of a value.
        k: rows read per token.
        base: layer whose output the rows are added to; None for no base. Without rows the output
            is the base's.
        value_target: what an inserted value is, one of `VALUE_TARGETS`. With `teacher` and
            `residual`, `set_targets` has to follow each pass that writes. By default `projection`.
        insert_policy: which proposals are inserted and how many rows are kept; by default
            `InsertPolicy()`.
        allocated_rows: rows to allocate at first, as many as a saved memory had.
        index: how rows are found: `exact`, `bf16`, or a kind of faiss index, `flat` or `ivf`.
        write_start: share of the training after which it writes; for the code that trains it.
        sharpness: initial factor of the cosines; it is learned.

    Raises:
        ValueError: an argument is out of range or unknown, or `residual` comes without a base.

    Source: query, key and value projections over a store that is written to as it is read, as in
        ConsciousCode/llm-experiments; compare Wu et al. 2022, arXiv 2203.08913. Gradients are
        straight-through (`straight_through_rows`). A null weight beside the rows is ours.
    """

    def __init__(
        self,
        width: int,
        k: int = 8,
        *,
        base: nn.Module | None = None,
        value_target: str = "projection",
        insert_policy: InsertPolicy | None = None,
        allocated_rows: int = 0,
        index: str = "exact",
        write_start: float = 0.0,
        sharpness: float = 20.0,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("k", k)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_choice("value_target", value_target, VALUE_TARGETS)
        if value_target == "residual" and base is None:
            raise ValueError(
                "value_target=residual stores what a base lacks and needs one; pass base=, or use "
                "value_target=teacher or projection"
            )
        if sharpness <= 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        self.width, self.k, self.value_target = width, k, value_target
        self.insert_policy = InsertPolicy() if insert_policy is None else insert_policy
        self.base = base
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width) if value_target == "projection" else None
        self.output = nn.Linear(width, width, bias=False)
        self.log_sharpness = nn.Parameter(torch.empty(()))
        self.null_logit = nn.Parameter(torch.empty(()))
        self.rows = RowTable(width, width, allocated_rows, index)
        self.sharpness, self.write_start = sharpness, write_start
        self._writing = False
        self._tag = ""
        self._retrieval_stats: RetrievalStats | None = None
        self._pending_writes: list[PendingWrites] = []
        # Positions of rows and their weights, both (n, k); -1 where there was no row.
        self._pending_reads: list[tuple[Tensor, Tensor]] = []
        self._last_retrieval: tuple[Tensor, Tensor] | None = None
        # Decayed squared error of each of `NULL_LOGIT_CANDIDATES`.
        self._null_logit_errors: Tensor | None = None
        # Hidden states (m, width) of the rows written last, and their ids (m,).
        self._recent_hidden: Tensor | None = None
        self._recent_ids: Tensor | None = None
        self._last_step, self._next_id = 0, 0
        self.reset()

    @classmethod
    def make_arguments(cls, config: AssociativeConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, and those of its base.

        Raises:
            ArgumentError: the settings of the base do not fit the block.
        """
        return {
            "k": config.knn_k,
            "value_target": config.value_target,
            "insert_policy": {
                "min_distance": config.min_distance,
                "merge_distance": config.merge_distance,
                "capacity": config.capacity,
                "decay": config.lrfu_decay,
            },
            "allocated_rows": 0,
            "index": config.index,
            "write_start": config.write_start,
            "base": FeaturalMemory.make_arguments(config, block) if config.has_slots else None,
        }

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        base = arguments["base"]
        return cls(
            width,
            **{
                **arguments,
                "base": None if base is None else FeaturalMemory.from_arguments(width, gated, base),
                "insert_policy": InsertPolicy(**arguments["insert_policy"]),
            },
        )

    def saved_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` with the rows that are allocated now."""
        return {**arguments, "allocated_rows": self.rows.allocated_rows}

    @property
    def block_slots(self) -> int | None:
        """Neurons that `load_block` wants the block to have."""
        return self.base.block_slots if isinstance(self.base, MemoryLayer) else None

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Copy the neurons of a feed-forward block into the slots of the base."""
        if not isinstance(self.base, MemoryLayer):
            return {}
        return {name: f"base.{target}" for name, target in self.base.load_block(tensors).items()}

    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set from text what the base needs."""
        if isinstance(self.base, MemoryLayer):
            self.base.calibrate(hidden, target)

    @torch.no_grad()
    def reset(self) -> None:
        """Make all projections identities and remove all rows."""
        for projection in (self.query, self.key, self.value, self.output):
            if projection is not None:
                nn.init.eye_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        self.log_sharpness.fill_(math.log(self.sharpness))
        self.null_logit.fill_(INITIAL_NULL_LOGIT)
        self.rows.reset()

    @torch.no_grad()
    def center(self, hidden: Tensor) -> None:
        """Center queries and keys on the mean of `hidden` `(tokens, width)`, which all share."""
        for projection in (self.query, self.key):
            projection.bias.copy_(-projection.weight @ hidden.mean(0))

    @property
    def is_writing(self) -> bool:
        """Whether passes propose rows."""
        return self._writing

    @contextmanager
    def writes_enabled(self, tag: str = "") -> Iterator[None]:
        """Propose a row per token in each pass inside the block; `commit_step` inserts them.

        Where the block raises, what its passes read and proposed is dropped.

        Args:
            tag: stored with the rows.
        """
        previous = self._writing, self._tag
        self._writing, self._tag = True, tag
        try:
            yield
        except BaseException:
            self.drop_pending()
            raise
        finally:
            self._writing, self._tag = previous

    @contextmanager
    def recording_retrieval(self) -> Iterator[RetrievalStats]:
        """Collect statistics of reads inside the block; an outer recording is paused.

        Yields:
            The statistics, which grow while the block runs.
        """
        previous, self._retrieval_stats = self._retrieval_stats, RetrievalStats()
        try:
            yield self._retrieval_stats
        finally:
            self._retrieval_stats = previous

    @contextmanager
    def usage_paused(self) -> Iterator[None]:
        """Count no reads and write no rows inside the block."""
        previous = self._retrieval_stats, self._writing
        self._retrieval_stats, self._writing = None, False
        try:
            yield
        finally:
            self._retrieval_stats, self._writing = previous

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        base = None if self.base is None else self.base(hidden).reshape(-1, self.width)
        if self._writing:
            self._queue_writes(flat, None if base is None else base.detach())
        if self._retrieval_stats is not None:
            self._retrieval_stats.num_tokens += len(flat)
            self._retrieval_stats.null_weight += 0 if len(self.rows) else len(flat)
        # A compiled model searches whatever rows are there, since it cannot look at their ids.
        is_compiling = torch.compiler.is_compiling()
        if self.rows.allocated_rows if is_compiling else len(self.rows):
            return self._read_rows(flat, base).view_as(hidden)
        if base is None:
            base = self.output(torch.zeros_like(flat))  # zeros that are part of the graph
        return base.view_as(hidden)

    def _read_rows(self, hidden: Tensor, base: Tensor | None) -> Tensor:
        queries = F.normalize(self.query(hidden), dim=-1)
        matches = self.rows.search(queries, self.k)
        valid = matches.distances.isfinite()
        keys, values = self.rows.keys[matches.indices], self.rows.values[matches.indices]
        if torch.is_grad_enabled():
            recent_keys, recent_values, origins = self._project_recent_rows(matches.indices, valid)
            keys, values = straight_through_rows(
                queries, recent_keys, recent_values, keys, values, origins
            )
        scores = torch.einsum("nd,nkd->nk", queries, keys.to(queries.dtype))
        scores = scores.masked_fill(~valid, -torch.inf)
        weights = self._compute_weights(scores)
        if self._retrieval_stats is not None:
            self._retrieval_stats.null_weight += len(weights) - float(weights.detach().sum())
            self._retrieval_stats.nearest_distances.append(matches.distances[:, 0].sqrt())
        if self._writing:
            read_indices = matches.indices.masked_fill(~valid, -1)
            self._pending_reads.append((read_indices.flatten(), weights.detach().flatten()))
            if not torch.is_grad_enabled():  # training never calls calibrate_null_logit
                self._last_retrieval = scores, matches.indices
        return self._combine_outputs(base, weights, values)

    def _combine_outputs(self, base: Tensor | None, weights: Tensor, values: Tensor) -> Tensor:
        """Add the rows' output to the base's; rows that hold full targets replace their share."""
        retrieved: Tensor = self.output(
            torch.einsum("nk,nkw->nw", weights, values.to(weights.dtype))
        )
        if base is None:
            return retrieved
        return retrieved + (
            base if self.value_target != "teacher" else base * (1 - weights.sum(-1, keepdim=True))
        )

    def _compute_weights(self, cosines: Tensor, null_logit: Tensor | None = None) -> Tensor:
        """Compute the weights of rows `(n, k)` beside a base that counts as one more row."""
        null_logit = self.null_logit if null_logit is None else null_logit
        null_logits = null_logit.to(cosines.dtype).expand(cosines.shape[0], 1)
        cosines = torch.cat([cosines, null_logits], dim=1)
        return (cosines * self.log_sharpness.exp()).softmax(-1)[:, :-1]

    @torch.no_grad()
    def select_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows are read for `hidden` `(tokens, width)`.

        Returns:
            Positions in `rows` and weights, both `(tokens, k)`; weight 0 where there is no row.
        """
        queries = F.normalize(self.query(hidden), dim=-1)
        matches = self.rows.search(queries, self.k)
        keys = self.rows.keys[matches.indices].to(queries.dtype)
        cosines = torch.einsum("nd,nkd->nk", queries, keys)
        return matches.indices, self._compute_weights(
            cosines.masked_fill(matches.distances.isinf(), -torch.inf)
        )

    def _project_recent_rows(self, indices: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the rows written last again, so that their projections receive gradients.

        Args:
            indices: positions of retrieved rows, `(n, k)`.
            valid: which of them exist, `(n, k)`.

        Returns:
            Keys and values `(m, width)`, and which of the m each retrieved row is, -1 for none.
        """
        no_origin = torch.full_like(indices, -1)
        if self._recent_hidden is None or self._recent_ids is None or not len(self._recent_hidden):
            # Projected too: where several processes train, each parameter needs a gradient.
            return *self._project_rows(self.key.weight.new_zeros(0, self.width)), no_origin
        self._recent_hidden = self._recent_hidden.to(indices.device)
        self._recent_ids = self._recent_ids.to(indices.device)
        row_ids = self.rows.ids[indices]
        order = self._recent_ids.argsort()
        sorted_ids = self._recent_ids[order]
        sorted_positions = torch.searchsorted(sorted_ids, row_ids).clamp_max(len(order) - 1)
        is_recent = (sorted_ids[sorted_positions] == row_ids) & valid
        origins = torch.where(is_recent, order[sorted_positions], no_origin)
        return *self._project_rows(self._recent_hidden), origins

    def _project_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project hidden states `(m, width)` to keys and, if values are projections, to values."""
        keys = F.normalize(self.key(hidden), dim=-1)
        return keys, torch.zeros_like(keys).detach() if self.value is None else self.value(hidden)

    @torch.no_grad()
    def _queue_writes(self, hidden: Tensor, base: Tensor | None) -> None:
        keys = F.normalize(self.key(hidden), dim=-1)
        values = None if self.value is None else self.value(hidden).float()
        self._pending_writes.append(
            PendingWrites(hidden.detach(), keys.float(), values, base, self._tag)
        )

    @torch.no_grad()
    def set_targets(self, targets: Tensor, mask: Tensor | None = None) -> None:
        """Set what the last pass inside `writes_enabled` should have returned.

        The values of its rows follow from it, unless `value_target="projection"`.

        Args:
            targets: `(..., width)`.
            mask: `(...)`, the tokens that propose a row; all of them by default.

        Raises:
            ValueError: no pass has proposed rows.
        """
        if not self._pending_writes:
            raise ValueError("call set_targets after a pass inside writes_enabled()")
        targets = targets.reshape(-1, self.width)
        if mask is not None:
            self._pending_writes[-1] = self._pending_writes[-1].select_tokens(mask.flatten())
            targets = targets[mask.flatten()]
        pending = self._pending_writes[-1]
        if self.value is None:
            values = targets.float()
            pending.values = (
                values
                if self.value_target == "teacher" or pending.base_output is None
                else values - pending.base_output.float()
            )

    @torch.no_grad()
    def calibrate_null_logit(self) -> None:
        """Set the null logit that would have served recent passes best; after `set_targets`.

        It is judged on text whose own rows were not stored yet, so few rows do no harm and many
        are used. For writing without training.
        """
        pending_writes, retrieval = self._pending_writes, self._last_retrieval
        self._last_retrieval = None
        if not pending_writes or pending_writes[-1].values is None or self.value is not None:
            return
        if retrieval is None:
            if not len(self.rows):  # the first rows are hardly used before they were judged
                self.null_logit.fill_(NULL_LOGIT_CANDIDATES[-1])
            return
        pending, (cosines, indices) = pending_writes[-1], retrieval
        assert pending.values is not None, "checked above"
        values = self.rows.values[indices]
        targets = (
            pending.values
            if self.value_target == "teacher" or pending.base_output is None
            else pending.values + pending.base_output
        )
        errors = []
        for candidate in NULL_LOGIT_CANDIDATES:
            weights = self._compute_weights(cosines, torch.tensor(candidate, device=cosines.device))
            output = self._combine_outputs(pending.base_output, weights, values)
            errors.append((targets - output.float()).square().sum())
        candidate_errors = torch.stack(errors)
        self._null_logit_errors = (
            candidate_errors
            if self._null_logit_errors is None
            else ERROR_DECAY * self._null_logit_errors.to(candidate_errors) + candidate_errors
        )
        self.null_logit.fill_(NULL_LOGIT_CANDIDATES[int(self._null_logit_errors.argmin())])

    def drop_pending(self) -> None:
        """Drop what passes since the last step have read and proposed."""
        self._pending_writes, self._pending_reads, self._last_retrieval = [], [], None

    def commit_step(
        self,
        step: int | None = None,
        now: float | None = None,
        allocate_ids: Callable[[int], IntArray] | None = None,
    ) -> StepChanges:
        """End a step: record its reads and insert its proposed rows by the policy.

        With several processes each sees what all of them read and proposed, so all end with the
        same rows; the arguments have to be the same in each.

        Args:
            step: number of the step that ends; by default one more than at the last call.
            now: seconds since 1970; by default the current time.
            allocate_ids: returns so many ids that no row has or had; by default consecutive ones.

        Returns:
            The rows that were inserted and removed, for a store; without usage.

        Raises:
            ValueError: targets are missing, or a key or value is not finite.
        """
        return run_copy_tasks([self.commit_step_task(step, now, allocate_ids)])[0]

    @torch.no_grad()
    def commit_step_task(
        self,
        step: int | None = None,
        now: float | None = None,
        allocate_ids: Callable[[int], IntArray] | None = None,
    ) -> CopyTask[StepChanges]:
        """Do what `commit_step` does, as a task of `run_copy_tasks`.

        No rows are changed before the rows of all tasks beside it were found to be finite.
        """
        if step is None:
            last_used = int(self.rows.stats.score_step.max(initial=0))
            step = max(self._last_step, last_used) + 1
        self._last_step = step
        now = time.time() if now is None else now
        pending_writes, reads = self._pending_writes, self._pending_reads
        self.drop_pending()
        if any(pending.values is None for pending in pending_writes):
            raise ValueError(
                f"value_target={self.value_target} needs a target for each row: call set_targets "
                "after each pass inside writes_enabled()"
            )
        no_states, no_indices = self.rows.keys.new_zeros(0, self.width), self.rows.ids.new_zeros(0)
        indices = all_gather(torch.cat([no_indices, *(read_indices for read_indices, _ in reads)]))
        weights = all_gather(
            torch.cat([no_states.new_zeros(0), *(weight.float() for _, weight in reads)])
        )
        keys, values, hidden = (
            all_gather(
                torch.cat(
                    [no_states, *(getattr(pending, name).float() for pending in pending_writes)]
                )
            )
            for name in ("keys", "values", "hidden")
        )
        tags = all_gather_strings(
            [pending.tag for pending in pending_writes for _ in range(len(pending.keys))]
        )
        comparison = compare_proposals(self.rows, keys, values, self.insert_policy)
        indices, weights, *comparison = yield [indices, weights, *comparison], CPU
        is_read = indices >= 0
        self.rows.record_reads(
            indices[is_read].numpy(),
            weights[is_read].double().numpy(),
            step,
            now,
            self.insert_policy.decay,
        )
        result = yield from apply_insert_policy(
            self.rows,
            keys,
            values,
            Comparison(*comparison),
            tags,
            self.insert_policy,
            step,
            now,
            self._allocate_ids if allocate_ids is None else allocate_ids,
        )
        self._record_recent_rows(hidden[result.unmerged_candidates], result.unmerged_ids)
        return result.changes

    def _allocate_ids(self, count: int) -> IntArray:
        first = max(self._next_id, max(self.rows.index_by_id, default=0) + 1)
        self._next_id = first + count
        return np.arange(first, first + count, dtype=np.int64)

    def _record_recent_rows(self, hidden: Tensor, ids: Tensor) -> None:
        """Retain the hidden states `(n, width)` from which the rows `ids` `(n,)` were made."""
        if self._recent_hidden is not None and self._recent_ids is not None:
            hidden = torch.cat([self._recent_hidden.to(hidden), hidden])
            ids = torch.cat([self._recent_ids.to(ids), ids])
        self._recent_hidden = hidden[-MAX_RECENT_ROWS:]
        self._recent_ids = ids[-MAX_RECENT_ROWS:]

    def recent_hidden(self) -> tuple[Tensor, Tensor]:
        """Return the hidden states `(m, width)` of the rows written last and their ids `(m,)`."""
        if self._recent_hidden is None or self._recent_ids is None:
            return torch.zeros(0, self.width), torch.zeros(0, dtype=torch.long)
        return self._recent_hidden.cpu().clone(), self._recent_ids.cpu().clone()

    def set_recent_hidden(self, hidden: Tensor, ids: Tensor) -> None:
        """Restore what `recent_hidden` returned."""
        device = self.rows.keys.device
        self._recent_hidden, self._recent_ids = hidden.to(device), ids.to(device)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"width={self.width}, k={self.k}, value_target={self.value_target}, "
            f"rows={len(self.rows)} of {self.insert_policy.capacity}"
        )


@contextmanager
def enable_writes(memories: Iterable[AssociativeMemory], tag: str = "") -> Iterator[None]:
    """Enter `writes_enabled` of several memories."""
    with ExitStack() as stack:
        for memory in memories:
            stack.enter_context(memory.writes_enabled(tag))
        yield


@contextmanager
def record_retrieval(
    memories: Mapping[int, AssociativeMemory],
) -> Iterator[dict[int, RetrievalStats]]:
    """Collect statistics of the reads of several memories inside the block.

    Args:
        memories: by layer.

    Yields:
        Statistics by layer, which grow while the block runs.
    """
    with ExitStack() as stack:
        yield {
            layer: stack.enter_context(memory.recording_retrieval())
            for layer, memory in memories.items()
        }


def straight_through_rows(
    queries: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    keys: Tensor,
    values: Tensor,
    origins: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `keys` and `values` with straight-through gradients to what they came from.

    A search cannot be differentiated. A retrieved key is the query plus noise, and also the key
    once inserted plus noise. So each query receives the sum of the gradients of the keys returned
    to it, an inserted key the gradient of the keys retrieved from it, and an inserted value that
    of the values.

    Args:
        queries: `(n, key width)`.
        recent_keys: of the rows inserted last, `(m, key width)`, projected with current weights.
        recent_values: of the same rows, `(m, value width)`.
        keys: retrieved, `(n, k, key width)`.
        values: retrieved, `(n, k, value width)`.
        origins: `(n, k)`, which of the m rows each was, -1 for none of them.

    Source: straight-through estimation, Bengio et al. 2013, arXiv 1308.3432, applied to a store
        that is searched.
    """
    return _StraightThroughRows.apply(queries, recent_keys, recent_values, keys, values, origins)  # type: ignore[no-any-return,no-untyped-call]


class _StraightThroughRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        recent_keys: Tensor,
        recent_values: Tensor,
        keys: Tensor,
        values: Tensor,
        origins: Tensor,
    ) -> Any:
        ctx.save_for_backward(origins)
        ctx.recent_shapes = recent_keys.shape, recent_values.shape
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (origins,) = ctx.saved_tensors
        grad_keys, grad_values = grad_outputs
        # Gradients without an origin are added to one more row, which is dropped. Leaving them out
        # would make the host wait for their number.
        recent_grads = []
        for (num_recent, width), grad in zip(ctx.recent_shapes, grad_outputs, strict=True):
            targets = torch.where(origins >= 0, origins, num_recent).flatten()
            sums = grad.new_zeros(num_recent + 1, width)
            recent_grads.append(sums.index_add(0, targets, grad.flatten(0, 1))[:num_recent])
        return grad_keys.sum(1), recent_grads[0], recent_grads[1], grad_keys, grad_values, None
