"""The slots of a featural memory: parameters, scores, weights and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.mmap_tensors import MmapTensorsMixin, compute_value_norms, gather_rows
from dmt.memory.usage import UsageMixin
from dmt.ops import linear, solve_ridge

ActivationFn = Callable[[Tensor], Tensor]


def _gelu_tanh(scores: Tensor) -> Tensor:
    return F.gelu(scores, approximate="tanh")


# `gelu_new` is the tanh form in five kernels; the fused one is the same and several times faster.
ACTIVATIONS: dict[str, ActivationFn] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
# Weightings in which the weights of the slots read depend on each other.
JOINT_WEIGHTINGS = ("softmax", "distance")
SELECTIONS = ("score", "contribution", "centered")
METRICS = ("euclidean", "fisher")
# Parameters with an entry for each slot, by the names in `load_feedforward`.
NEURON_PARAMETERS = ("keys", "key_bias", "gains", "gain_bias", "values")
# k = num_slots / 16 where the config leaves k empty.
DEFAULT_K_DIVISOR = 16


def get_activation(activation: str, activation_function: str | None = None) -> ActivationFn | None:
    """Return the function that maps a score to its slot's weight.

    Args:
        activation: `block`, `softmax`, `distance`, or a name in `ACTIVATIONS`.
        activation_function: the name in `ACTIVATIONS` that `block` stands for.

    Returns:
        The function; None for `softmax` and `distance`, whose weights depend on each other.

    Raises:
        ValueError: the name is not supported, or `block` comes without a function.
    """
    if activation in JOINT_WEIGHTINGS:
        return None
    name = activation_function if activation == "block" else activation
    if name is None:
        raise ValueError(
            "activation='block' needs activation_function, the activation of the block replaced: "
            f"one of {', '.join(ACTIVATIONS)}"
        )
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation {name!r} is not supported; use {', '.join(ACTIVATIONS)}, "
            f"{', '.join(JOINT_WEIGHTINGS)}"
        )
    return ACTIVATIONS[name]


def masked_softmax(scores: Tensor, selected: Tensor) -> Tensor:
    """Compute the softmax of `scores` over a mask of the same shape; zero elsewhere."""
    return torch.softmax(scores.masked_fill(~selected, float("-inf")), dim=-1)


def fit_ridge_map(hidden: Tensor, targets: Tensor) -> Tensor:
    """Fit the linear map that predicts `targets` from `hidden`, both about their means.

    Args:
        hidden: `(tokens, width)`.
        targets: of the same shape.

    Returns:
        `(width, width)`, in the type and on the device of `hidden`.
    """
    solution = solve_ridge(hidden - hidden.mean(0), targets - targets.mean(0))
    return solution.t().to(hidden)


class TensorCache:
    """Cache of values derived from tensors that rarely change, by name.

    Values are computed in full precision: under autocast they would differ from those without.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, Any]] = {}
        self._sources: dict[str, list[Callable[[], Tensor | None]]] = {}
        self._stale_calls: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorCache, ()  # a copy has tensors of its own

    @torch.no_grad()
    def __call__(
        self,
        name: str,
        build: Callable[..., Any],
        sources: tuple[Tensor | None, ...],
        force: bool = False,
        patience: int = 1,
    ) -> Any:
        """Return `build(*sources)`, from the cache while no source was written to or replaced.

        A write that bypasses autograd's version counter (`tensor.data`) is not noticed. A compiled
        or exported model computes the value in each pass, since it cannot look at a version.

        Args:
            name: of the entry.
            build: computes the value.
            sources: what it is computed from.
            force: compute it in any case.
            patience: compute it again only after so many calls have seen a changed source.

        Returns:
            The value.
        """
        tensors = [tensor for tensor in sources if tensor is not None]
        if torch.compiler.is_compiling():
            with torch.autocast(tensors[0].device.type, enabled=False):
                return build(*sources)
        cacheable = not force and not any(tensor.is_inference() for tensor in tensors)
        versions = (
            [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors]
            if cacheable
            else None
        )
        if versions is None or not self._is_current(name, versions, tensors):
            self._stale_calls[name] = self._stale_calls.get(name, patience - 1) + 1
            if self._stale_calls[name] >= patience:
                with torch.autocast(tensors[0].device.type, enabled=False):
                    self._entries[name] = versions, build(*sources)
                self._sources[name] = [_refer_to(tensor) for tensor in tensors]
                self._stale_calls[name] = 0
        return self._entries[name][1]

    def _is_current(self, name: str, versions: list[Any], tensors: list[Tensor]) -> bool:
        if name not in self._entries or self._entries[name][0] != versions:
            return False
        # A new tensor, such as an adapted parameter, may have the address of one that is gone.
        sources = self._sources[name]
        return all(source() is tensor for source, tensor in zip(sources, tensors, strict=True))


def _refer_to(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return a function that returns the tensor while it exists.

    A weak reference would keep torch from swapping a parameter (`torch.utils.swap_tensors`), a
    strong one would keep the graph of a computed tensor alive.
    """
    return (lambda: tensor) if tensor.is_leaf else ref(tensor)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` where `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")


def take_neurons(tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a block with these of its neurons, in this order."""
    return {
        name: tensor[ids.to(tensor.device)] if name in NEURON_PARAMETERS else tensor.clone()
        for name, tensor in tensors.items()
    }


class _Parametrizations(nn.ModuleDict):
    """Parametrizations by name, of which `keys` and `values` are names of methods too."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


class SlotTable(MmapTensorsMixin, UsageMixin):
    """Keys, values and their biases, and what each slot weighs for a token.

    Args are those of `FeaturalMemory`, which reads from it.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        *,
        heads: int,
        activation: str,
        activation_function: str | None,
        gated: bool,
        selection: str,
        metric: str,
        projections: bool,
        skip_connection: bool,
        has_threshold: bool,
        value_dtype: str,
        offload: str,
    ) -> None:
        super().__init__(value_dtype, offload)
        check_choice("selection", selection, SELECTIONS)
        check_choice("metric", metric, METRICS)
        if offload == "slots" and activation == "distance":
            raise ValueError(
                "offload=slots leaves keys in a file, and activation=distance needs the norm of "
                "each; use offload=values or another activation"
            )
        self.activation_fn = get_activation(activation, activation_function)
        if self.activation_fn is None and selection != "score":
            raise ValueError(
                f"activation={activation} needs selection=score and gradient=selected, "
                f"got selection={selection}"
            )
        if self.activation_fn is None and gated:
            raise ValueError(
                f"activation={activation} does not support gated=True; use block or one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        self.width, self.num_slots, self.heads = width, num_slots, heads
        self.activation, self.selection = activation, selection
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
        # Reads and tokens of training passes since `update_threshold`; the number of tokens is
        # known to the host, which would otherwise wait for it.
        self.budget_reads: Tensor | None = None
        self.budget_tokens = 0
        self._tensor_cache = TensorCache()

    def __setattr__(self, name: str, value: Any) -> None:
        # `torch.nn.utils.parametrize`, with which adapters train single parameters.
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            value = _Parametrizations(dict(value.items()))
        super().__setattr__(name, value)

    @torch.no_grad()
    def reset(self) -> None:
        """Draw random slots: scores of unit variance for normalized states, small values."""
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

    @torch.no_grad()
    def load_feedforward(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the neurons of a feed-forward block into the slots.

        Biases that the block lacks, means and the skip connection become zero, projections
        identities; gains that it lacks stay.

        Args:
            tensors: parameters by name: keys and values `(num_slots, width)`, biases.
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
        """Compute queries `(tokens, heads, width)`; without projections there is one head."""
        return (
            hidden.unsqueeze(-2)
            if self.query is None
            else torch.einsum("nw,hvw->nhv", hidden, self.query)
        )

    def compute_scores(self, hidden: Tensor) -> Tensor:
        """Score every slot for every token: `(tokens, width)` to `(tokens, num_slots)`."""
        queries = self.compute_queries(hidden)
        keys = self.keys.to(queries.device)  # a copy where they are in a file and this is a GPU
        if self.activation_fn is not None and queries.shape[1] == 1:
            return linear(queries[:, 0], keys, self.key_bias)
        if queries.shape[1] == 1:
            products = linear(queries[:, 0], keys)
        else:
            products = torch.einsum(
                "nhv,hsv->nhs", queries, keys.view(self.heads, -1, self.width)
            ).flatten(-2)
        return self._finish_scores(products, queries, keys, self.key_bias)

    def compute_scores_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Score the slots `ids` `(tokens, n)` only, from their keys alone; for one head."""
        queries = self.compute_queries(hidden)
        if len(hidden) == 1:
            slot_ids = ids[0]
            keys = self.keys.index_select(0, slot_ids.to(self.keys.device)).to(queries)
            return self._finish_scores(
                torch.mv(keys, queries[0, 0]), queries, keys, self.key_bias[slot_ids]
            ).view(1, -1)
        keys = gather_rows(self.keys, ids).to(queries.dtype)
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
        """Compute the weight of every slot, less its mean if `selection="centered"`.

        Not for `softmax` and `distance`.

        Args:
            hidden: `(tokens, width)`.
            scores: `(tokens, num_slots)`.

        Returns:
            `(tokens, num_slots)`.
        """
        gains = None
        if self.gains is not None:
            gains = linear(hidden, self.gains.to(hidden.device), self.gain_bias)
        return self._scores_to_weights(scores, gains, self.means)

    def compute_weights_at(self, hidden: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        """Compute the weights of the slots `ids` `(tokens, n)` from scores of the same shape."""
        gains = None
        if self.gains is not None and self.gain_bias is not None:
            gain_rows = gather_rows(self.gains, ids).to(hidden.dtype)
            gains = (gain_rows @ hidden.unsqueeze(-1)).squeeze(-1) + self.gain_bias[ids]
        return self._scores_to_weights(
            scores, gains, None if self.means is None else self.means[ids]
        )

    def _scores_to_weights(
        self, scores: Tensor, gains: Tensor | None, means: Tensor | None
    ) -> Tensor:
        assert self.activation_fn is not None, "softmax and distance weigh slots jointly"
        weights = self.activation_fn(scores)
        weights = weights if gains is None else weights * gains
        return weights if means is None else weights - means

    @torch.no_grad()
    def compute_ranks(self, hidden: Tensor) -> Tensor:
        """Compute what slots are selected by: `(tokens, width)` to `(tokens, num_slots)`.

        With `metric="fisher"` the square of a rank is twice the nats at stake.
        """
        scores = self.compute_scores(hidden)
        return (
            scores
            if self.activation_fn is None
            else self.rank_weights(self.compute_weights(hidden, scores), scores)
        )

    @torch.no_grad()
    def rank_weights(self, weights: Tensor, scores: Tensor, ids: Tensor | None = None) -> Tensor:
        """Compute ranks from weights or scores, of all slots or of those at `ids`; same shape."""
        if self.selection == "score":
            return scores
        norms = self.value_norms()
        return weights.abs() * (norms if ids is None else norms[ids])

    def constant_output(self) -> Tensor:
        """Compute what every token receives, `(width,)`: the output bias and all slots' means."""
        if self.means is None:
            return self.output_bias
        if (attached := self.mmap_tensors) is not None:
            assert attached.mean_output is not None, "saved for every centered memory"
            return self.output_bias + attached.mean_output.to(self.output_bias.dtype)
        if torch.is_grad_enabled():  # then it belongs to the graph of one step
            return self.output_bias + self.means @ self.values
        return self._tensor_cache(
            "constant_output",
            lambda bias, means, values: bias + means @ values,
            (self.output_bias, self.means, self.values),
            force=self.training,
        )

    @torch.no_grad()
    def value_norms(self) -> Tensor:
        """Compute the norm of each value in the metric, `(num_slots,)`."""
        if (attached := self.mmap_tensors) is not None:
            return attached.value_norms.to(self.output_bias.dtype)
        return self._tensor_cache(
            "value_norms",
            compute_value_norms,
            (self.values, self.metric, self.output),
            force=self.training,
        )

    @torch.no_grad()
    def calibrate_means(self, hidden: Tensor) -> None:
        """Set each slot's mean to its average weight over `hidden` `(tokens, width)`.

        Does nothing unless `selection="centered"`.
        """
        if self.means is not None and self.activation_fn is not None:
            self.means.zero_()
            self.means.copy_(self.compute_weights(hidden, self.compute_scores(hidden)).mean(0))

    @torch.no_grad()
    def compensate(self, hidden: Tensor, residual: Tensor) -> None:
        """Add to the output what it lacks on average.

        The mean goes into the output bias. With a skip connection, what ridge regression predicts
        from the hidden state goes there. With k = num_slots nothing is missing and nothing changes.

        Args:
            hidden: inputs `(tokens, width)`.
            residual: what the outputs lack, of the same shape.
        """
        mean = residual.mean(0)
        if self.skip_connection is not None:
            skip_update = fit_ridge_map(hidden, residual)
            self.skip_connection.add_(skip_update)
            mean = mean - skip_update @ hidden.mean(0)
        if self.output is not None:
            mean = torch.linalg.lstsq(self.output, mean.unsqueeze(-1)).solution.squeeze(-1)
        self.output_bias.add_(mean)

    def reset_budget_counts(self) -> None:
        """Start to count reads and tokens of training passes, which `update_threshold` uses."""
        self.budget_reads = torch.zeros((), dtype=torch.long, device=self.key_bias.device)
        self.budget_tokens = 0

    @torch.no_grad()
    def _record_reads(self, selected: Tensor, num_tokens: int | None = None) -> None:
        """Count reads: a mask `(tokens, num_slots)`, or the ids that `num_tokens` tokens read."""
        super()._record_reads(selected, num_tokens)
        if self.budget_reads is not None and self.training:
            self.budget_reads += (
                selected.sum() if selected.dtype == torch.bool else selected.numel()
            )
            self.budget_tokens += len(selected) if num_tokens is None else num_tokens
