"""A table of slots: what a memory holds, and what each slot would weigh for a token.

From scores to the weights of slots: the functions a memory can choose from.

What slots that are not read would have said, as far as it can be foreseen.

Things made from tensors that rarely change: made once, and again when one of those is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.mmap_tensors import MmapTensorsMixin, compute_value_norms
from dmt.ops import linear as product

ActivationFn = Callable[[Tensor], Tensor]


def _gelu_tanh(scores: Tensor) -> Tensor:
    return F.gelu(scores, approximate="tanh")


# `gelu_new` is the tanh form written out in five kernels; the fused one is the same function and several times faster.
ACTIVATIONS: dict[str, ActivationFn] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def get_activation(weighting: str, activation: str) -> ActivationFn | None:
    """The function of one score that gives its slot's weight; None where weights depend on each other.

    Raises:
        ValueError: the block replaced has an activation that is not in `ACTIVATIONS`.
    """
    if weighting in ("softmax", "distance"):
        return None
    name = "relu" if weighting == "relu" else activation
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def masked_softmax(scores: Tensor, selected: Tensor) -> Tensor:
    """Softmax of `scores` over the selected slots `(..., slots)`; zero elsewhere."""
    return torch.softmax(scores.masked_fill(~selected, float("-inf")), dim=-1)


RIDGE = 1e-3
"""Ridge of the linear forecast, as a share of the mean variance of the hidden state."""


def fit_ridge_map(hidden: Tensor, targets: Tensor) -> Tensor:
    """The matrix `(width, width)` that best foretells `wanted` from `hidden`, both `(tokens, width)`, about their means.

    Source: ridge regression by its normal equations, in doubles, on the CPU, for not every device has doubles.
    """
    centered_hidden, centered_targets = (
        (states - states.mean(0)).cpu().double() for states in (hidden, targets)
    )
    gram = centered_hidden.t() @ centered_hidden
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.double)
    return torch.linalg.solve(gram + ridge, centered_hidden.t() @ centered_targets).t().to(hidden)


class TensorCache:
    """Keeps what is derived, by name, in full precision: under autocast it would be another tensor than without."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, Any]] = {}
        self._stale_calls: dict[str, int] = {}

    @torch.no_grad()
    def __call__(
        self,
        name: str,
        build: Callable[..., Any],
        sources: tuple[Tensor | None, ...],
        force: bool = False,
        patience: int = 1,
    ) -> Any:
        """`make(*sources)`, from memory where no source has been written to or exchanged since; `again` makes it anew.

        With `patience` more than 1 it is made anew only at the so-manieth call that found a source changed. A write that
        goes around autograd's version counter (`tensor.data`) is not noticed.
        """
        tensors = [tensor for tensor in sources if tensor is not None]
        cacheable = not force and not any(tensor.is_inference() for tensor in tensors)
        versions = (
            [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors]
            if cacheable
            else None
        )
        if versions is None or name not in self._entries or self._entries[name][0] != versions:
            self._stale_calls[name] = self._stale_calls.get(name, patience - 1) + 1
            if self._stale_calls[name] >= patience:
                with torch.autocast(tensors[0].device.type, enabled=False):
                    self._entries[name] = versions, build(*sources)
                self._stale_calls[name] = 0
        return self._entries[name][1]


class SlotTable(MmapTensorsMixin):
    """Keys, values and all that belongs to them; arguments as in `FeaturalMemory`, which reads from it.

    Args:
        shared: whether there is a threshold, shared with other memories.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        heads: int,
        activation: str,
        activation_function: str,
        gated: bool,
        selection: str,
        metric: str,
        projections: bool,
        skip_connection: bool,
        has_threshold: bool,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__(value_dtype, offload)
        if offload == "slots" and activation == "distance":
            raise ValueError(
                "disk=slots leaves keys in a file, and weighting=distance needs the length of each"
            )
        self.activation_fn = get_activation(activation, activation_function)
        if self.activation_fn is None and selection != "score":
            raise ValueError(
                f"weighting={activation} works with ranking=score and gradient=selected only"
            )
        if self.activation_fn is None and gated:
            raise ValueError(
                f"weighting={activation} knows no gains; a gated block needs weighting=activation or relu"
            )
        self.width, self.num_slots, self.heads, self.activation, self.selection = (
            width,
            num_slots,
            heads,
            activation,
            selection,
        )
        self.keys = nn.Parameter(torch.empty(num_slots, width))
        self.key_bias = nn.Parameter(torch.empty(num_slots))
        self.values = nn.Parameter(torch.empty(num_slots, width))
        self.output_bias = nn.Parameter(torch.empty(width))
        self.means = nn.Parameter(torch.empty(num_slots)) if selection == "centered" else None
        self.query = nn.Parameter(torch.empty(heads, width, width)) if projections else None
        self.output = nn.Parameter(torch.empty(width, width)) if projections else None
        self.skip_connection = nn.Parameter(torch.empty(width, width)) if skip_connection else None
        self.gains = nn.Parameter(torch.empty(num_slots, width)) if gated else None
        self.gain_bias = nn.Parameter(torch.empty(num_slots)) if gated else None
        self.threshold: Tensor | None
        self.register_buffer("metric", torch.empty(width, width) if metric == "fisher" else None)
        self.register_buffer("threshold", torch.empty(()) if has_threshold else None)
        self.read_counts: Tensor | None = None
        self.counted_tokens = 0
        self.budget_counts: Tensor | None = None
        self._tensor_cache = TensorCache()

    @torch.no_grad()
    def reset(self) -> None:
        """Random slots: scores of unit variance for normalised hidden states, small values, projections of full rank."""
        stds = {
            "keys": 1 / math.sqrt(self.width),
            "values": 0.02,
            "gains": 1 / math.sqrt(self.width),
        }
        for name, std in stds.items():
            if (parameter := self._parameters.get(name)) is not None:
                nn.init.normal_(parameter, std=std)
        for zero_parameter in (
            self.key_bias,
            self.gain_bias,
            self.output_bias,
            self.means,
            self.skip_connection,
            self.threshold,
        ):
            if zero_parameter is not None:
                nn.init.zeros_(zero_parameter)
        if (metric := self._buffers.get("metric")) is not None:
            nn.init.eye_(metric)
        for projection in (self.query, self.output):
            if projection is not None:
                nn.init.normal_(projection, std=1 / math.sqrt(self.width))

    @torch.no_grad()
    def load_feedforward(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a block's neurons: parameters by name, keys and values `(slots, width)`, biases where it has any.

        Biases it lacks, means and the linear map become zero, gains it lacks are not touched, projections identities.
        """
        for zero_parameter in (
            self.key_bias,
            self.gain_bias,
            self.output_bias,
            self.means,
            self.skip_connection,
        ):
            if zero_parameter is not None:
                zero_parameter.zero_()
        for name, tensor in tensors.items():
            self.get_parameter(name).copy_(tensor)
        for projection in (self.query, self.output):
            if projection is not None:
                projection.copy_(torch.eye(self.width))

    def compute_queries(self, hidden: Tensor) -> Tensor:
        """What keys are compared with: `(tokens, width)` to `(tokens, heads, width)`, one head without projections."""
        return (
            hidden.unsqueeze(-2)
            if self.query is None
            else torch.einsum("nw,hvw->nhv", hidden, self.query)
        )

    def compute_scores(self, hidden: Tensor) -> Tensor:
        """Score of every slot for every token: `(tokens, width)` to `(tokens, slots)`."""
        queries = self.compute_queries(hidden)
        if self.activation_fn is not None and queries.shape[1] == 1:
            return product(queries[:, 0], self.keys, self.key_bias)
        if queries.shape[1] == 1:
            products = product(queries[:, 0], self.keys)
        else:
            products = torch.einsum(
                "nhv,hsv->nhs", queries, self.keys.view(self.heads, -1, self.width)
            ).flatten(-2)
        return self._finish_scores(products, queries, self.keys, self.key_bias)

    def compute_scores_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What `scores` gives at `ids` `(tokens, n)`, from the keys there alone; for one head."""
        queries = self.compute_queries(hidden)
        if len(hidden) == 1:
            keys, slot_ids = self.keys.index_select(0, ids[0]), ids[0]
            keys = keys.to(queries.dtype)
            return self._finish_scores(
                torch.mv(keys, queries[0, 0]), queries, keys, self.key_bias[slot_ids]
            ).view(1, -1)
        keys = F.embedding(ids, self.keys).to(queries.dtype)
        products = (keys @ queries.transpose(1, 2)).squeeze(-1)
        return self._finish_scores(products, queries, keys, self.key_bias[ids])

    def _finish_scores(
        self, products: Tensor, queries: Tensor, keys: Tensor, bias: Tensor
    ) -> Tensor:
        if self.activation == "distance":
            squared_norms = queries.square().sum(-1).view(len(queries), -1)
            if squared_norms.shape[1] > 1:
                squared_norms = squared_norms.repeat_interleave(
                    self.num_slots // squared_norms.shape[1], dim=-1
                )
            return (2 * products - squared_norms - keys.square().sum(-1)) / math.sqrt(self.width)
        return products + bias if self.activation_fn else (products + bias) / math.sqrt(self.width)

    def compute_weights(self, hidden: Tensor, scores: Tensor) -> Tensor:
        """Weight of every slot, `(tokens, slots)`, less its mean where means are kept; for pointwise weightings only."""
        gains = None if self.gains is None else product(hidden, self.gains, self.gain_bias)
        return self._scores_to_weights(scores, gains, self.means)

    def compute_weights_at(self, hidden: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        """What `weights` gives at `ids` `(tokens, n)`, where the scores are `scores` of the same shape."""
        gains = None
        if self.gains is not None and self.gain_bias is not None:
            gain_rows = F.embedding(ids, self.gains).to(hidden.dtype)
            gains = (gain_rows @ hidden.unsqueeze(-1)).squeeze(-1) + self.gain_bias[ids]
        return self._scores_to_weights(
            scores, gains, None if self.means is None else self.means[ids]
        )

    def _scores_to_weights(
        self, scores: Tensor, gains: Tensor | None, means: Tensor | None
    ) -> Tensor:
        assert self.activation_fn is not None, "softmax and distance weigh slots against each other"
        weights = self.activation_fn(scores)
        weights = weights if gains is None else weights * gains
        return weights if means is None else weights - means

    @torch.no_grad()
    def compute_ranks(self, hidden: Tensor) -> Tensor:
        """What slots are chosen by, `(tokens, slots)`; in the metric `sensitivity` its square is twice the nats at stake."""
        scores = self.compute_scores(hidden)
        return (
            scores
            if self.activation_fn is None
            else self.rank_weights(self.compute_weights(hidden, scores), scores)
        )

    @torch.no_grad()
    def rank_weights(self, weights: Tensor, scores: Tensor, ids: Tensor | None = None) -> Tensor:
        """Ranks from weights or scores, of all slots or of those at `ids`, in the same shape."""
        if self.selection == "score":
            return scores
        norms = self.value_norms()
        return weights.abs() * (norms if ids is None else norms[ids])

    def constant_output(self) -> Tensor:
        """What is said whatever is read, `(width,)`: the output bias and every slot's mean."""
        if self.means is None:
            return self.output_bias
        if self.mmap_tensors is not None:
            assert self.mmap_tensors.mean_output is not None, (
                "a memory with means is filed with what they say"
            )
            return self.output_bias + self.mmap_tensors.mean_output.to(self.output_bias.dtype)
        if torch.is_grad_enabled():  # then it belongs to the graph of one step
            return self.output_bias + self.means @ self.values
        sources = self.output_bias, self.means, self.values
        return self._tensor_cache(
            "always",
            lambda bias, means, values: bias + means @ values,
            sources,
            force=self.training,
        )

    @torch.no_grad()
    def value_norms(self) -> Tensor:
        """How long each value is in the metric, `(slots,)`."""
        if self.mmap_tensors is not None:
            return self.mmap_tensors.value_norms.to(self.output_bias.dtype)
        return self._tensor_cache(
            "lengths",
            compute_value_norms,
            (self.values, self.metric, self.output),
            force=self.training,
        )

    @torch.no_grad()
    def calibrate_means(self, hidden: Tensor) -> None:
        """Set each slot's mean to its average weight over `hidden` `(tokens, width)`; nothing without centered ranking."""
        if self.means is not None and self.activation_fn is not None:
            self.means.zero_()
            self.means.copy_(self.compute_weights(hidden, self.compute_scores(hidden)).mean(0))

    @torch.no_grad()
    def compensate(self, hidden: Tensor, residual: Tensor) -> None:
        """Add to the answer what it lacks on average: `missing` `(tokens, width)` given `hidden` of the same shape.

        The mean goes into the output bias. With `linear`, what a linear map of the hidden state can foresee goes there,
        by ridge regression. With k = slots nothing is missing and nothing changes.
        """
        mean = residual.mean(0)
        if self.skip_connection is not None:
            skip_update = fit_ridge_map(hidden, residual)
            self.skip_connection.add_(skip_update)
            mean = mean - skip_update @ hidden.mean(0)
        if self.output is not None:
            mean = torch.linalg.lstsq(self.output, mean.unsqueeze(-1)).solution.squeeze(-1)
        self.output_bias.add_(mean)

    @torch.no_grad()
    def _record_reads(self, selected: Tensor, num_tokens: int | None = None) -> None:
        """Note reads where somebody asked for it: of a mask `(tokens, slots)`, or of ids read by so many tokens."""
        is_mask = selected.dtype == torch.bool
        num_tokens = len(selected) if num_tokens is None else num_tokens
        if self.read_counts is not None:
            self.read_counts.add_(
                selected.sum(0)
                if is_mask
                else torch.bincount(selected.flatten(), minlength=self.num_slots)
            )
            self.counted_tokens += num_tokens
        if self.budget_counts is not None and self.training:
            num_reads = (
                selected.sum()
                if is_mask
                else torch.tensor(selected.numel(), device=selected.device)
            )
            self.budget_counts += torch.stack([num_reads, num_reads.new_tensor(num_tokens)])

    def count_reads(self) -> None:
        """Start counting how often each slot is read, in `reads` `(slots,)`, and for how many tokens, from zero."""
        self.counted_tokens = 0
        self.read_counts = torch.zeros(self.num_slots, dtype=torch.long, device=self.keys.device)
