"""Associative memory: a layer that remembers. What a token finds among stored rows is added to what a base says.

Gradients through a search, which has none: straight through, from what came back to what was asked and what was kept.

What a pass through an associative memory leaves behind: what it would like to write, what its reads came to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.config import AssociativeConfig
from dmt.distributed import all_gather, all_gather_strings, all_reduce_sum
from dmt.memory.base import BlockShape, MemoryCost, MemoryLayer
from dmt.memory.featural import FeaturalMemory
from dmt.memory.insert_policy import InsertPolicy, apply_insert_policy
from dmt.memory.registry import register_memory
from dmt.memory.row_table import RowTable
from dmt.store.records import IntArray, StepChanges


class _StraightThroughRetrieval(torch.autograd.Function):
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
        ctx.kept = recent_keys.shape, recent_values.shape
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (origins,) = ctx.saved_tensors
        grad_keys, grad_values = grad_outputs
        has_origin = origins >= 0
        recent_grads = []
        for shape, grad in zip(ctx.kept, grad_outputs, strict=True):
            recent_grads.append(
                grad.new_zeros(shape).index_add(0, origins[has_origin], grad[has_origin])
            )
        return grad_keys.sum(1), recent_grads[0], recent_grads[1], grad_keys, grad_values, None


def straight_through_rows(
    queries: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    keys: Tensor,
    values: Tensor,
    origins: Tensor,
) -> tuple[Tensor, Tensor]:
    """`keys` and `values` as they came out of a store, with a gradient for those who had a part in them.

    A search cannot be differentiated. A key that comes back is the query plus noise, and also the key once inserted
    plus noise; so each query receives the sum of the gradients of the keys returned to it, an inserted key the gradient
    of the key it came back as, an inserted value that of the value.

    Args:
        queries: what was asked, `(n, key width)`.
        kept_keys, kept_values: what has been inserted, `(m, key width)` and `(m, value width)`, computed once more with
            the weights of now.
        keys, values: what came back, `(n, k, key width)` and `(n, k, value width)`.
        origin: `(n, k)`, which of the m each came from; -1 where it is none of them.

    Source: straight-through estimation, Bengio et al. 2013, arXiv 1308.3432, applied to a store that is searched.
    """
    return _StraightThroughRetrieval.apply(
        queries, recent_keys, recent_values, keys, values, origins
    )  # type: ignore[no-any-return,no-untyped-call]


@dataclass
class PendingWrites:
    """What one forward pass would like to write."""

    hidden: Tensor
    keys: Tensor
    values: Tensor | None  # where they are taught: not yet
    base_output: Tensor | None
    tag: str

    def select_tokens(self, mask: Tensor) -> PendingWrites:
        """Of the tokens in a mask `(tokens,)`."""
        values, base_output = (
            None if tensor is None else tensor[mask] for tensor in (self.values, self.base_output)
        )
        return PendingWrites(self.hidden[mask], self.keys[mask], values, base_output, self.tag)


@dataclass
class RetrievalStats:
    """What reads came to, of all tokens since it was asked for."""

    num_tokens: int = 0
    null_weight: float = 0.0  # weight that was the base's, summed over tokens
    nearest_distances: list[Tensor] = field(
        default_factory=list
    )  # distance of each token's nearest row

    def all_reduce(self, device: torch.device) -> RetrievalStats:
        """What this and those of all other processes that train together add up to; all have to ask."""
        num_tokens, null_weight = all_reduce_sum(
            torch.tensor([self.num_tokens, self.null_weight], dtype=torch.double)
        ).tolist()
        nearest_distances = all_gather(
            torch.cat(
                [
                    torch.zeros(0, device=device),
                    *(distances.float() for distances in self.nearest_distances),
                ]
            )
        )
        return RetrievalStats(
            int(num_tokens), null_weight, [nearest_distances] if len(nearest_distances) else []
        )

    @property
    def mean_null_weight(self) -> float:
        """Of the base in what was said, from 0 to 1."""
        return self.null_weight / self.num_tokens if self.num_tokens else 1.0


VALUE_TARGETS = ("projection", "teacher", "residual")
"""What an inserted value is: learnt from the hidden state, the teacher's answer, or what the base lacks of that."""
INITIAL_NULL_LOGIT = 0.7
"""Cosine at which a row has, to begin with, the weight of the base: where training led it (EXPERIMENTS.md)."""
NULL_LOGIT_CANDIDATES = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.2)
"""What `weigh` chooses from; with the last, rows are hardly heard."""
ERROR_DECAY = 0.8
"""Share of what `weigh` knew that still counts after another pass."""
MAX_RECENT_ROWS = 4_096
"""Rows last written whose hidden states are kept, so that what comes back can teach the projections that made it."""


@register_memory("associative", config=AssociativeConfig)
class AssociativeMemory(MemoryLayer):
    """Reads the stored rows nearest to a token's query, and, while it writes, offers a row of its own for each token.

    Rows offered in a step are in the memory when `settle` has ended the step, never before: no token sees what another
    of the same step wrote, be it later in the text, in another layer's pass or in another sequence. A token's output
    therefore depends on that token's hidden state and on rows of steps past alone.

    Keys and queries have unit length. The weights of the k rows read are a softmax over `sharpness` x cosine, in which
    the base has a part too, as a row would of cosine `doubt`: where nothing near is stored, the base alone is heard.

    Args:
        width: size of a hidden state, of a key and of a value.
        k: rows read per token.
        base: what is said beside the rows: a memory of its own, or None. With no rows the answer is the base's.
        writes: one of `WRITES`; of the latter two, `teach` has to follow each pass that writes.
        policy: which offers come in and how many rows are kept.
        places: rows there is room for at the start, as many as a saved memory had.
        index: how rows are found: `exact`, or a kind of faiss index (`indexes.py`).
        write_from: share of the training after which it writes; kept for whoever trains it.

    Source: the layer of query, key and value projections over a store that is written to as it is read; its gradients are
        straight-through (`straight_through.py`). Weighing nothing beside the rows is ours.
    """

    def __init__(
        self,
        width: int,
        k: int,
        base: FeaturalMemory | None,
        value_target: str,
        insert_policy: InsertPolicy,
        allocated_rows: int = 0,
        index: str = "exact",
        write_start: float = 0.0,
        sharpness: float = 20.0,
    ) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if value_target not in VALUE_TARGETS:
            raise ValueError(
                f"writes must be one of {', '.join(VALUE_TARGETS)}, got {value_target}"
            )
        if value_target == "residual" and base is None:
            raise ValueError(
                "writes=residual is what a base lacks; without a base use writes=teacher or projection"
            )
        self.width, self.k, self.value_target, self.insert_policy = (
            width,
            k,
            value_target,
            insert_policy,
        )
        self.base = base
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width) if value_target == "projection" else None
        self.output = nn.Linear(width, width, bias=False)
        self.log_sharpness = nn.Parameter(torch.empty(()))
        self.null_logit = nn.Parameter(torch.empty(()))
        self.rows = RowTable(width, width, allocated_rows, index)
        self.sharpness, self.write_start = sharpness, write_start
        self.writing = False
        self.tag = ""
        self.retrieval_stats: RetrievalStats | None = None
        self._pending_writes: list[PendingWrites] = []
        self._pending_reads: list[tuple[Tensor, Tensor]] = []
        self._last_retrieval: tuple[Tensor, Tensor] | None = None
        self._null_logit_errors: Tensor | None = None  # squared error of late for each of `DOUBTS`
        self._recent_hidden: Tensor | None = (
            None  # hidden states (m, width) of rows that were written last
        )
        self._recent_ids: Tensor | None = None  # and their numbers
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
        return None if self.base is None else self.base.block_slots

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Copy the neurons of a feed-forward block into the slots of the base."""
        if self.base is None:
            return {}
        return {name: f"base.{target}" for name, target in self.base.load_block(tensors).items()}

    def cost(self) -> MemoryCost:
        """Return what the memory takes with the rows that it has now."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        products = 3 * self.width**2 + len(self.rows) * self.width + self.k * self.width
        base = 0 if self.base is None else self.base.cost().multiply_adds
        return MemoryCost(parameters, self.k, products + base)

    @torch.no_grad()
    def reset(self) -> None:
        """Projections that change nothing, no rows."""
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
        """Let queries and keys be about the mean of `hidden` `(tokens, width)`: what all have in common tells nobody apart."""
        for projection in (self.query, self.key):
            projection.bias.copy_(-projection.weight @ hidden.mean(0))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        base = None if self.base is None else self.base(hidden).reshape(-1, self.width)
        if self.writing:
            self._queue_writes(flat, None if base is None else base.detach())
        if self.retrieval_stats is not None:
            self.retrieval_stats.num_tokens += len(flat)
            self.retrieval_stats.null_weight += 0 if len(self.rows) else len(flat)
        if len(self.rows):
            return self._read_rows(flat, base).view_as(hidden)
        return (self.output(torch.zeros_like(flat)) if base is None else base).view_as(
            hidden
        )  # in the graph like an answer

    def _read_rows(self, hidden: Tensor, base: Tensor | None) -> Tensor:
        queries = F.normalize(self.query(hidden), dim=-1)
        matches = self.rows.search(queries, self.k)
        valid = matches.distances.isfinite()
        recent_keys, recent_values, origins = self._project_recent_rows(matches.indices, valid)
        keys, values = straight_through_rows(
            queries,
            recent_keys,
            recent_values,
            self.rows.keys[matches.indices],
            self.rows.values[matches.indices],
            origins,
        )
        scores = torch.einsum("nd,nkd->nk", queries, keys.to(queries.dtype)).masked_fill(
            ~valid, -torch.inf
        )
        weights = self._compute_weights(scores)
        if self.retrieval_stats is not None:
            self.retrieval_stats.null_weight += len(weights) - float(weights.detach().sum())
            self.retrieval_stats.nearest_distances.append(matches.distances[:, 0].sqrt())
        if self.writing:
            self._pending_reads.append((matches.indices[valid], weights.detach()[valid]))
            if not torch.is_grad_enabled():  # whoever trains does not weigh
                self._last_retrieval = scores, matches.indices
        return self._combine_outputs(base, weights, values)

    def _combine_outputs(self, base: Tensor | None, weights: Tensor, values: Tensor) -> Tensor:
        """What rows say and what the base says: all of it beside what it lacks, its share beside whole answers."""
        retrieved: Tensor = self.output(
            torch.einsum("nk,nkw->nw", weights, values.to(weights.dtype))
        )
        if base is None:
            return retrieved
        return retrieved + (
            base if self.value_target != "teacher" else base * (1 - weights.sum(-1, keepdim=True))
        )

    def _compute_weights(self, cosines: Tensor, null_logit: Tensor | None = None) -> Tensor:
        """Of rows, `(n, k)`, beside a base that counts like a row of cosine `doubt`, in which training has its say."""
        null_logit = self.null_logit if null_logit is None else null_logit
        cosines = torch.cat([cosines, null_logit.to(cosines.dtype).expand(len(cosines), 1)], dim=1)
        return (cosines * self.log_sharpness.exp()).softmax(-1)[:, :-1]

    @torch.no_grad()
    def select_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are read for `hidden` `(tokens, width)`: places and weights `(tokens, k)`; weight 0 where there was none."""
        queries = F.normalize(self.query(hidden), dim=-1)
        matches = self.rows.search(queries, self.k)
        cosines = torch.einsum(
            "nd,nkd->nk", queries, self.rows.keys[matches.indices].to(queries.dtype)
        )
        return matches.indices, self._compute_weights(
            cosines.masked_fill(matches.distances.isinf(), -torch.inf)
        )

    def _project_recent_rows(self, indices: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values last written, made anew by the projections of now, and which of them each place holds."""
        no_origin = torch.full_like(indices, -1)
        if (
            self._recent_hidden is None
            or self._recent_ids is None
            or not len(self._recent_hidden)
            or not torch.is_grad_enabled()
        ):
            no_rows = self.rows.keys.new_zeros(0, self.width)
            return no_rows, no_rows, no_origin
        self._recent_hidden, self._recent_ids = (
            self._recent_hidden.to(indices.device),
            self._recent_ids.to(indices.device),
        )
        row_ids = self.rows.ids[indices]
        order = self._recent_ids.argsort()
        sorted_positions = torch.searchsorted(self._recent_ids[order], row_ids).clamp_max(
            len(order) - 1
        )
        origins = torch.where(
            (self._recent_ids[order][sorted_positions] == row_ids) & valid,
            order[sorted_positions],
            no_origin,
        )
        keys = F.normalize(self.key(self._recent_hidden), dim=-1)
        values = (
            torch.zeros_like(keys).detach()
            if self.value is None
            else self.value(self._recent_hidden)
        )
        return keys, values, origins

    @torch.no_grad()
    def _queue_writes(self, hidden: Tensor, base: Tensor | None) -> None:
        keys = F.normalize(self.key(hidden), dim=-1)
        values = None if self.value is None else self.value(hidden).float()
        self._pending_writes.append(
            PendingWrites(hidden.detach(), keys.float(), values, base, self.tag)
        )

    @torch.no_grad()
    def set_targets(self, targets: Tensor, mask: Tensor | None = None) -> None:
        """Say what the last pass, which wrote, should have answered: `(..., width)`; nothing where values are projections.

        Args:
            where: a mask `(...)` of the tokens that are worth a row; all where it is None.
        """
        if not self._pending_writes:
            raise ValueError("teach after a pass that writes")
        if mask is not None:
            self._pending_writes[-1], targets = (
                self._pending_writes[-1].select_tokens(mask.flatten()),
                targets.reshape(-1, self.width)[mask.flatten()],
            )
        pending = self._pending_writes[-1]
        if self.value is None:
            values = targets.reshape(-1, self.width).float()
            pending.values = (
                values
                if self.value_target == "teacher" or pending.base_output is None
                else values - pending.base_output.float()
            )

    @torch.no_grad()
    def calibrate_null_logit(self) -> None:
        """Set `doubt` to what would have served best lately, on text whose own rows were not there yet; after `teach`.

        For whoever reads without training. Few rows then do no harm and many are heard.
        """
        pending_writes, self._last_retrieval, retrieval = (
            self._pending_writes,
            None,
            self._last_retrieval,
        )
        if not pending_writes or pending_writes[-1].values is None or self.value is not None:
            return
        if retrieval is None:
            if not len(self.rows):  # the first ones are hardly heard before they have been judged
                self.null_logit.fill_(NULL_LOGIT_CANDIDATES[-1])
            return
        pending, (cosines, indices) = pending_writes[-1], retrieval
        values = self.rows.values[indices]
        targets = (
            pending.values
            if self.value_target == "teacher" or pending.base_output is None
            else pending.values + pending.base_output
        )
        errors = []
        for candidate in NULL_LOGIT_CANDIDATES:
            weights = self._compute_weights(cosines, torch.tensor(candidate, device=cosines.device))
            errors.append(
                (targets - self._answer(pending.base_output, weights, values).float())
                .square()
                .sum()
            )
        candidate_errors = torch.stack(errors)
        self._null_logit_errors = (
            candidate_errors
            if self._null_logit_errors is None
            else ERROR_DECAY * self._null_logit_errors.to(candidate_errors) + candidate_errors
        )
        self.null_logit.fill_(NULL_LOGIT_CANDIDATES[int(self._null_logit_errors.argmin())])

    def drop_pending(self) -> None:
        """Forget what passes since the last step have read and offered: something went wrong in one of them."""
        self._pending_writes, self._pending_reads, self._last_retrieval = [], [], None

    @torch.no_grad()
    def commit_step(
        self, step: int, now: float, allocate_ids: Callable[[int], IntArray]
    ) -> StepChanges:
        """End a step: reads are noted, offers come in by the policy; what is to be written down, usage aside.

        Of several processes that train together each sees what all read and offer, so all end with the same rows; `now`
        and `take_ids` have to give the same to each.

        Args:
            step: number of the step that ends.
            now: seconds since 1970.
            take_ids: gives out numbers that no row has or had.
        """
        no_states, no_indices = self.rows.keys.new_zeros(0, self.width), self.rows.ids.new_zeros(0)
        pending_writes, reads, self._pending_writes, self._pending_reads, self._last_retrieval = (
            self._pending_writes,
            self._pending_reads,
            [],
            [],
            None,
        )
        if any(pending.values is None for pending in pending_writes):
            raise ValueError(
                f"writes={self.value_target} needs the teacher's answer: call `teach` after each pass that writes"
            )
        indices = all_gather(torch.cat([no_indices, *(read_indices for read_indices, _ in reads)]))
        weights = all_gather(
            torch.cat([no_states.new_zeros(0), *(weight.float() for _, weight in reads)])
        )
        self.rows.record_reads(
            indices.cpu().numpy(),
            weights.double().cpu().numpy(),
            step,
            now,
            self.insert_policy.decay,
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
        result = apply_insert_policy(
            self.rows, keys, values, tags, self.insert_policy, step, now, allocate_ids
        )
        self._record_recent_rows(
            hidden[torch.as_tensor(result.unmerged_candidates, device=hidden.device)],
            result.unmerged_ids,
        )
        return result.changes

    def _record_recent_rows(self, hidden: Tensor, ids: IntArray) -> None:
        """Keep the hidden states `(n, width)` that the rows numbered `ids` `(n,)` were made from, the last `TAPE` of all."""
        row_ids = torch.as_tensor(ids, device=hidden.device)
        if self._recent_hidden is not None and self._recent_ids is not None:
            hidden, row_ids = (
                torch.cat([self._recent_hidden.to(hidden), hidden]),
                torch.cat([self._recent_ids.to(row_ids), row_ids]),
            )
        self._recent_hidden, self._recent_ids = (
            hidden[-MAX_RECENT_ROWS:],
            row_ids[-MAX_RECENT_ROWS:],
        )

    def recent_hidden(self) -> tuple[Tensor, Tensor]:
        """Hidden states `(m, width)` that the rows written last were made from, and the rows' numbers `(m,)`."""
        if self._recent_hidden is None or self._recent_ids is None:
            return torch.zeros(0, self.width), torch.zeros(0, dtype=torch.long)
        return self._recent_hidden.cpu().clone(), self._recent_ids.cpu().clone()

    def set_recent_hidden(self, hidden: Tensor, ids: Tensor) -> None:
        """Go on with what `tape` gave."""
        self._recent_hidden, self._recent_ids = (
            hidden.to(self.rows.keys.device),
            ids.to(self.rows.keys.device),
        )

    def extra_repr(self) -> str:
        return f"width={self.width}, k={self.k}, writes={self.value_target}, rows={len(self.rows)} of {self.insert_policy.capacity}"
