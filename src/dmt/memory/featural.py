"""Featural memory: a learnt table of slots, of which each token reads k.

A feed-forward block is `sum_i act(x . key_i + bias_i) value_i + output_bias`, a sum over *all* its neurons. Keep the
sum, read only the k slots that matter, and knowledge is in rows. With k = slots nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.compensation import linear_forecast
from dmt.memory.derived import Derived
from dmt.memory.search import SEARCHES, as_mask, reaching
from dmt.memory.weighting import normalised, pointwise


class FeaturalMemory(nn.Module):
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
    ) -> None:
        super().__init__()
        if not 1 <= k <= slots:
            raise ValueError(f"k must be in [1, slots={slots}], got {k}")
        if slots % heads or (k % heads and selection == "top"):
            raise ValueError(f"slots={slots} and k={k} must be multiples of heads={heads}")
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search}")
        self.search = SEARCHES[search]
        self.pointwise = pointwise(weighting, activation)
        if self.pointwise is None and (ranking != "score" or gradient != "selected"):
            raise ValueError(f"weighting={weighting} works with ranking=score and gradient=selected only")
        if self.pointwise is None and gated:
            raise ValueError(f"weighting={weighting} knows no gains; a gated block needs weighting=activation or relu")
        if selection == "threshold" and ranking == "score":
            raise ValueError("selection=threshold needs ranks that compare over layers: ranking=contribution or centred")
        self.width, self.slots, self.k, self.heads = width, slots, k, heads
        self.weighting, self.ranking, self.gradient, self.selection = weighting, ranking, gradient, selection
        self.keys = nn.Parameter(torch.empty(slots, width))
        self.key_bias = nn.Parameter(torch.empty(slots))
        self.values = nn.Parameter(torch.empty(slots, width))
        self.output_bias = nn.Parameter(torch.empty(width))
        self.means = nn.Parameter(torch.empty(slots)) if ranking == "centred" else None
        self.query = nn.Parameter(torch.empty(heads, width, width)) if projections else None
        self.output = nn.Parameter(torch.empty(width, width)) if projections else None
        self.linear = nn.Parameter(torch.empty(width, width)) if linear else None
        self.gains = nn.Parameter(torch.empty(slots, width)) if gated else None
        self.gain_bias = nn.Parameter(torch.empty(slots)) if gated else None
        self.metric: Tensor | None
        self.threshold: Tensor | None
        self.register_buffer("metric", torch.empty(width, width) if metric == "sensitivity" else None)
        self.register_buffer("threshold", torch.empty(()) if selection == "threshold" else None)
        self.reads: Tensor | None = None
        self.reads_tokens = 0
        self.spent: Tensor | None = None
        self.widened = 1.0  # slots read while training, as a multiple of k; it may begin with more
        self._derived = Derived()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Random slots: scores of unit variance for normalised hidden states, small values, projections of full rank."""
        nn.init.normal_(self.keys, std=1 / math.sqrt(self.width))
        nn.init.normal_(self.values, std=0.02)
        if self.gains is not None:
            nn.init.normal_(self.gains, std=1 / math.sqrt(self.width))
        for zero in (self.key_bias, self.gain_bias, self.output_bias, self.means, self.linear, self.threshold):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.metric is not None:
            nn.init.eye_(self.metric)
        for projection in (self.query, self.output):
            if projection is not None:
                nn.init.normal_(projection, std=1 / math.sqrt(self.width))

    @torch.no_grad()
    def load_feedforward(self, parts: Mapping[str, Tensor]) -> None:
        """Take over a block's neurons: parameters by name, keys and values `(slots, width)`, biases where it has any.

        Biases it lacks, means and the linear map become zero, gains it lacks are not touched, projections identities.
        """
        for zero in (self.key_bias, self.gain_bias, self.output_bias, self.means, self.linear):
            if zero is not None:
                zero.zero_()
        for name, tensor in parts.items():
            self.get_parameter(name).copy_(tensor)
        for projection in (self.query, self.output):
            if projection is not None:
                projection.copy_(torch.eye(self.width))

    def scores(self, hidden: Tensor) -> Tensor:
        """Score of every slot for every token: `(tokens, width)` to `(tokens, slots)`."""
        if self.query is None:
            products = hidden @ self.keys.t()
            queries = hidden.unsqueeze(-2)  # (tokens, 1, width)
        else:
            queries = torch.einsum("nw,hvw->nhv", hidden, self.query)
            products = torch.einsum("nhv,hsv->nhs", queries, self.keys.view(self.heads, -1, self.width)).flatten(-2)
        if self.weighting != "distance":
            scale = 1 if self.pointwise else 1 / math.sqrt(self.width)
            return (products + self.key_bias) * scale
        lengths = queries.square().sum(-1).repeat_interleave(self.slots // queries.shape[-2], dim=-1)
        return (2 * products - lengths - self.keys.square().sum(-1)) / math.sqrt(self.width)

    def weights(self, hidden: Tensor, scores: Tensor) -> Tensor:
        """Weight of every slot, `(tokens, slots)`, less its mean where means are kept; for pointwise weightings only."""
        assert self.pointwise is not None, "softmax and distance weigh slots against each other"
        weights = self.pointwise(scores)
        if self.gains is not None:
            weights = weights * F.linear(hidden, self.gains, self.gain_bias)
        return weights if self.means is None else weights - self.means

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        scores = self.scores(flat)
        if self.pointwise is None:
            mask = as_mask(self._top(scores), self.slots)
            self._count(mask)
            read = normalised(scores, mask) @ self.values + self.output_bias
        else:
            read = self._read(self.weights(flat, scores), scores)
        if self.output is not None:
            read = read @ self.output.t()
        if self.linear is not None:
            read = torch.addmm(read, flat, self.linear.t())
        return read.view_as(hidden)

    def _read(self, weights: Tensor, scores: Tensor) -> Tensor:
        """Weighted sum of the values of the selected slots and of every slot's mean, `(tokens, width)`."""
        bias = self.always()
        rank = self._rank(weights, scores)
        # Without gradients only the values read are touched: faster at most sizes tried (benchmarks/memory.py). With
        # them the masked product is level in float32 and ahead in half precision.
        if not torch.is_grad_enabled() and self.selection == "top":
            ids = self._top(rank)
            self._count(ids)
            chosen = weights.gather(-1, ids).to(self.values.dtype)
            return F.embedding_bag(ids, self.values, per_sample_weights=chosen, mode="sum") + bias
        mask = as_mask(self._top(rank), self.slots) if self.selection == "top" else self._reaching(rank)
        self._count(mask)
        if not torch.is_grad_enabled():
            tokens, ids = mask.nonzero(as_tuple=True)
            starts = F.pad(mask.sum(-1).cumsum(0)[:-1], (1, 0))
            chosen = weights[tokens, ids].to(self.values.dtype)
            return F.embedding_bag(ids, self.values, starts, per_sample_weights=chosen, mode="sum") + bias
        kept = weights * mask
        if self.gradient == "straight_through":
            kept = weights + (kept - weights).detach()
        return torch.addmm(bias, kept, self.values)

    @torch.no_grad()
    def select(self, hidden: Tensor) -> Tensor:
        """Which slots are read for `hidden` `(tokens, width)`: a mask `(tokens, slots)`."""
        scores = self.scores(hidden)
        rank = scores if self.pointwise is None else self._rank(self.weights(hidden, scores), scores)
        return as_mask(self._top(rank), self.slots) if self.selection == "top" else self._reaching(rank)

    @torch.no_grad()
    def rank(self, hidden: Tensor) -> Tensor:
        """What slots are chosen by, `(tokens, slots)`; in the metric `sensitivity` its square is twice the nats at stake."""
        scores = self.scores(hidden)
        return scores if self.pointwise is None else self._rank(self.weights(hidden, scores), scores)

    @torch.no_grad()
    def _rank(self, weights: Tensor, scores: Tensor) -> Tensor:
        return scores if self.ranking == "score" else weights.abs() * self.lengths()

    def always(self) -> Tensor:
        """What is said whatever is read, `(width,)`: the output bias and every slot's mean."""
        if self.means is None:
            return self.output_bias
        if torch.is_grad_enabled():  # then it belongs to the graph of one step
            return self.output_bias + self.means @ self.values
        sources = self.output_bias, self.means, self.values
        return self._derived("always", lambda bias, means, values: bias + means @ values, sources, again=self.training)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """How long each value is in the metric, `(slots,)`."""

        def measure(values: Tensor, metric: Tensor | None, output: Tensor | None) -> Tensor:
            if metric is not None:
                values = (values if output is None else values @ output.t()) @ metric
            return values.norm(dim=-1)

        return self._derived("lengths", measure, (self.values, self.metric, self.output), again=self.training)

    @torch.no_grad()
    def _top(self, rank: Tensor) -> Tensor:
        """Ids `(tokens, k)` of the slots ranked highest, head by head."""
        k = min(self.slots, round(self.k * (self.widened if self.training else 1))) // self.heads
        grouped = self.search(rank.view(len(rank), self.heads, -1), k)
        offsets = torch.arange(0, self.slots, self.slots // self.heads, device=rank.device).unsqueeze(-1)
        return (grouped + offsets).flatten(-2)

    def _reaching(self, rank: Tensor) -> Tensor:
        assert self.threshold is not None, "asked for where selection is by threshold"
        return reaching(rank, self.threshold)

    @torch.no_grad()
    def _count(self, chosen: Tensor) -> None:
        """Note reads, of a mask `(tokens, slots)` or of ids `(tokens, k)`, where somebody asked for it."""
        if self.reads is not None:
            mask = chosen.dtype == torch.bool
            self.reads.add_(chosen.sum(0) if mask else torch.bincount(chosen.flatten(), minlength=self.slots))
            self.reads_tokens += len(chosen)
        if self.spent is not None and self.training:
            self.spent += torch.stack([chosen.sum(), chosen.sum().new_tensor(len(chosen))])

    @torch.no_grad()
    def calibrate_means(self, hidden: Tensor) -> None:
        """Set each slot's mean to its average weight over `hidden` `(tokens, width)`; nothing without centred ranking."""
        if self.means is not None and self.pointwise is not None:
            self.means.zero_()
            self.means.copy_(self.weights(hidden, self.scores(hidden)).mean(0))

    @torch.no_grad()
    def compensate(self, hidden: Tensor, missing: Tensor) -> None:
        """Add to the answer what it lacks on average: `missing` `(tokens, width)` given `hidden` of the same shape.

        The mean goes into the output bias. With `linear`, what a linear map of the hidden state can foresee goes there,
        by ridge regression. With k = slots nothing is missing and nothing changes.
        """
        mean = missing.mean(0)
        if self.linear is not None:
            found = linear_forecast(hidden, missing)
            self.linear.add_(found)
            mean = mean - found @ hidden.mean(0)
        if self.output is not None:
            mean = torch.linalg.lstsq(self.output, mean.unsqueeze(-1)).solution.squeeze(-1)
        self.output_bias.add_(mean)

    def count_reads(self) -> None:
        """Start counting how often each slot is read, in `reads` `(slots,)`, and for how many tokens, from zero."""
        self.reads_tokens = 0
        self.reads = torch.zeros(self.slots, dtype=torch.long, device=self.keys.device)

    def extra_repr(self) -> str:
        shape = f"width={self.width}, slots={self.slots}, k={self.k}, heads={self.heads}"
        return f"{shape}, weighting={self.weighting}, ranking={self.ranking}, selection={self.selection}"
