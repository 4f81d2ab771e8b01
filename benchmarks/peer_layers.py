"""Memory layers beside the reference implementations that run on a CPU, with equal weights.

    pip install product-key-memory==0.3.0 peer-pytorch==0.2.2 eai-sparsify==1.3.3
    python -m benchmarks.peer_layers [--only transcoder] [--threads N]

One line for the output, for the gradient of the input and for that of each shared weight, in
float64: the largest difference, divided by the largest value of the reference. Then milliseconds
of a forward pass on 256 tokens without gradients, in float32: medians of three, interleaved.

Shared weights are drawn at random, and parameters of both layers are functions of them, so that
gradients are comparable. Forms differ as follows; what has no counterpart is fixed.

- `product_key` and `PKM`. `dmt` compares by cosines, the reference by products with queries that a
  LayerNorm (or a BatchNorm) normalizes. A LayerNorm makes a centered vector as long as the square
  root of its size. So the rows of the query map are centered, the reference has sub-keys of length
  1 and an epsilon of zero, and the factor of `dmt` is the weight of its LayerNorm. The reference
  has no gate, so the memory has none here.
- `peer` and `PEER`. By default the reference reads one expert per head with a ReLU of the score as
  its gate, a form that `dmt` lacks. With `non_competing_scores=False` both have softmax over the
  experts of a head. `dmt` multiplies gates by their number, which the reference has in its values,
  and scores by a learned factor, which the reference has in its queries. Where several heads find
  an expert `dmt` takes the mean of its gates, the reference the sum: such tokens are left out.
- `transcoder` and `SparseCoder(transcode=True, skip_connection=True)`. Of the k largest latents
  those below zero have a gradient in the reference and none in `dmt`; with few of many latents read
  there are none. A forward pass of the reference computes its loss too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.tables import Row, medians, table
from torch import Tensor, nn
from torch.func import functional_call

from dmt.memory import PeerMemory, ProductKeyMemory, TranscoderMemory

NUM_TOKENS, WIDTH, NUM_SLOTS = 256, 64, 1024
HEADS, K_PER_HEAD, SUB_KEY_WIDTH = 4, 8, 16
REPEATS = 3

Tensors = dict[str, Tensor]


@dataclass
class Pair:
    """A memory and the reference, whose parameters are functions of shared weights.

    Attributes:
        memory: our layer.
        reference: the layer of the other package.
        shared: weights by name.
        map_to_memory: parameters of `memory` from the shared weights.
        map_to_reference: parameters of `reference` from the shared weights.
        hidden: inputs `(tokens, width)`.
        call_reference: calls the reference on `(tokens, width)`, and returns the same shape.
    """

    memory: nn.Module
    reference: nn.Module
    shared: Tensors
    map_to_memory: Callable[[Tensors], Tensors]
    map_to_reference: Callable[[Tensors], Tensors]
    hidden: Tensor
    call_reference: Callable[[Callable[..., Any], Tensor], Tensor]


@dataclass(frozen=True)
class Package:
    """A package with a reference implementation.

    Attributes:
        requirement: what pip installs.
        module: module that has the layer.
        layer: name of its class.
        make_pair: creates both layers from that module.
    """

    requirement: str
    module: str
    layer: str
    make_pair: Callable[[Any], Pair]

    @property
    def name(self) -> str:
        """Name of the distribution."""
        return self.requirement.partition("==")[0]


def draw(*shape: int, std: float = 1.0) -> Tensor:
    """Return normal random numbers in float64."""
    return torch.randn(*shape, dtype=torch.double) * std


def call_with_batch(layer: Callable[..., Any], hidden: Tensor) -> Tensor:
    """Call a layer that takes `(batch, tokens, width)`."""
    return layer(hidden.unsqueeze(0)).squeeze(0)


def order_queries(weight: Tensor) -> Tensor:
    """Reorder the rows of a query map from (head, half) to (half, head)."""
    return weight.view(HEADS, 2, SUB_KEY_WIDTH, WIDTH).transpose(0, 1).reshape(-1, WIDTH)


def order_sub_keys(sub_keys: Tensor) -> Tensor:
    """Reorder `(heads, 2, n, width)` to `(heads, n, 2, width)`."""
    return sub_keys.transpose(1, 2)


def make_product_key_pair(package: Any) -> Pair:
    """Return product-key memories."""
    sub_keys_per_table = math.isqrt(NUM_SLOTS)
    memory = ProductKeyMemory(
        WIDTH,
        NUM_SLOTS,
        HEADS * K_PER_HEAD,
        heads=HEADS,
        key_width=2 * SUB_KEY_WIDTH,
        silu_gate=False,
    )
    reference = package.PKM(
        WIDTH, heads=HEADS, num_keys=sub_keys_per_table, topk=K_PER_HEAD, dim_head=SUB_KEY_WIDTH
    )
    reference.norm.eps = 0.0

    def center(weight: Tensor) -> Tensor:
        halves = weight.view(2 * HEADS, SUB_KEY_WIDTH, WIDTH)
        return (halves - halves.mean(1, keepdim=True)).view_as(weight)

    def map_to_memory(shared: Tensors) -> Tensors:
        return {
            "query.weight": center(shared["queries"]),
            "query.sub_keys": shared["sub_keys"],
            "query.scale": shared["scale"].expand(HEADS),
            "values": shared["values"],
        }

    def map_to_reference(shared: Tensors) -> Tensors:
        scale = shared["scale"] / math.sqrt(SUB_KEY_WIDTH)
        return {
            "to_queries.weight": order_queries(center(shared["queries"])),
            "keys": order_sub_keys(F.normalize(shared["sub_keys"], dim=-1)),
            "norm.weight": scale.expand(SUB_KEY_WIDTH),
            "values.weight": shared["values"],
        }

    shared = {
        "queries": draw(2 * HEADS * SUB_KEY_WIDTH, WIDTH, std=WIDTH**-0.5),
        "sub_keys": draw(HEADS, 2, sub_keys_per_table, SUB_KEY_WIDTH),
        "scale": torch.tensor([8.0], dtype=torch.double),
        "values": draw(NUM_SLOTS, WIDTH),
    }
    hidden = draw(NUM_TOKENS, WIDTH)
    return Pair(memory, reference, shared, map_to_memory, map_to_reference, hidden, call_with_batch)


def make_peer_pair(package: Any) -> Pair:
    """Return layers whose experts are neurons."""
    memory = PeerMemory(
        WIDTH,
        NUM_SLOTS,
        HEADS * K_PER_HEAD,
        heads=HEADS,
        key_width=2 * SUB_KEY_WIDTH,
        gated=False,
        activation_function="gelu",
    )
    reference = package.PEER(
        WIDTH,
        heads=HEADS,
        num_experts=NUM_SLOTS,
        num_experts_per_head=K_PER_HEAD,
        dim_key=SUB_KEY_WIDTH,
        non_competing_scores=False,
    )

    def map_to_memory(shared: Tensors) -> Tensors:
        return {
            "router.weight": shared["queries"],
            "router.sub_keys": shared["sub_keys"],
            "gate_scale": shared["gate_scale"],
            "keys": shared["keys"],
            "values": shared["values"],
        }

    def map_to_reference(shared: Tensors) -> Tensors:
        factors = shared["gate_scale"].repeat_interleave(2 * SUB_KEY_WIDTH).unsqueeze(-1)
        return {
            "to_queries.0.weight": order_queries(shared["queries"] * factors),
            "keys": order_sub_keys(shared["sub_keys"]),
            "weight_down_embed.weight": shared["keys"],
            "weight_up_embed.weight": shared["values"] * K_PER_HEAD,
        }

    shared = {
        "queries": draw(2 * HEADS * SUB_KEY_WIDTH, WIDTH, std=WIDTH**-0.5),
        "sub_keys": draw(HEADS, 2, math.isqrt(NUM_SLOTS), SUB_KEY_WIDTH),
        "gate_scale": torch.linspace(0.5, 1.5, HEADS, dtype=torch.double),
        "keys": draw(NUM_SLOTS, WIDTH, std=WIDTH**-0.5),
        "values": draw(NUM_SLOTS, WIDTH),
    }
    load(memory, map_to_memory(shared))
    candidates = draw(4 * NUM_TOKENS, WIDTH)
    ids = memory.double().find_slots(candidates)[0].sort(-1).values
    hidden = candidates[(ids.diff(dim=-1) > 0).all(-1)][:NUM_TOKENS]
    return Pair(memory, reference, shared, map_to_memory, map_to_reference, hidden, call_with_batch)


def make_transcoder_pair(package: Any) -> Pair:
    """Return skip transcoders."""
    k = HEADS * K_PER_HEAD
    memory = TranscoderMemory(WIDTH, NUM_SLOTS, k, skip_connection=True)
    config = package.SparseCoderConfig(
        num_latents=NUM_SLOTS, k=k, transcode=True, skip_connection=True
    )
    reference = package.SparseCoder(WIDTH, config, dtype=torch.double)
    names = {  # of the memory, and of the reference
        "encoder": ("keys", "encoder.weight"),
        "encoder_bias": ("key_bias", "encoder.bias"),
        "decoder": ("values", "W_dec"),
        "decoder_bias": ("output_bias", "b_dec"),
        "skip": ("skip_connection", "W_skip"),
    }
    shared = {
        "encoder": draw(NUM_SLOTS, WIDTH, std=WIDTH**-0.5),
        "encoder_bias": draw(NUM_SLOTS),
        "decoder": draw(NUM_SLOTS, WIDTH),
        "decoder_bias": draw(WIDTH),
        "skip": draw(WIDTH, WIDTH, std=WIDTH**-0.5),
    }
    return Pair(
        memory,
        reference,
        shared,
        lambda shared: {own: shared[name] for name, (own, _) in names.items()},
        lambda shared: {other: shared[name] for name, (_, other) in names.items()},
        draw(NUM_TOKENS, WIDTH),
        lambda layer, hidden: layer(hidden).sae_out,
    )


PACKAGES = {
    "product_key": Package(
        "product-key-memory==0.3.0", "product_key_memory", "PKM", make_product_key_pair
    ),
    "peer": Package("peer-pytorch==0.2.2", "PEER_pytorch", "PEER", make_peer_pair),
    "transcoder": Package("eai-sparsify==1.3.3", "sparsify", "SparseCoder", make_transcoder_pair),
}


def import_package(package: Package) -> Any:
    """Return the module of a reference implementation.

    Raises:
        ImportError: it is not installed, or something that it needs is not.
    """
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels do not run on a CPU
    with contextlib.redirect_stdout(io.StringIO()):  # sparsify prints which decoder it uses
        module = importlib.import_module(package.module)
    if not hasattr(module, package.layer):  # another package has a module of that name
        raise ImportError(f"{package.module} has no {package.layer}")
    return module


@torch.no_grad()
def load(layer: nn.Module, parameters: Tensors) -> None:
    """Copy values into the parameters of a layer, by name."""
    for name, value in parameters.items():
        layer.get_parameter(name).copy_(value)


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Return the largest difference, divided by the largest value of the reference."""
    return float((output - reference).abs().max() / reference.abs().max())


def compare_values(pair: Pair) -> dict[str, float]:
    """Return how much outputs and gradients differ, by name."""
    memory, reference = pair.memory.double(), pair.reference.double()
    projection = torch.randn_like(pair.hidden)

    def run(
        layer: nn.Module, parameters: Callable[[Tensors], Tensors], call: Callable[..., Tensor]
    ) -> Tensors:
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in {"input": pair.hidden, **pair.shared}.items()
        }
        mapped = parameters(leaves)
        output = call(lambda hidden: functional_call(layer, mapped, (hidden,)), leaves["input"])
        gradients = torch.autograd.grad((output * projection).sum(), list(leaves.values()))
        named = {
            f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)
        }
        return {"output": output.detach(), **named}

    own = run(memory, pair.map_to_memory, lambda layer, hidden: layer(hidden))
    other = run(reference, pair.map_to_reference, pair.call_reference)
    load(memory, pair.map_to_memory(pair.shared))
    with torch.no_grad():  # memories may then compute in another way
        output = memory(pair.hidden)
    return {
        "output": relative_difference(own["output"], other["output"]),
        "output without gradients": relative_difference(output, other["output"]),
        **{name: relative_difference(own[name], other[name]) for name in other if name != "output"},
    }


def compare_times(pair: Pair) -> dict[str, float]:
    """Return milliseconds of a forward pass of both layers, and their ratio."""
    load(pair.memory, pair.map_to_memory(pair.shared))
    load(pair.reference, pair.map_to_reference(pair.shared))
    memory, reference = pair.memory.float().eval(), pair.reference.float().eval()
    hidden = pair.hidden.float()
    with torch.no_grad():
        seconds = medians(
            {
                "memory": lambda: memory(hidden),
                "reference": lambda: pair.call_reference(reference, hidden),
            },
            REPEATS,
        )
    return {
        "ms, memory": 1e3 * seconds["memory"],
        "ms, reference": 1e3 * seconds["reference"],
        "memory / reference": seconds["memory"] / seconds["reference"],
    }


def main() -> int:
    """Run the command line; return the exit code, 2 where no package is installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PACKAGES, help="one kind of memory")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    differences: list[Row] = []
    times: list[Row] = []
    for kind in [args.only] if args.only else PACKAGES:
        package = PACKAGES[kind]
        try:
            module = import_package(package)
        except ImportError as error:
            print(
                f"{package.name} is not installed ({error}): pip install {package.requirement}",
                file=sys.stderr,
            )
            continue
        torch.manual_seed(0)
        pair = package.make_pair(module)
        names = {"kind": kind, "reference": f"{package.name} {version(package.name)}"}
        for name, difference in compare_values(pair).items():
            differences.append({**names, "of": name, "largest difference": f"{difference:.1e}"})
        times.append({**names, **compare_times(pair)})
    if not times:
        return 2
    print(table(differences), table(times), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
