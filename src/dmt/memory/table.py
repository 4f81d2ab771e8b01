"""A table of slots: what a memory holds, and what each slot would weigh for a token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.compensation import linear_forecast
from dmt.memory.derived import Derived
from dmt.memory.filed import Fileable, lengths_of
from dmt.memory.products import linear as product
from dmt.memory.weighting import pointwise


class SlotTable(Fileable):
    """Keys, values and all that belongs to them; arguments as in `FeaturalMemory`, which reads from it.

    Args:
        shared: whether there is a threshold, shared with other memories.
    """

    def __init__(
        self,
        width: int,
        slots: int,
        heads: int,
        weighting: str,
        activation: str,
        gated: bool,
        ranking: str,
        metric: str,
        projections: bool,
        linear: bool,
        shared: bool,
        value_type: str = "float32",
        disk: str = "none",
    ) -> None:
        super().__init__(value_type, disk)
        if disk == "slots" and weighting == "distance":
            raise ValueError("disk=slots leaves keys in a file, and weighting=distance needs the length of each")
        self.pointwise = pointwise(weighting, activation)
        if self.pointwise is None and ranking != "score":
            raise ValueError(f"weighting={weighting} works with ranking=score and gradient=selected only")
        if self.pointwise is None and gated:
            raise ValueError(f"weighting={weighting} knows no gains; a gated block needs weighting=activation or relu")
        self.width, self.slots, self.heads, self.weighting, self.ranking = width, slots, heads, weighting, ranking
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
        self.threshold: Tensor | None
        self.register_buffer("metric", torch.empty(width, width) if metric == "sensitivity" else None)
        self.register_buffer("threshold", torch.empty(()) if shared else None)
        self.reads: Tensor | None = None
        self.reads_tokens = 0
        self.spent: Tensor | None = None
        self._derived = Derived()

    @torch.no_grad()
    def reset(self) -> None:
        """Random slots: scores of unit variance for normalised hidden states, small values, projections of full rank."""
        spread = {"keys": 1 / math.sqrt(self.width), "values": 0.02, "gains": 1 / math.sqrt(self.width)}
        for name, std in spread.items():
            if (table := self._parameters.get(name)) is not None:
                nn.init.normal_(table, std=std)
        for zero in (self.key_bias, self.gain_bias, self.output_bias, self.means, self.linear, self.threshold):
            if zero is not None:
                nn.init.zeros_(zero)
        if (metric := self._buffers.get("metric")) is not None:
            nn.init.eye_(metric)
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

    def queries(self, hidden: Tensor) -> Tensor:
        """What keys are compared with: `(tokens, width)` to `(tokens, heads, width)`, one head without projections."""
        return hidden.unsqueeze(-2) if self.query is None else torch.einsum("nw,hvw->nhv", hidden, self.query)

    def scores(self, hidden: Tensor) -> Tensor:
        """Score of every slot for every token: `(tokens, width)` to `(tokens, slots)`."""
        queries = self.queries(hidden)
        if self.pointwise is not None and queries.shape[1] == 1:
            return product(queries[:, 0], self.keys, self.key_bias)
        if queries.shape[1] == 1:
            products = product(queries[:, 0], self.keys)
        else:
            products = torch.einsum("nhv,hsv->nhs", queries, self.keys.view(self.heads, -1, self.width)).flatten(-2)
        return self._scored(products, queries, self.keys, self.key_bias)

    def scores_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What `scores` gives at `ids` `(tokens, n)`, from the keys there alone; for one head."""
        queries = self.queries(hidden)
        if len(hidden) == 1:
            keys, at = self.keys.index_select(0, ids[0]), ids[0]
            keys = keys.to(queries.dtype)
            return self._scored(torch.mv(keys, queries[0, 0]), queries, keys, self.key_bias[at]).view(1, -1)
        keys = F.embedding(ids, self.keys).to(queries.dtype)
        products = (keys @ queries.transpose(1, 2)).squeeze(-1)
        return self._scored(products, queries, keys, self.key_bias[ids])

    def _scored(self, products: Tensor, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        if self.weighting == "distance":
            lengths = queries.square().sum(-1).view(len(queries), -1)
            if lengths.shape[1] > 1:
                lengths = lengths.repeat_interleave(self.slots // lengths.shape[1], dim=-1)
            return (2 * products - lengths - keys.square().sum(-1)) / math.sqrt(self.width)
        return products + bias if self.pointwise else (products + bias) / math.sqrt(self.width)

    def weights(self, hidden: Tensor, scores: Tensor) -> Tensor:
        """Weight of every slot, `(tokens, slots)`, less its mean where means are kept; for pointwise weightings only."""
        gains = None if self.gains is None else product(hidden, self.gains, self.gain_bias)
        return self._weighed(scores, gains, self.means)

    def weights_at(self, hidden: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        """What `weights` gives at `ids` `(tokens, n)`, where the scores are `scores` of the same shape."""
        gains = None
        if self.gains is not None and self.gain_bias is not None:
            rows = F.embedding(ids, self.gains).to(hidden.dtype)
            gains = (rows @ hidden.unsqueeze(-1)).squeeze(-1) + self.gain_bias[ids]
        return self._weighed(scores, gains, None if self.means is None else self.means[ids])

    def _weighed(self, scores: Tensor, gains: Tensor | None, means: Tensor | None) -> Tensor:
        assert self.pointwise is not None, "softmax and distance weigh slots against each other"
        weights = self.pointwise(scores)
        weights = weights if gains is None else weights * gains
        return weights if means is None else weights - means

    @torch.no_grad()
    def rank(self, hidden: Tensor) -> Tensor:
        """What slots are chosen by, `(tokens, slots)`; in the metric `sensitivity` its square is twice the nats at stake."""
        scores = self.scores(hidden)
        return scores if self.pointwise is None else self.ranked(self.weights(hidden, scores), scores)

    @torch.no_grad()
    def ranked(self, weights: Tensor, scores: Tensor, ids: Tensor | None = None) -> Tensor:
        """Ranks from weights or scores, of all slots or of those at `ids`, in the same shape."""
        if self.ranking == "score":
            return scores
        lengths = self.lengths()
        return weights.abs() * (lengths if ids is None else lengths[ids])

    def always(self) -> Tensor:
        """What is said whatever is read, `(width,)`: the output bias and every slot's mean."""
        if self.means is None:
            return self.output_bias
        if self.filed is not None:
            assert self.filed.said is not None, "a memory with means is filed with what they say"
            return self.output_bias + self.filed.said.to(self.output_bias.dtype)
        if torch.is_grad_enabled():  # then it belongs to the graph of one step
            return self.output_bias + self.means @ self.values
        sources = self.output_bias, self.means, self.values
        return self._derived("always", lambda bias, means, values: bias + means @ values, sources, again=self.training)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """How long each value is in the metric, `(slots,)`."""
        if self.filed is not None:
            return self.filed.lengths.to(self.output_bias.dtype)
        return self._derived("lengths", lengths_of, (self.values, self.metric, self.output), again=self.training)

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

    @torch.no_grad()
    def _count(self, chosen: Tensor, tokens: int | None = None) -> None:
        """Note reads where somebody asked for it: of a mask `(tokens, slots)`, or of ids read by so many tokens."""
        mask = chosen.dtype == torch.bool
        tokens = len(chosen) if tokens is None else tokens
        if self.reads is not None:
            self.reads.add_(chosen.sum(0) if mask else torch.bincount(chosen.flatten(), minlength=self.slots))
            self.reads_tokens += tokens
        if self.spent is not None and self.training:
            reads = chosen.sum() if mask else torch.tensor(chosen.numel(), device=chosen.device)
            self.spent += torch.stack([reads, reads.new_tensor(tokens)])

    def count_reads(self) -> None:
        """Start counting how often each slot is read, in `reads` `(slots,)`, and for how many tokens, from zero."""
        self.reads_tokens = 0
        self.reads = torch.zeros(self.slots, dtype=torch.long, device=self.keys.device)
