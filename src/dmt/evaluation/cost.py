"""What a memory or a feed-forward block costs: its size, and what one token reads and multiplies.

Nothing is declared by a layer. It runs on one token at a time, as in generation, and each operation
of torch is looked at: what it reads of a tensor that is neither the token's hidden state nor
computed from it is read from memory. So parameters, buffers, tables in a file, and what a layer
derives from them and keeps, such as 8-bit codes, all count, and layers of one's own need no code.

- A lookup (`index`, `embedding`, `index_select`, `gather`) reads the rows that it looks up; any
  other operation reads its whole operand.
- An element that several operations read for the same token counts once, since a processor's cache
  holds it; the next token reads it again.
- faiss reads outside of torch; its searches say what they read (`dmt.memory.search_reads`).
- Multiply-adds are those of matrix products and weighted sums of rows, not of single numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from dmt.memory.mmap_tensors import ExternalTensorsMixin
from dmt.memory.search_reads import SearchReads, observe_searches
from dmt.memory.token_context import list_context_tensors
from dmt.models.architectures import get_architecture
from dmt.models.forward import forward_with_activations, inner_pass

# Tokens over which is averaged: with `k: auto` they read differently many rows.
MAX_TOKENS = 32
# Operations that take a tensor for its shape and type alone.
SHAPE_OPERATIONS = tuple(
    f"aten.{name}"
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
) + tuple(f"aten.new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full"))
# Multiplications of operations that torch's own counter leaves out.
MULTIPLY_ADDS: dict[str, Callable[..., int]] = {
    "aten.mv": lambda matrix, vector: matrix.numel(),
    "aten.addmv": lambda bias, matrix, vector, **_: matrix.numel(),
    "aten.dot": lambda left, right: left.numel(),
    "aten._int_mm": lambda left, right: left.numel() * right.shape[1],
    "mkldnn._linear_pointwise": lambda hidden, weight, *_: hidden.numel() * len(weight),
}
EMBEDDING_BAGS = ("aten._embedding_bag", "aten._embedding_bag_forward_only")


@dataclass(frozen=True)
class MemoryCost:
    """What a layer takes; what a token takes is a mean over tokens.

    Attributes:
        parameters: learned numbers.
        ram_bytes: bytes in RAM of parameters, buffers, and what is derived from them and read.
        disk_bytes: bytes that stay in a file and are read from there.
        read_bytes: bytes that one token reads, by type.
        reads_per_token: rows that one token looks up, in the table where these are most; None
            where it looks up nothing.
        multiply_adds: multiplications with an addition for one token.
    """

    parameters: int
    ram_bytes: int
    disk_bytes: int
    read_bytes: Mapping[str, float]
    reads_per_token: float | None
    multiply_adds: float

    @property
    def read_bytes_per_token(self) -> float:
        """Bytes that one token reads, of all types."""
        return sum(self.read_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as `run.json` has them."""
        return asdict(self) | {"read_bytes_per_token": self.read_bytes_per_token}

    def __add__(self, other: MemoryCost) -> MemoryCost:
        """Return what two layers take together."""
        reads = [cost.reads_per_token for cost in (self, other) if cost.reads_per_token is not None]
        return MemoryCost(
            self.parameters + other.parameters,
            self.ram_bytes + other.ram_bytes,
            self.disk_bytes + other.disk_bytes,
            dict(Counter(self.read_bytes) + Counter(other.read_bytes)),
            sum(reads) if reads else None,
            self.multiply_adds + other.multiply_adds,
        )


def sum_costs(costs: Iterable[MemoryCost]) -> MemoryCost:
    """Return what layers take together."""
    return reduce(MemoryCost.__add__, costs, MemoryCost(0, 0, 0, {}, None, 0.0))


@torch.no_grad()
def measure_cost(layer: nn.Module, hidden: Tensor) -> MemoryCost:
    """Measure what a layer takes that maps hidden states to the same shape.

    The layer is unchanged afterwards, and so is what it counts. One that looks tokens up is
    measured in a model, by `measure_costs`.

    Args:
        layer: a memory or a feed-forward block.
        hidden: real hidden states `(..., width)`; `MAX_TOKENS` of them, evenly spaced, are read.
    """
    states = hidden.reshape(-1, hidden.shape[-1])
    states = states[:: -(-len(states) // MAX_TOKENS)]
    meter = _CostMeter()
    with inner_pass(layer):
        layer(states[:1].unsqueeze(0))  # derives what is derived once
        for state in states:
            with meter.count_token(state):
                meter.add_output(layer(state.view(1, 1, -1)))
    return meter.compute_cost(layer)


@torch.no_grad()
def measure_costs(model: PreTrainedModel, tokens: Tensor) -> dict[int, MemoryCost]:
    """Measure what each feed-forward block or memory of a model takes, in generation with a cache.

    The model is unchanged afterwards, and so is what its memories count.

    Args:
        model: a causal language model of a supported architecture.
        tokens: token ids `(time,)` of a text, at least two. The last ones are counted, at most
            `MAX_TOKENS`, after all others.

    Returns:
        Costs by layer.
    """
    blocks = get_architecture(model.config.model_type).blocks(model)
    meters = [_CostMeter() for _ in blocks]
    num_counted = min(MAX_TOKENS, len(tokens) - 1)
    # The first pass over one token derives what is derived once.
    context, first, *counted = tokens.unsqueeze(0).split(
        [len(tokens) - num_counted - 1, *[1] * (num_counted + 1)], dim=1
    )
    cache = DynamicCache(config=model.config)
    with inner_pass(model):
        for part in (context, first):
            if part.numel():
                forward_with_activations(model, part, past_key_values=cache)
        with ExitStack() as stack:
            for block, meter in zip(blocks, meters, strict=True):
                stack.enter_context(_counting_passes(block, meter))
            for token in counted:
                forward_with_activations(model, token, past_key_values=cache)
    return {
        layer: meter.compute_cost(block)
        for layer, (block, meter) in enumerate(zip(blocks, meters, strict=True))
    }


@contextmanager
def _counting_passes(layer: nn.Module, meter: _CostMeter) -> Iterator[None]:
    """Count each pass of a layer inside the block as one token's."""
    running = ExitStack()

    def start(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        running.enter_context(meter.count_token(*inputs))

    def stop(_: nn.Module, args: Any, output: Any) -> None:
        meter.add_output(output)
        running.close()

    handles = [
        layer.register_forward_pre_hook(start, with_kwargs=True),
        layer.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _CostMeter(TorchDispatchMode):
    """Counts what operations read and multiply, for one token after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._num_tokens = self._num_rows = self._multiply_adds = 0
        self._read_bytes: Counter[str] = Counter()
        self._index_bytes = 0
        # Storages by address. Those that were read are held, so that no other gets an address.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._computed: set[int] = set()
        # What the current token has read, by storage and type: elements, or all of them, and ids
        # of rows.
        self._elements: dict[tuple[int, torch.dtype], Tensor] = {}
        self._whole: set[tuple[int, torch.dtype]] = set()
        self._rows: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    @contextmanager
    def count_token(self, *inputs: Tensor) -> Iterator[None]:
        """Count the operations inside the block as those of one token.

        Args:
            inputs: what is passed to the layer, which is not read from memory.
        """
        # Token ids come with the hidden state.
        self._computed = {_get_address(tensor) for tensor in (*inputs, *list_context_tensors())}
        index_bytes: list[int] = []

        def add_search(reads: SearchReads) -> None:
            self._read_bytes.update(reads.read_bytes)
            self._multiply_adds += reads.multiply_adds
            index_bytes.append(reads.index_bytes)

        with self, observe_searches(add_search):
            yield
        self._num_tokens += 1
        self._index_bytes = sum(index_bytes)
        for key in self._whole | set(self._elements):
            dtype, mask = key[1], self._elements.get(key)
            num_bytes = (
                self._storages[key[0]].nbytes()
                if key in self._whole or mask is None
                else int(mask.sum()) * dtype.itemsize
            )
            self._read_bytes[str(dtype).removeprefix("torch.")] += num_bytes
            if mask is not None:
                mask.zero_()
        self._num_rows += max(
            (len(torch.cat(ids).unique()) for ids in self._rows.values()), default=0
        )
        self._whole.clear()
        self._rows.clear()

    def add_output(self, output: Any) -> None:
        """Count what the current token's output shows of the layer's tensors without computing."""
        self._add_reads("", (), [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        name = str(func._overloadpacket)
        if name == "aten.lift_fresh":  # a tensor that was just made from Python or numpy
            self._computed |= {_get_address(tensor) for tensor in outputs}
        elif not func.is_view:
            if name not in SHAPE_OPERATIONS:
                self._add_reads(name, args, inputs)
            self._multiply_adds += _count_multiply_adds(func, args, kwargs, output)
            self._computed |= {_get_address(tensor) for tensor in outputs} - {
                _get_address(tensor) for tensor in inputs
            }
        return output

    def _add_reads(self, name: str, args: Any, inputs: list[Tensor]) -> None:
        """Mark what an operation reads of tensors that the token did not compute."""
        stored = [
            tensor
            for tensor in inputs
            if tensor.numel() and _get_address(tensor) not in self._computed
        ]
        table, index = _find_lookup(name, args) if stored else (None, ())
        for tensor in stored:
            address, is_table = _get_address(tensor), tensor is table
            storage = self._storages.setdefault(address, tensor.untyped_storage())
            key, num_elements = (address, tensor.dtype), storage.nbytes() // tensor.itemsize
            if is_table and isinstance(index[0], Tensor):
                self._rows.setdefault(key, []).append(_list_rows(index[0]))
            if not is_table and tensor.numel() == num_elements:
                self._whole.add(key)
            if key in self._whole:
                continue
            if key not in self._elements:
                self._elements[key] = torch.zeros(num_elements, dtype=torch.bool)
            # Of an expanded dimension one entry stands for all.
            shape = [
                size if stride or is_table else 1
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ]
            mask = self._elements[key].as_strided(shape, tensor.stride(), tensor.storage_offset())
            mask[index if is_table else ...] = True

    def compute_cost(self, layer: nn.Module) -> MemoryCost:
        """Return the means over all tokens, and the sizes of the layer."""
        sizes = {
            _get_address(tensor): tensor.untyped_storage().nbytes()
            for tensor in (*layer.parameters(), *layer.buffers())
        }
        sizes |= {address: storage.nbytes() for address, storage in self._storages.items()}
        num_parameters = sum(parameter.numel() for parameter in layer.parameters())
        disk_bytes = 0
        for module in layer.modules():
            if isinstance(module, ExternalTensorsMixin) and module.is_attached:
                disk_bytes += module.external_sizes()["disk"]
                for table_name in module.external_names:
                    table = getattr(module, table_name)
                    num_parameters += table.numel() * (table_name != "metric")
                    if module.offload != "none":
                        sizes.pop(_get_address(table), None)
                    else:
                        sizes[_get_address(table)] = table.nbytes
        return MemoryCost(
            num_parameters,
            sum(sizes.values()) + self._index_bytes,
            disk_bytes,
            {
                name: num_bytes / self._num_tokens
                for name, num_bytes in sorted(self._read_bytes.items())
            },
            self._num_rows / self._num_tokens or None,
            self._multiply_adds / self._num_tokens,
        )


def _get_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _find_lookup(name: str, args: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Return the table of an operation that looks rows up, and the index into it on the CPU."""
    if name in ("aten.embedding", *EMBEDDING_BAGS):
        return args[0], (args[1].cpu(),)
    if name == "aten.index_select":
        return args[0], (*[slice(None)] * (args[1] % args[0].dim()), args[2].cpu())
    if name == "aten.index":
        return args[0], tuple(slice(None) if ids is None else ids.cpu() for ids in args[1])
    if name == "aten.gather":
        table, dim, ids = args[:3]
        index = list(torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij"))
        index[dim] = ids.cpu()
        return table, tuple(index)
    return None, ()


def _list_rows(index: Tensor) -> Tensor:
    """Return the ids `(n,)` of the rows that an index or a mask chooses."""
    return index.nonzero()[:, 0] if index.dtype in (torch.bool, torch.uint8) else index.flatten()


def _count_multiply_adds(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    packet = func._overloadpacket
    name = str(packet)
    if name in MULTIPLY_ADDS:
        return MULTIPLY_ADDS[name](*args, **kwargs)
    if name in EMBEDDING_BAGS:
        table, ids, *_, weights = [*args, *[None] * 7][:7]
        return 0 if weights is None else ids.numel() * table.shape[1]
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output)) // 2
    return 0
