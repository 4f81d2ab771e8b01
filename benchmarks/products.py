"""Speed of matrix products by torch's default library and oneDNN: `python -m benchmarks.products`.

`dmt.ops` selects the library by these measurements. The shapes are those of blocks and heads of
GPT-2 and the embedded model. Prints medians in microseconds of the forward product and of the two
products of a backward pass; `taken` is the library that this machine uses.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from benchmarks.tables import Row, medians, table

from dmt import ops

# Tokens, inputs, outputs.
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


def figures(quick: bool = False) -> list[Row]:
    """Measure each shape."""
    rows = []
    for tokens, inputs, outputs in SHAPES[-5:] if quick else SHAPES:
        # Alternate several small matrices: the next layer of a model is not in the processor cache.
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
            microseconds = {
                name: 1e6 * seconds / copies
                for name, seconds in medians(calls, 3 if quick else 7).items()
            }
        ratios = {
            f"times as fast{product}": microseconds[f"torch{product}"]
            / microseconds[f"oneDNN{product}"]
            for product in ("", ", back", ", weights")
        }
        large = tokens * inputs * outputs >= ops.ONEDNN_MIN_OPERATIONS
        name = f"{tokens} x {inputs} x {outputs}"
        rows.append(
            {
                "shape": name,
                "taken": ops.gemm_library if large else "torch",
                **microseconds,
                **ratios,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{ops.read_cpu_field()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(figures(arguments.quick)))


if __name__ == "__main__":
    main()
