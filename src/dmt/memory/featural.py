"""Featural memory: a learnt table of slots, of which each token reads k.

A feed-forward block is `sum_i act(x . key_i + bias_i) value_i + output_bias`, a sum over *all* its neurons. Keep the
sum, read only the k slots that matter, and knowledge is in rows. With k = slots nothing has changed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.memory.finding import INDEXES, Codes, Find
from dmt.memory.products import linear as product
from dmt.memory.search import SEARCHES, as_mask, exact, reaching
from dmt.memory.table import SlotTable
from dmt.memory.weighting import normalised

SCORED = 12_000
"""Slots up to which scoring all of them for many tokens at once is as fast as looking for a few."""
TOGETHER = 16
"""Tokens that count as many."""
GATHERED = 16_000_000
"""Numbers of keys gathered, or scores in 8 bits, at once."""
SLACK = {"int8": 1, "ivf": 2, "product": 16}
"""Candidates that a search finds for each slot read, to be scored exactly."""
STALE = 100
"""Changes of the keys, steps that is, for which an index is kept while training."""


class FeaturalMemory(SlotTable):
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
        activation: the function of `weighting="activation"`, by its transformers name.
        gated: each slot has a second key, its gain: the weight is multiplied by `hidden . gain + gain_bias` (Llama's blocks).
        ranking: `score`, `contribution` (|weight| x |value|) or `centred` (|weight - mean| x |value|, where every slot
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
        Ranking by contribution, centred or not, is ours, measured in EXPERIMENTS.md.
    """

    def __init__(
        self,
        width: int,
        slots: int,
        k: int,
        heads: int = 1,
        weighting: str = "activation",
        activation: str = "gelu_pytorch_tanh",
        gated: bool = False,
        ranking: str = "contribution",
        metric: str = "plain",
        selection: str = "top",
        gradient: str = "selected",
        projections: bool = False,
        linear: bool = False,
        search: str = "exact",
        value_type: str = "float32",
        disk: str = "none",
    ) -> None:
        if not 1 <= k <= slots:
            raise ValueError(f"k must be in [1, slots={slots}], got {k}")
        if slots % heads or (k % heads and selection == "top"):
            raise ValueError(f"slots={slots} and k={k} must be multiples of heads={heads}")
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search}")
        if search != "exact" and heads > 1:
            raise ValueError(f"search={search} finds slots for one head, got heads={heads}")
        if search in INDEXES and (ranking == "centred" or gated):
            raise ValueError(f"search={search} needs a weight that grows with one score: no gains, ranking=contribution or score")
        if disk == "slots" and search != "int8":
            raise ValueError(f"disk=slots finds slots by codes in 8 bits, search=int8, got search={search}")
        if selection == "threshold" and ranking == "score":
            raise ValueError("selection=threshold needs ranks that compare over layers: ranking=contribution or centred")
        super().__init__(
            width, slots, heads, weighting, activation, gated, ranking, metric, projections, linear, selection == "threshold",
            value_type, disk,
        )  # fmt: skip
        if self.pointwise is None and gradient != "selected":
            raise ValueError(f"weighting={weighting} works with ranking=score and gradient=selected only")
        self.k, self.gradient, self.selection, self.search = k, gradient, selection, search
        self.widened = 1.0  # slots read while training, as a multiple of k; it may begin with more
        self.reset()

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        self.check_there()
        flat = hidden.reshape(-1, self.width)
        if len(flat) == 1 and not torch.is_grad_enabled():
            read = self._read_alone(flat)
        else:
            read = self._read_found(flat) if self._looks_up(len(flat)) else self._read(flat)
        if self.output is not None:
            read = product(read, self.output)
        if self.linear is not None:
            read = read + product(flat, self.linear)
        return read.view_as(hidden)

    def _looks_up(self, tokens: int) -> bool:
        """Whether slots are found by candidates: where scoring every slot in full would take longer, or read the disk."""
        away = self.disk == "slots" and not self.training
        few = tokens < TOGETHER and not torch.is_grad_enabled()
        return self.search != "exact" and (away or few or self.slots > SCORED)

    def _read(self, hidden: Tensor) -> Tensor:
        """Weighted sum of the values of the selected slots and of every slot's mean, `(tokens, width)`, all scored."""
        scores = self.scores(hidden)
        if self.pointwise is None:
            bias, mask = self.output_bias, self._selected(scores)
            weights = normalised(scores, mask)
        else:
            bias, weights = self.always(), self.weights(hidden, scores)
            mask = self._selected(self.ranked(weights, scores))
        self._count(mask)
        # Without gradients only the values read are touched: up to four times as fast (benchmarks/memory.py).
        if not torch.is_grad_enabled() or self.filed is not None:
            (tokens, ids), reads = mask.nonzero(as_tuple=True), mask.sum(-1)
            return self.sum_values(ids, weights[tokens, ids], reads.cumsum(0) - reads) + bias
        kept = weights * mask
        if self.gradient == "straight_through":
            kept = weights + (kept - weights).detach()
        return product(kept, self.values.t(), bias)

    def _read_alone(self, hidden: Tensor) -> Tensor:
        """What `_read` and `_read_found` give to one token, touching the values read alone; without gradients."""
        if self._looks_up(1):
            ids, weights = self._found_alone(hidden)
        else:
            scores = self.scores(hidden)
            weights = scores if self.pointwise is None else self.weights(hidden, scores)
            rank = self.ranked(weights, scores)
            ids = self._top(rank)[0] if self.threshold is None else self._reaching(rank)[0].nonzero().squeeze(-1)
            weights = weights[0, ids]
        self._count(ids, 1)
        if self.pointwise is None:
            weights = torch.softmax(weights, -1)
        rows = self.value_rows(ids)
        return torch.addmv(self.always(), rows.t(), weights.to(rows.dtype)).unsqueeze(0)

    def _found_alone(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids, final = self._candidates(hidden)
        ids = ids if final else ids[ids >= 0].unsqueeze(0)
        scores = self.scores_at(hidden, ids)
        weights = scores if self.pointwise is None else self.weights_at(hidden, scores, ids)
        if not final:
            rank = self.ranked(weights, scores, ids)
            at = exact(rank, min(self._k(), rank.shape[1]))[0] if self.threshold is None else self._reaching(rank)[0]
            ids, weights = ids[:, at], weights[:, at]
        return ids[0], weights[0]

    def _read_found(self, hidden: Tensor) -> Tensor:
        """What `_read` gives where the candidates hold all slots it selects; values and gradients of those read only."""
        at_once = max(1, GATHERED // max(self.width * self._wanted(), self.slots * (self.search == "int8")))
        if len(hidden) > at_once and not torch.is_grad_enabled():
            return torch.cat([self._read_found(part) for part in hidden.split(at_once)])
        ids, scores, weights, chosen = self._found(hidden)
        self._count(ids[chosen], len(hidden))
        if weights is None:
            weights = normalised(scores, chosen)
        return self.sum_values(ids, weights * chosen) + self.always()

    def _found(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Candidates: ids, scores, weights where each slot has its own, and which of them are read, `(tokens, n)`."""
        with torch.no_grad():
            ids, final = self._candidates(hidden)
            there, ids = ids >= 0, ids.clamp_min(0)
        scores = self.scores_at(hidden, ids)
        weights = None if self.pointwise is None else self.weights_at(hidden, scores, ids)
        if final:
            return ids, scores, weights, there
        with torch.no_grad():
            rank = (scores if weights is None else self.ranked(weights, scores, ids)).masked_fill(~there, -torch.inf)
            if self.threshold is not None:
                return ids, scores, weights, self._reaching(rank)
            return ids, scores, weights, as_mask(exact(rank, min(self._k(), rank.shape[1])), rank.shape[1]) & there

    def _k(self) -> int:
        return min(self.slots, round(self.k * (self.widened if self.training else 1)))

    def _wanted(self) -> int:
        """Candidates per token; where each token has its own number of reads, room for more than the mean."""
        return min(self.slots, SLACK[self.search] * self._k() * (1 if self.threshold is None else 3))

    @torch.no_grad()
    def _candidates(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """Ids `(tokens, n)` of slots that may be read, -1 where there are fewer; and whether they are to be read as they are."""
        if self.search == "int8":
            rank = self._roughly(hidden)
            if self.threshold is None:
                return self._top(rank), True
            mask = self._reaching(rank)
            if len(mask) == 1:
                return mask.nonzero()[:, 1].unsqueeze(0), True
            ids = rank.topk(max(1, int(mask.sum(-1).max())), dim=-1).indices
            return torch.where(mask.gather(-1, ids), ids, -1), True
        sources = (self.keys, self.key_bias, self.values if self.ranking == "contribution" else None)
        patience = STALE if self.training else 1
        find: Find = self._derived("index", lambda *_: INDEXES[self.search](self._vectors, self.slots), sources, patience=patience)
        return find(F.pad(self.queries(hidden)[:, 0], (0, 1), value=1.0), self._wanted()), False

    def _vectors(self, rows: slice) -> Tensor:
        """One vector `(n, width + 1)` for each of some slots, whose product with a query and 1 ranks it."""
        keys = self.keys[rows]
        if self.weighting == "distance":
            return torch.cat([2 * keys, -keys.square().sum(-1, keepdim=True)], dim=-1)
        vectors = torch.cat([keys, self.key_bias[rows].unsqueeze(-1)], dim=-1)
        return vectors if self.ranking == "score" else vectors * self.lengths()[rows].unsqueeze(-1)

    def _roughly(self, hidden: Tensor) -> Tensor:
        """What `rank` gives, from keys in 8 bits."""
        query = self.queries(hidden)[:, 0]
        scores = self._scored(self._codes("key", self.keys)(query), query, self.keys, self.key_bias)
        if self.pointwise is None:
            return scores
        gains = None
        if self.gains is not None and self.gain_bias is not None:
            gains = self._codes("gain", self.gains)(hidden) + self.gain_bias
        return self.ranked(self._weighed(scores, gains, self.means), scores)

    def _codes(self, name: str, rows: Tensor) -> Codes:
        kept = None if self.filed is None else getattr(self.filed, f"{name}_codes")
        return self._derived(f"{name} codes", Codes, (rows,)) if kept is None else kept

    def _selected(self, rank: Tensor) -> Tensor:
        """Mask `(tokens, slots)` of what an exact search reads."""
        return as_mask(self._top(rank), self.slots) if self.threshold is None else self._reaching(rank)

    def select(self, hidden: Tensor) -> Tensor:
        """Which slots are read for `hidden` `(tokens, width)`: a mask `(tokens, slots)`."""
        return self.read_by(hidden)[0]

    @torch.no_grad()
    def read_by(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots are read for `hidden` `(tokens, width)`, and the weights of those: both `(tokens, slots)`."""
        if not self._looks_up(len(hidden)):
            scores = self.scores(hidden)
            weights = scores if self.pointwise is None else self.weights(hidden, scores)
            mask = self._selected(self.ranked(weights, scores))
            return mask, normalised(scores, mask) if self.pointwise is None else weights * mask
        ids, scores, found, chosen = self._found(hidden)
        found = (normalised(scores, chosen) if found is None else found) * chosen
        nothing = torch.zeros(len(hidden), self.slots, device=hidden.device, dtype=found.dtype)
        # a place that is not read may stand for slot 0, which another place may read
        return nothing.scatter_add(-1, ids, chosen.to(found.dtype)) > 0, nothing.scatter_add(-1, ids, found)

    @torch.no_grad()
    def recall(self, hidden: Tensor) -> float:
        """Share of the slots that an exact search would read for `hidden` `(tokens, width)` which this search reads."""
        if self.search == "exact":
            return 1.0
        rank = self.rank(hidden)
        wanted = self._selected(rank)
        if self.ranking != "score":
            wanted &= rank > 0  # a slot that says nothing is not missed
        ids, _, _, chosen = self._found(hidden)
        return float((wanted.gather(1, ids) & chosen).sum() / wanted.sum().clamp_min(1))

    @torch.no_grad()
    def _top(self, rank: Tensor) -> Tensor:
        """Ids `(tokens, k)` of the slots ranked highest, head by head."""
        k = self._k() // self.heads
        if self.heads == 1:
            return exact(rank, k)
        grouped = exact(rank.view(len(rank), self.heads, -1), k)
        offsets = torch.arange(0, self.slots, self.slots // self.heads, device=rank.device).unsqueeze(-1)
        return (grouped + offsets).flatten(-2)

    def _reaching(self, rank: Tensor) -> Tensor:
        assert self.threshold is not None, "asked for where selection is by threshold"
        return reaching(rank, self.threshold)

    def extra_repr(self) -> str:
        shape = f"width={self.width}, slots={self.slots}, k={self.k}, heads={self.heads}"
        return f"{shape}, weighting={self.weighting}, ranking={self.ranking}, selection={self.selection}"
