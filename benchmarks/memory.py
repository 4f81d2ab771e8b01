"""One memory against the dense block it replaces, by number of tokens: `python benchmarks/memory.py [--threads N]`.

The layer is that of the default config: ranks in the metric of sensitivity, a shared threshold set so that k slots
are read on average, a linear map. Prints milliseconds (median of 15 after 3 warm-ups, paths taken in turn) and ratios,
forward only. `gather` is the path a memory takes without gradients, `mask` the one it takes with them; `dense, gated` and
SmolLM2's shape go together.
"""

import argparse
import functools
import statistics
import time

import torch
from torch import nn

from dmt.memory import FeaturalMemory
from dmt.memory.budget import first_threshold

SHAPES = ((128, 512, 32, False), (768, 3072, 32, False), (768, 3072, 192, False), (576, 1536, 384, True))
TOKENS = (1, 4, 16, 64, 256, 2048)


def median_ms(calls: dict, repeats: int = 15, warmups: int = 3) -> dict:
    """Median time of each call in milliseconds, the calls taking turns so that noise hits all alike."""
    seconds: dict = {name: [] for name in calls}
    for repeat in range(warmups + repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat >= warmups:
                seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def path(memory: nn.Module, hidden: torch.Tensor, gather: bool):
    """A call of `memory` that is made to take one path; no graph is built in either."""

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(not gather):
            return memory(hidden)

    return call


class Gated(nn.Module):
    """A Llama's feed-forward block."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False) for shape in ((width, slots), (width, slots), (slots, width))
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, forward only")
    row = "{:>6} {:>6} {:>4} {:>6} {:>9} {:>9} {:>9} {:>11} {:>13}"
    print(row.format("width", "slots", "k", "tokens", "dense", "mask", "gather", "dense/mask", "dense/gather"))
    for width, slots, k, gated in SHAPES:
        plain = nn.Sequential(nn.Linear(width, slots), nn.GELU("tanh"), nn.Linear(slots, width))
        dense = (Gated(width, slots) if gated else plain).requires_grad_(False)
        how = {"metric": "sensitivity", "selection": "threshold", "linear": True, "gated": gated}
        memory = FeaturalMemory(width, slots, k, activation="silu" if gated else "gelu_pytorch_tanh", **how)
        memory.requires_grad_(False).eval()
        text = torch.randn(2048, width)
        memory.calibrate_means(text)
        first_threshold([memory], [text])
        for tokens in TOKENS:
            hidden = torch.randn(tokens, width)
            paths = {name: path(memory, hidden, name == "gather") for name in ("mask", "gather")}
            calls = {"dense": functools.partial(dense, hidden)} | paths
            ms = median_ms(calls)
            figures = [f"{value:.3f}" for value in ms.values()] + [f"{ms['dense'] / ms[name]:.2f}" for name in paths]
            print(row.format(width, slots, k, tokens, *figures))


if __name__ == "__main__":
    main()
