"""Matrix products by torch's two libraries: `python -m benchmarks.products`. What `dmt.memory.products` chooses by.

The shapes of GPT-2's blocks, heads and of the embedded model: forward, and the two products of a backward pass; medians,
in microseconds. `taken` is which library this machine uses.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from benchmarks.tables import Row, medians, table

from dmt import ops

SHAPES = (
    (1, 768, 3072),
    (1, 768, 50_257),
    (4, 768, 3072),
    (64, 768, 3072),
    (512, 768, 3072),
    (2048, 768, 3072),
    (2048, 3072, 768),
    (256, 768, 50_257),
    (1, 128, 512),
    (16, 128, 512),
    (2048, 128, 512),
    (2048, 512, 128),
    (2048, 128, 2048),
)
"""Tokens, inputs, outputs."""


def figures(quick: bool = False) -> list[Row]:
    """A row for each shape."""
    found = []
    for tokens, inputs, outputs in SHAPES[-5:] if quick else SHAPES:
        # several matrices in turn where they are small: a model's next layer is not in the processor's cache
        copies = max(1, min(12, 300_000_000 // (4 * inputs * outputs * 8)))
        hidden, upstream = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        weights = [torch.randn(outputs, inputs) for _ in range(copies)]

        def forward(hidden=hidden, weights=weights):
            return [F.linear(hidden, weight) for weight in weights]

        calls = {
            "torch": forward,
            "oneDNN": lambda hidden=hidden, weights=weights: [
                ops.onednn_linear(hidden, weight) for weight in weights
            ],
            "torch, back": lambda upstream=upstream, weights=weights: [
                upstream @ weight for weight in weights
            ],
            "oneDNN, back": lambda u=upstream, weights=weights: [
                ops.onednn_linear(u, weight.t()) for weight in weights
            ],
            "torch, weights": lambda u=upstream, hidden=hidden, weights=weights: [
                u.t() @ hidden for _ in weights
            ],
            "oneDNN, weights": lambda u=upstream, h=hidden, weights=weights: [
                ops.onednn_linear(u.t(), h.t()) for _ in weights
            ],
        }
        with torch.no_grad():
            taken = {
                name: 1e6 * seconds / copies
                for name, seconds in medians(calls, 3 if quick else 7).items()
            }
        ratios = {
            f"times as fast{what}": taken[f"torch{what}"] / taken[f"oneDNN{what}"]
            for what in ("", ", back", ", weights")
        }
        large = tokens * inputs * outputs >= ops.ONEDNN_MIN_OPERATIONS
        name = f"{tokens} x {inputs} x {outputs}"
        found.append(
            {"shape": name, "taken": ops.gemm_library if large else "torch", **taken, **ratios}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{ops.read_cpu_field()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(figures(given.quick)))


if __name__ == "__main__":
    main()
