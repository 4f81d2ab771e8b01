"""Featural memory: a learnt table of slots, of which each token reads k.

A feed-forward block is `sum_i act(x . key_i + bias_i) value_i + output_bias`, a sum over *all* its neurons. Keep the
sum, read only the k slots that matter, and knowledge is in rows. With k = slots nothing has changed.

Search finds slot ids. Weights are computed from live keys afterwards, so a poor search costs recall, never truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.config import FeaturalConfig
from dmt.memory.approximate_search import INDEX_BUILDERS, CandidateSearch, Int8Matrix
from dmt.memory.base import BlockShape, MemoryCost, MemoryLayer
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import ACTIVATIONS, SlotTable, masked_softmax
from dmt.ops import linear as product
from dmt.validation import ARG, ArgumentError


def topk_ids(rank: Tensor, k: int) -> Tensor:
    """Ids `(..., k)` of the k largest entries of `rank` `(..., slots)`, in no order."""
    return rank.topk(k, dim=-1, sorted=False).indices


SEARCH_METHODS = ("exact", "int8", "ivf", "product")
"""How slots are found, by the name that `memory.search` takes: all but the first by candidates, see `finding`."""


def ids_to_mask(ids: Tensor, num_slots: int) -> Tensor:
    """Boolean `(..., slots)`, true at `ids` `(..., k)`."""
    mask = torch.zeros(*ids.shape[:-1], num_slots, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, ids, True)


def mask_above_threshold(rank: Tensor, threshold: Tensor) -> Tensor:
    """Boolean mask, true where `rank` is at least `threshold` `()`."""
    return rank >= threshold


MAX_EXACT_SLOTS = 12_000
"""Slots up to which scoring all of them for many tokens at once is as fast as looking for a few."""
MIN_BATCH_TOKENS = 16
"""Tokens that count as many."""
MAX_GATHERED_VALUES = 16_000_000
"""Numbers of keys gathered, or scores in 8 bits, at once."""
CANDIDATES_PER_READ = {"int8": 1, "ivf": 2, "product": 16}
"""Candidates that a search finds for each slot read, to be scored exactly."""
INDEX_REFRESH_STEPS = 100
"""Changes of the keys, steps that is, for which an index is kept while training."""


DEFAULT_K_DIVISOR = 16  # k = num_slots / 16 where the config leaves k empty


@register_memory("featural", config=FeaturalConfig)
class FeaturalMemory(SlotTable, MemoryLayer):
    """Reads k of `slots` rows per token: query projection, best keys, weighted sum of values, output projection.

    Causal by construction: a token's output depends on that token's hidden state alone.

    Args:
        width: size of a hidden state, of a key and of a value.
        slots: rows of the table.
        k: rows read per token, over all heads together; with `selection="threshold"` their mean over tokens and layers.
        heads: groups that share out the slots evenly. Each has its own query projection (with `projections`) and, with
            `selection="top"`, reads its own best `k / heads`. Weights and output are joint: k = slots is the same for all.
        weighting: `activation`, `relu` (a slot's weight is a function of its score), `softmax` (over the slots read,
            scores divided by the root of the width) or `distance` (the same with minus the squared distance as score).
        activation: the function of `weighting="block"`, by its transformers name.
        gated: each slot has a second key, its gain: the weight is multiplied by `hidden . gain + gain_bias` (Llama's blocks).
        ranking: `score`, `contribution` (|weight| x |value|) or `centered` (|weight - mean| x |value|, where every slot
            always contributes its mean and only deviations are read).
        metric: how long a value is, for `ranking`: `plain`, its Euclidean norm, or `sensitivity`, how far it moves the
            model's answer, by a matrix that calibration measures; the identity until then.
        selection: `top` reads the k slots ranked highest; `threshold` reads those whose rank reaches `threshold`, which
            all memories of a model share, so that k is spent on the layers and tokens where it matters (`budget.py`).
        gradient: `selected` or `straight_through` (forward k slots, backward as if all had been read).
        projections: learn a query projection per head and an output projection; identities until told otherwise.
        linear: beside the slots, a linear map of the hidden state that takes over what unread slots say on average;
            zero until `compensate` or training fills it.
        search: how the slots to read are found, one of `SEARCHES`.
        value_type: what values are kept in once it is saved: `float32`, `float16`, or `int8` with a scale for each row.
        disk: what then stays in a file: `none`, `values`, or `slots`, values and keys, found by their 8-bit codes.

    Raises:
        ValueError: k or slots out of range, not multiples of heads, or a ranking the weighting cannot serve.

    Source: Geva et al. 2021, arXiv 2012.14913 (blocks as key-value memories); Sukhbaatar et al. 2019, arXiv 1907.01470.
        The linear map is the skip connection of Paulo et al. 2025, arXiv 2501.18823, solved for instead of learnt.
        Ranking by contribution, centered or not, is ours, measured in EXPERIMENTS.md.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        heads: int = 1,
        activation: str = "block",
        activation_function: str = "gelu_pytorch_tanh",
        gated: bool = False,
        selection: str = "contribution",
        metric: str = "euclidean",
        k_mode: str = "top",
        gradient: str = "selected",
        projections: bool = False,
        skip_connection: bool = False,
        search: str = "exact",
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        if not 1 <= k <= num_slots:
            raise ValueError(f"k must be in [1, slots={num_slots}], got {k}")
        if num_slots % heads or (k % heads and k_mode == "top"):
            raise ValueError(f"slots={num_slots} and k={k} must be multiples of heads={heads}")
        if search not in SEARCH_METHODS:
            raise ValueError(f"search must be one of {', '.join(SEARCH_METHODS)}, got {search}")
        if search != "exact" and heads > 1:
            raise ValueError(f"search={search} finds slots for one head, got heads={heads}")
        if search in INDEX_BUILDERS and (selection == "centered" or gated):
            raise ValueError(
                f"search={search} needs a weight that grows with one score: no gains, ranking=contribution or score"
            )
        if offload == "slots" and search != "int8":
            raise ValueError(
                f"disk=slots finds slots by codes in 8 bits, search=int8, got search={search}"
            )
        if k_mode == "threshold" and selection == "score":
            raise ValueError(
                "selection=threshold needs ranks that compare over layers: ranking=contribution or centered"
            )
        super().__init__(
            width,
            num_slots,
            heads,
            activation,
            activation_function,
            gated,
            selection,
            metric,
            projections,
            skip_connection,
            k_mode == "threshold",
            value_dtype,
            offload,
        )
        if self.activation_fn is None and gradient != "selected":
            raise ValueError(
                f"weighting={activation} works with ranking=score and gradient=selected only"
            )
        self.k, self.gradient, self.k_mode, self.search = k, gradient, k_mode, search
        self.k_multiplier = (
            1.0  # slots read while training, as a multiple of k; it may begin with more
        )
        self.reset()

    @classmethod
    def make_arguments(cls, config: FeaturalConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width` and `gated`.

        Raises:
            ArgumentError: the settings do not fit the block.
        """
        if config.activation == "block" and block.activation_function not in ACTIVATIONS:
            raise ArgumentError(
                f"the blocks of this model use {block.activation_function!r}; memories have "
                f"{', '.join(ACTIVATIONS)}; set {ARG}activation=relu"
            )
        config.check_block(block.num_neurons, gated=block.gated)
        num_slots, heads = config.num_slots or block.num_neurons, config.heads
        has_budget = config.k == "auto"
        k = config.mean_k if has_budget else config.k
        return {
            "num_slots": num_slots,
            "k": k or max(heads, num_slots // DEFAULT_K_DIVISOR // heads * heads),
            "heads": heads,
            "activation": config.activation,
            "activation_function": block.activation_function,
            "selection": config.selection,
            "metric": "euclidean" if config.selection == "score" else config.metric,
            "k_mode": "threshold" if has_budget else "top",
            "gradient": config.gradient,
            "projections": config.projections,
            "skip_connection": config.skip_connection,
            "search": config.search,
            "value_dtype": config.value_dtype,
            "offload": config.offload,
        }

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        return cls(width=width, gated=gated, **arguments)

    @property
    def block_slots(self) -> int:
        """Neurons that `load_block` wants the block to have."""
        return self.num_slots

    @torch.no_grad()
    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Copy the neurons of a feed-forward block into the slots."""
        self.load_feedforward(tensors)
        return {name: name for name in tensors}

    def cost(self) -> MemoryCost:
        """Return what the memory takes where every slot is scored."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        scores = self.num_slots * self.width * (1 if self.gains is None else 2)
        other = sum(
            matrix.numel()
            for matrix in (self.query, self.output, self.skip_connection)
            if matrix is not None
        )
        return MemoryCost(parameters, self.k, scores + self.k * self.width + other)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        self.check_attached()
        flat = hidden.reshape(-1, self.width)
        if len(flat) == 1 and not torch.is_grad_enabled():
            output = self._read_single(flat)
        else:
            output = (
                self._read_candidates(flat)
                if self._uses_candidates(len(flat))
                else self._read_exact(flat)
            )
        if self.output is not None:
            output = product(output, self.output)
        if self.skip_connection is not None:
            output = output + product(flat, self.skip_connection)
        return output.view_as(hidden)

    def _uses_candidates(self, num_tokens: int) -> bool:
        """Whether slots are found by candidates: where scoring every slot in full would take longer, or read the disk."""
        keys_offloaded = self.offload == "slots" and not self.training
        few_tokens = num_tokens < MIN_BATCH_TOKENS and not torch.is_grad_enabled()
        return self.search != "exact" and (
            keys_offloaded or few_tokens or self.num_slots > MAX_EXACT_SLOTS
        )

    def _read_exact(self, hidden: Tensor) -> Tensor:
        """Weighted sum of the values of the selected slots and of every slot's mean, `(tokens, width)`, all scored."""
        scores = self.compute_scores(hidden)
        if self.activation_fn is None:
            bias, mask = self.output_bias, self._select_mask(scores)
            weights = masked_softmax(scores, mask)
        else:
            bias, weights = self.constant_output(), self.compute_weights(hidden, scores)
            mask = self._select_mask(self.rank_weights(weights, scores))
        self._record_reads(mask)
        # Without gradients only the values read are touched: up to four times as fast (benchmarks/memory.py).
        if not torch.is_grad_enabled() or self.mmap_tensors is not None:
            (tokens, ids), num_reads = mask.nonzero(as_tuple=True), mask.sum(-1)
            return (
                self.sum_values(ids, weights[tokens, ids], num_reads.cumsum(0) - num_reads) + bias
            )
        selected_weights = weights * mask
        if self.gradient == "straight_through":
            selected_weights = weights + (selected_weights - weights).detach()
        return product(selected_weights, self.values.t(), bias)

    def _read_single(self, hidden: Tensor) -> Tensor:
        """What `_read` and `_read_found` give to one token, touching the values read alone; without gradients."""
        if self._uses_candidates(1):
            ids, weights = self._search_single(hidden)
        else:
            scores = self.compute_scores(hidden)
            weights = scores if self.activation_fn is None else self.compute_weights(hidden, scores)
            rank = self.rank_weights(weights, scores)
            ids = (
                self._topk_per_head(rank)[0]
                if self.threshold is None
                else self._above_threshold(rank)[0].nonzero().squeeze(-1)
            )
            weights = weights[0, ids]
        self._record_reads(ids, 1)
        if self.activation_fn is None:
            weights = torch.softmax(weights, -1)
        rows = self.gather_values(ids)
        return torch.addmv(self.constant_output(), rows.t(), weights.to(rows.dtype)).unsqueeze(0)

    def _search_single(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids, is_final = self._find_candidates(hidden)
        ids = ids if is_final else ids[ids >= 0].unsqueeze(0)
        scores = self.compute_scores_at(hidden, ids)
        weights = (
            scores if self.activation_fn is None else self.compute_weights_at(hidden, scores, ids)
        )
        if not is_final:
            rank = self.rank_weights(weights, scores, ids)
            selected = (
                topk_ids(rank, min(self._current_k(), rank.shape[1]))[0]
                if self.threshold is None
                else self._above_threshold(rank)[0]
            )
            ids, weights = ids[:, selected], weights[:, selected]
        return ids[0], weights[0]

    def _read_candidates(self, hidden: Tensor) -> Tensor:
        """What `_read` gives where the candidates hold all slots it selects; values and gradients of those read only."""
        chunk_size = max(
            1,
            MAX_GATHERED_VALUES
            // max(self.width * self._num_candidates(), self.num_slots * (self.search == "int8")),
        )
        if len(hidden) > chunk_size and not torch.is_grad_enabled():
            return torch.cat([self._read_candidates(chunk) for chunk in hidden.split(chunk_size)])
        ids, scores, weights, selected = self._search_candidates(hidden)
        self._record_reads(ids[selected], len(hidden))
        if weights is None:
            weights = masked_softmax(scores, selected)
        return self.sum_values(ids, weights * selected) + self.constant_output()

    def _search_candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Candidates: ids, scores, weights where each slot has its own, and which of them are read, `(tokens, n)`."""
        with torch.no_grad():
            ids, is_final = self._find_candidates(hidden)
            valid, ids = ids >= 0, ids.clamp_min(0)
        scores = self.compute_scores_at(hidden, ids)
        weights = (
            None if self.activation_fn is None else self.compute_weights_at(hidden, scores, ids)
        )
        if is_final:
            return ids, scores, weights, valid
        with torch.no_grad():
            rank = (
                scores if weights is None else self.rank_weights(weights, scores, ids)
            ).masked_fill(~valid, -torch.inf)
            if self.threshold is not None:
                return ids, scores, weights, self._above_threshold(rank)
            return (
                ids,
                scores,
                weights,
                ids_to_mask(topk_ids(rank, min(self._current_k(), rank.shape[1])), rank.shape[1])
                & valid,
            )

    def _current_k(self) -> int:
        return min(self.num_slots, round(self.k * (self.k_multiplier if self.training else 1)))

    def _num_candidates(self) -> int:
        """Candidates per token; where each token has its own number of reads, room for more than the mean."""
        return min(
            self.num_slots,
            CANDIDATES_PER_READ[self.search]
            * self._current_k()
            * (1 if self.threshold is None else 3),
        )

    @torch.no_grad()
    def _find_candidates(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """Ids `(tokens, n)` of slots that may be read, -1 where there are fewer; and whether they are to be read as they are."""
        if self.search == "int8":
            rank = self._approximate_rank(hidden)
            if self.threshold is None:
                return self._topk_per_head(rank), True
            mask = self._above_threshold(rank)
            if len(mask) == 1:
                return mask.nonzero()[:, 1].unsqueeze(0), True
            ids = rank.topk(max(1, int(mask.sum(-1).max())), dim=-1).indices
            return torch.where(mask.gather(-1, ids), ids, -1), True
        sources = (
            self.keys,
            self.key_bias,
            self.values if self.selection == "contribution" else None,
        )
        patience = INDEX_REFRESH_STEPS if self.training else 1
        search_index: CandidateSearch = self._tensor_cache(
            "index",
            lambda *_: INDEX_BUILDERS[self.search](self._index_vectors, self.num_slots),
            sources,
            patience=patience,
        )
        return search_index(
            F.pad(self.compute_queries(hidden)[:, 0], (0, 1), value=1.0), self._num_candidates()
        ), False

    def _index_vectors(self, slot_range: slice) -> Tensor:
        """One vector `(n, width + 1)` for each of some slots, whose product with a query and 1 ranks it."""
        keys = self.keys[slot_range]
        if self.activation == "distance":
            return torch.cat([2 * keys, -keys.square().sum(-1, keepdim=True)], dim=-1)
        vectors = torch.cat([keys, self.key_bias[slot_range].unsqueeze(-1)], dim=-1)
        return (
            vectors
            if self.selection == "score"
            else vectors * self.value_norms()[slot_range].unsqueeze(-1)
        )

    def _approximate_rank(self, hidden: Tensor) -> Tensor:
        """What `rank` gives, from keys in 8 bits."""
        query = self.compute_queries(hidden)[:, 0]
        scores = self._finish_scores(
            self._int8_matrix("key", self.keys)(query), query, self.keys, self.key_bias
        )
        if self.activation_fn is None:
            return scores
        gains = None
        if self.gains is not None and self.gain_bias is not None:
            gains = self._int8_matrix("gain", self.gains)(hidden) + self.gain_bias
        return self.rank_weights(self._scores_to_weights(scores, gains, self.means), scores)

    def _int8_matrix(self, name: str, rows: Tensor) -> Int8Matrix:
        stored = None if self.mmap_tensors is None else getattr(self.mmap_tensors, f"{name}_codes")
        return (
            self._tensor_cache(f"{name} codes", Int8Matrix, (rows,)) if stored is None else stored
        )

    def _select_mask(self, rank: Tensor) -> Tensor:
        """Mask `(tokens, slots)` of what an exact search reads."""
        return (
            ids_to_mask(self._topk_per_head(rank), self.num_slots)
            if self.threshold is None
            else self._above_threshold(rank)
        )

    def select_slots(self, hidden: Tensor) -> Tensor:
        """Which slots are read for `hidden` `(tokens, width)`: a mask `(tokens, slots)`."""
        return self.select_with_weights(hidden)[0]

    @torch.no_grad()
    def select_with_weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots are read for `hidden` `(tokens, width)`, and the weights of those: both `(tokens, slots)`."""
        if not self._uses_candidates(len(hidden)):
            scores = self.compute_scores(hidden)
            weights = scores if self.activation_fn is None else self.compute_weights(hidden, scores)
            mask = self._select_mask(self.rank_weights(weights, scores))
            return mask, masked_softmax(
                scores, mask
            ) if self.activation_fn is None else weights * mask
        ids, scores, candidate_weights, selected = self._search_candidates(hidden)
        candidate_weights = (
            masked_softmax(scores, selected) if candidate_weights is None else candidate_weights
        ) * selected
        zeros = torch.zeros(
            len(hidden), self.num_slots, device=hidden.device, dtype=candidate_weights.dtype
        )
        # a place that is not read may stand for slot 0, which another place may read
        return zeros.scatter_add(
            -1, ids, selected.to(candidate_weights.dtype)
        ) > 0, zeros.scatter_add(-1, ids, candidate_weights)

    @torch.no_grad()
    def measure_recall(self, hidden: Tensor) -> float:
        """Share of the slots that an exact search would read for `hidden` `(tokens, width)` which this search reads."""
        if self.search == "exact":
            return 1.0
        rank = self.compute_ranks(hidden)
        expected = self._select_mask(rank)
        if self.selection != "score":
            expected &= rank > 0  # a slot that says nothing is not missed
        ids, _, _, selected = self._search_candidates(hidden)
        return float((expected.gather(1, ids) & selected).sum() / expected.sum().clamp_min(1))

    @torch.no_grad()
    def _topk_per_head(self, rank: Tensor) -> Tensor:
        """Ids `(tokens, k)` of the slots ranked highest, head by head."""
        k = self._current_k() // self.heads
        if self.heads == 1:
            return topk_ids(rank, k)
        head_ids = topk_ids(rank.view(len(rank), self.heads, -1), k)
        offsets = torch.arange(
            0, self.num_slots, self.num_slots // self.heads, device=rank.device
        ).unsqueeze(-1)
        return (head_ids + offsets).flatten(-2)

    def _above_threshold(self, rank: Tensor) -> Tensor:
        assert self.threshold is not None, "asked for where selection is by threshold"
        return mask_above_threshold(rank, self.threshold)

    def extra_repr(self) -> str:
        shape = f"width={self.width}, slots={self.num_slots}, k={self.k}, heads={self.heads}"
        return f"{shape}, weighting={self.activation}, ranking={self.selection}, selection={self.k_mode}"
