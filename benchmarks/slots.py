"""Fidelity by the number of slots and of slots read, with equally many training tokens.

python benchmarks/slots.py [--steps 700] [--side-by-side 2]
"""

import argparse

from runs import table

VARIANTS: dict[str, tuple[str, ...]] = {
    **{
        f"{slots} slots, {k} read": (f"memory.num_slots={slots}", f"memory.mean_k={k}")
        for slots in (256, 512, 1024, 2048)
        for k in (8, 32, 128)
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument(
        "--side-by-side", type=int, default=2, help="runs at a time, each on one thread"
    )
    options = parser.parse_args()
    table(VARIANTS, options.steps, [0], 1, options.side_by_side)
