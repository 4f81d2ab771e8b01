"""Speed of a memory against its dense block: `python -m benchmarks.memory [--threads N]`.

The memory is that of the default config: the `fisher` metric, a shared threshold that reads k slots
on average, and a skip connection. Prints milliseconds (median of 15 after 3 warm-up rounds,
alternating) and ratios, forward only, by number of tokens. A memory takes the path `gather` without
gradients and `mask` with them. The gated shape is that of SmolLM2.
"""

import argparse
import copy
import functools

import torch
from benchmarks.tables import Row, head, line, medians
from torch import nn

from dmt.memory import FeaturalMemory
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.ops import use_onednn_linear

SHAPES = (
    (128, 512, 32, False),
    (768, 3072, 32, False),
    (768, 3072, 192, False),
    (576, 1536, 384, True),
)
TOKENS = (1, 4, 16, 64, 256, 2048)


def make_call(memory: nn.Module, hidden: torch.Tensor, gather: bool):
    """Return a call of `memory` that takes the path `gather`, or else `mask`; builds no graph."""

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(not gather):
            return memory(hidden)

    return call


class Gated(nn.Module):
    """The feed-forward block of Llama."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False)
            for shape in ((width, slots), (width, slots), (slots, width))
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def figures(quick: bool = False) -> list[Row]:
    """Measure each shape and number of tokens."""
    results = []
    for width, slots, k, gated in SHAPES[:1] if quick else SHAPES:
        plain = nn.Sequential(nn.Linear(width, slots), nn.GELU("tanh"), nn.Linear(slots, width))
        dense = (Gated(width, slots) if gated else plain).requires_grad_(False)
        options = {
            "metric": "fisher",
            "k_mode": "threshold",
            "skip_connection": True,
            "gated": gated,
        }
        memory = FeaturalMemory(
            width, slots, k, activation_function="silu" if gated else "gelu_pytorch_tanh", **options
        )
        memory.requires_grad_(False).eval()
        text = torch.randn(2048, width)
        memory.calibrate_means(text)
        initialize_threshold([memory], [text])
        onednn_dense = use_onednn_linear(copy.deepcopy(dense))
        for tokens in TOKENS:
            hidden = torch.randn(tokens, width)
            paths = {
                name: make_call(memory, hidden, name == "gather") for name in ("mask", "gather")
            }
            calls = {
                "dense": functools.partial(dense, hidden),
                "dense, oneDNN": functools.partial(onednn_dense, hidden),
            } | paths
            milliseconds = {
                name: 1e3 * seconds for name, seconds in medians(calls, 3 if quick else 15).items()
            }
            ratios = {f"dense/{name}": milliseconds["dense"] / milliseconds[name] for name in paths}
            name = f"{width} x {slots}, k = {k}{', gated' if gated else ''}, {tokens} tokens"
            results.append({"memory": name, **milliseconds, **ratios})
            print(
                (f"{head(results[0])}\n" if len(results) == 1 else "") + line(results[-1]),
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, forward only")
    figures()


if __name__ == "__main__":
    main()
