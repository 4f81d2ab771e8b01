"""Featural memory: a top-k key-value layer, a learned table of slots of which each token reads k.

A feed-forward block is `sum_i act(x . key_i + bias_i) value_i + output_bias`, a sum over all its
neurons. Keep the sum, but read only the k slots that contribute most, and knowledge is in rows.
With k = num_slots the layer is the block.

Search only proposes slots. Weights are computed from the keys themselves, so a poor search loses
recall but never computes a wrong weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.config import FeaturalConfig
from dmt.memory.approximate_search import INDEX_BUILDERS, CandidateSearch, Int8Matrix
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import (
    ACTIVATIONS,
    DEFAULT_K_DIVISOR,
    SlotTable,
    check_choice,
    masked_softmax,
)
from dmt.ops import linear
from dmt.validation import ARG, ArgumentError

# Ways to find slots that `search=` accepts; all but the first score candidates only.
SEARCH_METHODS = ("exact", "int8", "ivf")
K_MODES = ("top", "threshold")
GRADIENTS = ("selected", "straight_through")
# Of the slots, how many are read on average where one budget is spent on all layers and tokens.
DEFAULT_MEAN_SHARE = 3 / 16
# Slots up to which scoring all of them for many tokens is as fast as searching.
MAX_EXACT_SLOTS = 12_000
# Share of the slots up to which gathering the values that many tokens read is faster than
# multiplying all of them.
MAX_GATHERED_SHARE = 0.2
# Tokens from which a batch counts as many.
MIN_BATCH_TOKENS = 16
# Key values gathered, or 8-bit scores, that exist at once.
MAX_GATHERED_VALUES = 16_000_000
# Candidates that a search proposes for each slot read, which are then scored exactly.
CANDIDATES_PER_READ = {"int8": 1, "ivf": 2}
# Changes of the keys (training steps) for which an index is reused.
INDEX_REFRESH_STEPS = 100


def topk_ids(rank: Tensor, k: int) -> Tensor:
    """Return the ids `(..., k)` of the k largest entries of `rank` `(..., slots)`, in no order."""
    return rank.topk(k, dim=-1, sorted=False).indices


def ids_to_mask(ids: Tensor, num_slots: int) -> Tensor:
    """Convert ids `(..., k)` to a boolean mask `(..., num_slots)`."""
    mask = torch.zeros(*ids.shape[:-1], num_slots, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, ids, True)


@register_memory("featural", config=FeaturalConfig)
class FeaturalMemory(SlotTable, MemoryLayer):
    """A layer that reads k of `num_slots` slots per token: best keys, weighted sum of values.

    Causal by construction: the output for a token depends on the hidden state of that token alone.
    It works in any model in place of a feed-forward block:

        layer = FeaturalMemory(width=512, num_slots=2048, k=64, activation="gelu")
        output = layer(hidden)  # (batch, time, 512) to the same shape

    Args:
        width: size of a hidden state, of a key and of a value.
        num_slots: rows of the table.
        k: slots read per token, over all heads together; with `k_mode="threshold"` their mean over
            tokens and layers.
        heads: groups that share the slots evenly. Each has its own query projection (with
            `projections`) and, with `k_mode="top"`, reads its own best `k / heads`. Weights and
            output are joint: k = num_slots is the same for any number.
        activation: a slot's weight as a function of its score: `gelu`, `gelu_new`,
            `gelu_pytorch_tanh`, `relu`, `silu`, or `block` for `activation_function`; or `softmax`
            over the slots read (scores divided by the square root of the width) or `distance` (the
            same with minus the squared distance as score).
        activation_function: what `activation="block"` stands for, by its transformers name.
        gated: give each slot a second key, its gain: the weight is multiplied by
            `hidden . gain + gain_bias` (SwiGLU blocks).
        selection: what slots are ranked by: `score`, `contribution` (|weight| x |value|) or
            `centered` (|weight - mean| x |value|, where every slot always contributes its mean and
            only deviations are read).
        metric: how the norm of a value is measured: `euclidean`, or `fisher`, by how far the value
            moves the model's output, with a matrix that calibration measures (at first the
            identity).
        k_mode: `top` reads the k slots ranked highest; `threshold` reads those whose rank reaches
            `threshold`, which all memories of a model share, so that k is spent on the layers and
            tokens where it matters (`sparsity_budget`).
        gradient: `selected`, or `straight_through` (forward k slots, backward all of them).
        projections: learn a query projection per head and an output projection.
        skip_connection: add a linear map of the hidden state that replaces what unread slots
            contribute on average; zero until `compensate` or training changes it.
        search: how slots are found: `exact`, `int8` or `ivf`.
        value_dtype: type of saved values: `float32`, `float16`, or `int8` with a scale per row.
        offload: what stays in a file after loading: `none`, `values`, or `slots` (values and keys,
            found by 8-bit codes).

    Raises:
        ValueError: an argument is out of range or unknown, or two of them contradict each other.

    Source: Geva et al. 2021, arXiv 2012.14913 (blocks as key-value memories); Sukhbaatar et al.
        2019, arXiv 1907.01470. The skip connection is that of Paulo et al. 2025, arXiv 2501.18823,
        solved for instead of learned. Ranking by contribution, centered or not, is ours, measured
        in docs/experiments.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        heads: int = 1,
        activation: str = "gelu",
        activation_function: str | None = None,
        gated: bool = False,
        selection: str | None = None,
        metric: str = "euclidean",
        k_mode: str = "top",
        gradient: str = "selected",
        projections: bool = False,
        skip_connection: bool = False,
        search: str = "exact",
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        if selection is None:
            selection = "score" if activation in ("softmax", "distance") else "contribution"
        for name, size in (("width", width), ("num_slots", num_slots), ("heads", heads)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= k <= num_slots:
            raise ValueError(f"k must be in [1, num_slots={num_slots}], got {k}")
        check_choice("k_mode", k_mode, K_MODES)
        check_choice("gradient", gradient, GRADIENTS)
        check_choice("search", search, SEARCH_METHODS)
        if num_slots % heads or (k % heads and k_mode == "top"):
            raise ValueError(f"num_slots={num_slots} and k={k} must be multiples of heads={heads}")
        if search != "exact" and heads > 1:
            raise ValueError(f"search={search} supports one head, got heads={heads}")
        if search in INDEX_BUILDERS and (selection == "centered" or gated):
            raise ValueError(
                f"search={search} needs weights that grow with one score: gated=False and "
                "selection=contribution or score"
            )
        if offload == "slots" and search != "int8":
            raise ValueError(
                f"offload=slots finds slots by 8-bit codes: use search=int8, got search={search}"
            )
        if k_mode == "threshold" and selection == "score":
            raise ValueError(
                "k_mode=threshold needs ranks that are comparable across layers: "
                "selection=contribution or centered"
            )
        super().__init__(
            width,
            num_slots,
            heads=heads,
            activation=activation,
            activation_function=activation_function,
            gated=gated,
            selection=selection,
            metric=metric,
            projections=projections,
            skip_connection=skip_connection,
            has_threshold=k_mode == "threshold",
            value_dtype=value_dtype,
            offload=offload,
        )
        if self.activation_fn is None and gradient != "selected":
            raise ValueError(
                f"activation={activation} needs selection=score and gradient=selected, "
                f"got gradient={gradient}"
            )
        self.k, self.gradient, self.k_mode, self.search = k, gradient, k_mode, search
        self._k_multiplier = 1.0
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
        share = DEFAULT_MEAN_SHARE if has_budget else 1 / DEFAULT_K_DIVISOR
        k = config.mean_k if has_budget else config.k
        return {
            "num_slots": num_slots,
            "k": k or max(heads, int(num_slots * share) // heads * heads),
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

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set the means of slots, and what stands for the slots that are not read."""
        self.calibrate_means(hidden)
        self.compensate(hidden, target - self.forward(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        self.check_attached()
        flat = hidden.reshape(-1, self.width)
        if self._has_fixed_shapes:
            output = self._read_exact(flat)
        elif (
            len(flat) == 1 and not torch.is_grad_enabled() and not self._multiplies_all_values(flat)
        ):
            output = self._read_single(flat)
        else:
            output = (
                self._read_candidates(flat)
                if self._uses_candidates(len(flat))
                else self._read_exact(flat)
            )
        if self.output is not None:
            output = linear(output, self.output)
        if self.skip_connection is not None:
            output = output + linear(flat, self.skip_connection)
        return output.view_as(hidden)

    @property
    def k_multiplier(self) -> float:
        """Slots read in training mode, as a multiple of k."""
        return self._k_multiplier

    def set_k_multiplier(self, factor: float) -> None:
        """Read `factor` times k slots in training mode from now on, all slots at most."""
        if factor <= 0:
            raise ValueError(f"factor must be positive, got {factor}")
        self._k_multiplier = factor

    @contextmanager
    def scaled_k(self, factor: float) -> Iterator[None]:
        """Read `factor` times k slots in training mode inside the block."""
        previous = self._k_multiplier
        self.set_k_multiplier(factor)
        try:
            yield
        finally:
            self._k_multiplier = previous

    @contextmanager
    def temporary_k(self, k: int, threshold: Tensor | None = None) -> Iterator[None]:
        """Read k slots per token inside the block.

        Args:
            k: in [1, num_slots].
            threshold: value of the shared threshold that gives this k, with `k_mode="threshold"`.
        """
        if not 1 <= k <= self.num_slots:
            raise ValueError(f"k must be in [1, num_slots={self.num_slots}], got {k}")
        previous_k = self.k
        previous_threshold = None if self.threshold is None else self.threshold.clone()
        self.k = k
        if self.threshold is not None and threshold is not None:
            self.threshold.copy_(threshold)
        try:
            yield
        finally:
            self.k = previous_k
            if self.threshold is not None and previous_threshold is not None:
                self.threshold.copy_(previous_threshold)

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on how many slots are read: in a compiled or exported model.

        Such a model scores every slot, exactly if `search="ivf"`. Slots in a file are read as ever,
        outside of its graph.
        """
        return torch.compiler.is_compiling() and self.mmap_tensors is None

    def _uses_candidates(self, num_tokens: int) -> bool:
        """Return whether the keys of candidates are gathered, rather than all keys multiplied.

        An inverted file is always searched in evaluation mode. With keys in 8 bits this is a
        matter of speed: the same slots are read either way, see `_weigh_and_rank`.
        """
        if self.search == "exact":
            return False
        if self.num_slots > MAX_EXACT_SLOTS:
            return True
        if self.training:
            return False
        few_tokens = num_tokens < MIN_BATCH_TOKENS and not torch.is_grad_enabled()
        return self.search == "ivf" or self.offload == "slots" or few_tokens

    def _weigh_and_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the ranks of all slots, both `(tokens, num_slots)`.

        The weights of `softmax` and `distance`, which depend on what is selected, are still scores.
        In evaluation mode keys in 8 bits rank the slots for any number of tokens, so that a token
        reads the same slots alone, with a cache, as in its text. Training ranks exactly.
        """
        scores = self.compute_scores(hidden)
        weights = scores if self.activation_fn is None else self.compute_weights(hidden, scores)
        if self.search == "int8" and not self.training:
            return weights, self._approximate_rank(hidden)
        return weights, self.rank_weights(weights, scores)

    def _weigh_and_select(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of all slots and the mask of those read, `(tokens, num_slots)`."""
        weights, ranks = self._weigh_and_rank(hidden)
        mask = self._select_mask(ranks)
        return masked_softmax(weights, mask) if self.activation_fn is None else weights, mask

    def _multiplies_all_values(self, hidden: Tensor) -> bool:
        """Return whether an exact read multiplies all values with weights that are mostly zero.

        Gradients need it. Without them a CPU touches only the values read, which is up to four
        times as fast (benchmarks/memory.py), unless many tokens read many slots. A GPU computes
        the whole product in the time that gathering takes, and the host does not wait for the
        number of values read, which differs between tokens with `k_mode="threshold"`. Mapped and
        quantized values are always gathered.
        """
        if self.mmap_tensors is not None:
            return False
        if torch.is_grad_enabled() or self._has_fixed_shapes:
            return True
        if hidden.device.type == "cpu":
            return len(hidden) >= MIN_BATCH_TOKENS and self.k > MAX_GATHERED_SHARE * self.num_slots
        return len(hidden) > 1 or (
            self.threshold is not None and not self._uses_candidates(len(hidden))
        )

    def _read_exact(self, hidden: Tensor) -> Tensor:
        """Score all slots and sum the selected values and all means: `(tokens, width)`."""
        (weights, mask), bias = self._weigh_and_select(hidden), self.constant_output()
        self._record_reads(mask)
        if not self._multiplies_all_values(hidden):
            (tokens, ids), num_reads = mask.nonzero(as_tuple=True), mask.sum(-1)
            return (
                self.sum_values(ids, weights[tokens, ids], num_reads.cumsum(0) - num_reads) + bias
            )
        selected_weights = weights * mask
        if self.gradient == "straight_through":
            selected_weights = weights + (selected_weights - weights).detach()
        return linear(selected_weights, self.values.t(), bias)

    def _read_single(self, hidden: Tensor) -> Tensor:
        """Read for one token without gradients; touches only the values read."""
        if self._uses_candidates(1):
            ids, weights = self._search_single(hidden)
        else:
            weights, rank = self._weigh_and_rank(hidden)
            ids = (
                self._topk_per_head(rank)[0]
                if self.threshold is None
                else self._above_threshold(rank)[0].nonzero().squeeze(-1)
            )
            weights = weights[0, ids]
        self._record_reads(ids, 1)
        if self.activation_fn is None:
            weights = torch.softmax(weights, -1)
        return (self.constant_output() + self.sum_token_values(ids, weights)).unsqueeze(0)

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
        """Read among candidates; only their values and gradients are touched."""
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
        """Search candidates, all `(tokens, n)`: ids, scores, weights, and which are read.

        Weights are None for `softmax` and `distance`.
        """
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
            rank = scores if weights is None else self.rank_weights(weights, scores, ids)
            rank = rank.masked_fill(~valid, -torch.inf)
            if self.threshold is not None:
                return ids, scores, weights, self._above_threshold(rank)
            k = min(self._current_k(), rank.shape[1])
            return ids, scores, weights, ids_to_mask(topk_ids(rank, k), rank.shape[1]) & valid

    def _current_k(self) -> int:
        return min(self.num_slots, round(self.k * (self._k_multiplier if self.training else 1)))

    def _num_candidates(self) -> int:
        """Return the candidates per token; more than the mean where the number of reads varies."""
        return min(
            self.num_slots,
            CANDIDATES_PER_READ[self.search]
            * self._current_k()
            * (1 if self.threshold is None else 3),
        )

    @torch.no_grad()
    def _find_candidates(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """Return candidate ids `(tokens, n)`, -1 for none, and whether all of them are read."""
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
        search_index: CandidateSearch = self._tensor_cache(
            "index",
            lambda *_: INDEX_BUILDERS[self.search](self._index_vectors, self.num_slots),
            sources,
            patience=INDEX_REFRESH_STEPS if self.training else 1,
        )
        queries = F.pad(self.compute_queries(hidden)[:, 0], (0, 1), value=1.0)
        return search_index(queries, self._num_candidates()), False

    def _index_vectors(self, slot_range: slice) -> Tensor:
        """Return one vector `(n, width + 1)` per slot whose product with (query, 1) ranks it."""
        keys = self.keys[slot_range]
        if self.activation == "distance":
            return torch.cat([2 * keys, -keys.square().sum(-1, keepdim=True)], dim=-1)
        vectors = torch.cat([keys, self.key_bias[slot_range].unsqueeze(-1)], dim=-1)
        return (
            vectors
            if self.selection == "score"
            else vectors * self.value_norms()[slot_range].unsqueeze(-1)
        )

    @torch.no_grad()
    def _approximate_rank(self, hidden: Tensor) -> Tensor:
        """Compute ranks from keys in 8 bits."""
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
        attached = self.mmap_tensors
        stored = None if attached is None else getattr(attached, f"{name}_codes")
        return (
            self._tensor_cache(f"{name}_codes", Int8Matrix, (rows,)) if stored is None else stored
        )

    def _select_mask(self, rank: Tensor) -> Tensor:
        """Return the mask of what is read, of the same shape as the ranks."""
        return (
            ids_to_mask(self._topk_per_head(rank), self.num_slots)
            if self.threshold is None
            else self._above_threshold(rank)
        )

    def select_slots(self, hidden: Tensor) -> Tensor:
        """Return which slots are read for `hidden` `(tokens, width)`: `(tokens, num_slots)`."""
        return self.select_with_weights(hidden)[0]

    @torch.no_grad()
    def select_with_weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return which slots are read and their weights.

        Args:
            hidden: `(tokens, width)`.

        Returns:
            A mask and the weights, zero outside the mask; both `(tokens, num_slots)`.
        """
        if not self._uses_candidates(len(hidden)):
            weights, mask = self._weigh_and_select(hidden)
            return mask, weights * mask
        ids, scores, candidate_weights, selected = self._search_candidates(hidden)
        if candidate_weights is None:
            candidate_weights = masked_softmax(scores, selected)
        candidate_weights = candidate_weights * selected
        # An unselected entry may have the id 0 that another entry of the token reads, so add up.
        zeros = candidate_weights.new_zeros(len(hidden), self.num_slots)
        mask = zeros.scatter_add(-1, ids, selected.to(candidate_weights.dtype)) > 0
        return mask, zeros.scatter_add(-1, ids, candidate_weights)

    @torch.no_grad()
    def measure_recall(self, hidden: Tensor) -> float:
        """Measure the share of the slots an exact search reads that this search reads too.

        Args:
            hidden: `(tokens, width)`.
        """
        if self.search == "exact":
            return 1.0
        rank = self.compute_ranks(hidden)
        expected = self._select_mask(rank)
        if self.selection != "score":
            expected &= rank > 0  # a slot that contributes nothing is not missed
        ids, _, _, selected = self._search_candidates(hidden)
        return float((expected.gather(1, ids) & selected).sum() / expected.sum().clamp_min(1))

    @torch.no_grad()
    def _topk_per_head(self, rank: Tensor) -> Tensor:
        """Return the ids `(tokens, k)` of the slots ranked highest in each head."""
        k = self._current_k() // self.heads
        if self.heads == 1:
            return topk_ids(rank, k)
        head_ids = topk_ids(rank.view(len(rank), self.heads, -1), k)
        offsets = torch.arange(
            0, self.num_slots, self.num_slots // self.heads, device=rank.device
        ).unsqueeze(-1)
        return (head_ids + offsets).flatten(-2)

    def _above_threshold(self, rank: Tensor) -> Tensor:
        assert self.threshold is not None, "only called with k_mode=threshold"
        return rank >= self.threshold

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        shape = f"width={self.width}, num_slots={self.num_slots}, k={self.k}, heads={self.heads}"
        return (
            f"{shape}, activation={self.activation}, selection={self.selection}, "
            f"k_mode={self.k_mode}, search={self.search}"
        )
