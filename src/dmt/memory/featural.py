"""Featural memory: a learnt table of slots, of which each token reads k.

A feed-forward block is `sum_i act(x . key_i + bias_i) value_i + output_bias`, a sum over *all* its neurons. Keep the
sum, read only the k slots that matter, and knowledge is in rows. With k = slots nothing has changed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.search import SEARCHES, as_mask
from dmt.memory.weighting import normalised, pointwise

RIDGE = 1e-3
"""Ridge of the linear compensation, as a share of the mean variance of the hidden state."""


class FeaturalMemory(nn.Module):
    """Reads k of `slots` rows per token: query projection, top-k keys, weighted sum of values, output projection.

    Causal by construction: a token's output depends on that token's hidden state alone.

    Args:
        width: size of a hidden state, of a key and of a value.
        slots: rows of the table.
        k: rows read per token, over all heads together.
        heads: groups that share out the slots evenly. Each has its own query projection (with `projections`) and
            reads its own best `k / heads`. Weights and output are joint, so k = slots is the same for any number.
        weighting: `activation`, `relu` (a slot's weight is a function of its score), `softmax` (over the slots read,
            scores divided by the root of the width) or `distance` (the same with minus the squared distance as score).
        activation: the function of `weighting="activation"`, by its transformers name.
        ranking: `score`, `contribution` (|weight| x |value|) or `centred` (|weight - mean| x |value|, where every slot
            always contributes its mean and only deviations are read).
        gradient: `selected` or `straight_through` (forward k slots, backward as if all had been read).
        projections: learn a query projection per head and an output projection; identities until told otherwise.
        linear: beside the slots, a linear map of the hidden state that takes over what unread slots say on average;
            zero until `compensate` or training fills it.
        search: how the slots to read are found, one of `SEARCHES`.

    Raises:
        ValueError: k or slots out of range, not multiples of heads, or a ranking the weighting cannot serve.

    Source: Geva et al. 2021, arXiv 2012.14913 (blocks as key-value memories); Sukhbaatar et al. 2019, arXiv 1907.01470.
        The linear map is the skip connection of Paulo et al. 2025, arXiv 2501.18823, solved for instead of learnt.
        Ranking by centred contribution is ours, measured in EXPERIMENTS.md.
    """

    def __init__(
        self,
        width: int,
        slots: int,
        k: int,
        heads: int = 1,
        weighting: str = "activation",
        activation: str = "gelu_pytorch_tanh",
        ranking: str = "centred",
        gradient: str = "selected",
        projections: bool = False,
        linear: bool = False,
        search: str = "exact",
    ) -> None:
        super().__init__()
        if not 1 <= k <= slots:
            raise ValueError(f"k must be in [1, slots={slots}], got {k}")
        if slots % heads or k % heads:
            raise ValueError(f"slots={slots} and k={k} must be multiples of heads={heads}")
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search}")
        self.search = SEARCHES[search]
        self.pointwise = pointwise(weighting, activation)
        if self.pointwise is None and (ranking != "score" or gradient != "selected"):
            raise ValueError(f"weighting={weighting} works with ranking=score and gradient=selected only")
        self.width, self.slots, self.k, self.heads = width, slots, k, heads
        self.weighting, self.ranking, self.gradient = weighting, ranking, gradient
        self.keys = nn.Parameter(torch.empty(slots, width))
        self.key_bias = nn.Parameter(torch.empty(slots))
        self.values = nn.Parameter(torch.empty(slots, width))
        self.output_bias = nn.Parameter(torch.empty(width))
        self.means = nn.Parameter(torch.empty(slots)) if ranking == "centred" else None
        self.query = nn.Parameter(torch.empty(heads, width, width)) if projections else None
        self.output = nn.Parameter(torch.empty(width, width)) if projections else None
        self.linear = nn.Parameter(torch.empty(width, width)) if linear else None
        self.reads: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Random slots: scores of unit variance for normalised hidden states, small values, projections of full rank."""
        nn.init.normal_(self.keys, std=1 / math.sqrt(self.width))
        nn.init.normal_(self.values, std=0.02)
        for zero in (self.key_bias, self.output_bias, self.means, self.linear):
            if zero is not None:
                nn.init.zeros_(zero)
        for projection in (self.query, self.output):
            if projection is not None:
                nn.init.normal_(projection, std=1 / math.sqrt(self.width))

    @torch.no_grad()
    def load_feedforward(self, keys: Tensor, key_bias: Tensor, values: Tensor, output_bias: Tensor) -> None:
        """Take over a block's neurons: keys and values `(slots, width)`; projections become identities, means zero."""
        self.keys.copy_(keys)
        self.key_bias.copy_(key_bias)
        self.values.copy_(values)
        self.output_bias.copy_(output_bias)
        for zero in (self.means, self.linear):
            if zero is not None:
                zero.zero_()
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

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        scores = self.scores(flat)
        if self.pointwise is None:
            selected = self.select(scores)
            read = normalised(scores, selected) @ self.values + self.output_bias
        else:
            read = self._read(self.pointwise(scores), scores)
        if self.output is not None:
            read = read @ self.output.t()
        if self.linear is not None:
            read = torch.addmm(read, flat, self.linear.t())
        return read.view_as(hidden)

    def _read(self, weights: Tensor, scores: Tensor) -> Tensor:
        """Weighted sum of the values of the selected slots, `(tokens, width)`; with means, of their deviations."""
        deviations = self._deviations(weights)
        bias = self.output_bias if self.means is None else self.output_bias + self.means @ self.values
        ids = self._find(deviations, scores)
        if not torch.is_grad_enabled():
            # Only k values are touched: faster at every size tried (benchmarks/memory.py). With gradients the masked
            # product is level with it in float32 and ahead in half precision.
            chosen = deviations.gather(-1, ids).to(self.values.dtype)
            return F.embedding_bag(ids, self.values, per_sample_weights=chosen, mode="sum") + bias
        kept = deviations * as_mask(ids, self.slots)
        if self.gradient == "straight_through":
            kept = deviations + (kept - deviations).detach()
        return torch.addmm(bias, kept, self.values)

    def select(self, scores: Tensor) -> Tensor:
        """Which slots are read, as a mask `(tokens, slots)`, given the scores of all."""
        deviations = scores if self.pointwise is None else self._deviations(self.pointwise(scores))
        return as_mask(self._find(deviations, scores), self.slots)

    def _deviations(self, weights: Tensor) -> Tensor:
        return weights if self.means is None else weights - self.means

    @torch.no_grad()
    def _find(self, deviations: Tensor, scores: Tensor) -> Tensor:
        """Ids `(tokens, k)` of the slots to read."""
        rank = scores if self.ranking == "score" else deviations.abs() * self.values.norm(dim=-1)
        grouped = self.search(rank.view(len(rank), self.heads, -1), self.k // self.heads)
        offsets = torch.arange(0, self.slots, self.slots // self.heads, device=rank.device).unsqueeze(-1)
        ids = (grouped + offsets).flatten(-2)
        if self.reads is not None:
            self.reads.add_(torch.bincount(ids.flatten(), minlength=self.slots))
        return ids

    @torch.no_grad()
    def calibrate_means(self, hidden: Tensor) -> None:
        """Set each slot's mean to its average weight over `hidden` `(tokens, width)`; nothing without centred ranking."""
        if self.means is not None and self.pointwise is not None:
            self.means.copy_(self.pointwise(self.scores(hidden)).mean(0))

    @torch.no_grad()
    def compensate(self, hidden: Tensor, missing: Tensor) -> None:
        """Add to the answer what it lacks on average: `missing` `(tokens, width)` given `hidden` of the same shape.

        The mean goes into the output bias. With `linear`, what a linear map of the hidden state can foresee goes there,
        by ridge regression. With k = slots nothing is missing and nothing changes.
        """
        mean = missing.mean(0)
        if self.linear is not None:
            centre = hidden.mean(0)
            # On the CPU, for not every device has doubles.
            spread, wanted = (states.cpu().double() for states in (hidden - centre, missing - mean))
            square = spread.t() @ spread
            ridge = RIDGE * square.diagonal().mean() * torch.eye(self.width, dtype=torch.double)
            found = torch.linalg.solve(square + ridge, spread.t() @ wanted).t().to(hidden)
            self.linear.add_(found)
            mean = mean - found @ centre
        if self.output is not None:
            mean = torch.linalg.lstsq(self.output, mean.unsqueeze(-1)).solution.squeeze(-1)
        self.output_bias.add_(mean)

    def count_reads(self) -> None:
        """Start counting how often each slot is read, in `reads` `(slots,)`, from zero."""
        self.reads = torch.zeros(self.slots, dtype=torch.long, device=self.keys.device)

    def extra_repr(self) -> str:
        shape = f"width={self.width}, slots={self.slots}, k={self.k}, heads={self.heads}"
        return f"{shape}, weighting={self.weighting}, ranking={self.ranking}"
