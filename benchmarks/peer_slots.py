"""Speed of product-key-memory and peer-pytorch; `many.py` starts it in an environment with both.

    peer_slots.py NAME SLOTS TOKENS WIDTH THREADS

Prints milliseconds of a forward pass and of one with its backward pass, medians of five.
"""

import statistics
import sys
import time

import torch


def median_ms(call, repeats=5):
    """Return the median milliseconds of `call` after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    name, (slots, tokens, width, threads) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side = round(slots**0.5)
    assert side * side == slots, "both libraries need a square number of slots"
    if name == "product-key-memory":
        from product_key_memory import PKM

        layer = PKM(dim=width, heads=4, num_keys=side, topk=32, dim_head=128)
    else:
        from PEER_pytorch import PEER

        layer = PEER(dim=width, heads=8, num_experts=slots, num_experts_per_head=16, dim_key=128)
    layer.eval()
    hidden = torch.randn(1, tokens, width)

    def forward():
        with torch.no_grad():
            layer(hidden)

    def forward_backward():
        layer.zero_grad()
        layer(hidden).square().sum().backward()

    print(median_ms(forward), median_ms(forward_backward, 2 if slots >= 1_000_000 else 5), sep="\t")


if __name__ == "__main__":
    main()
