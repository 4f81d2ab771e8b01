"""Ablations: the default recipe with 32 slots per token and one setting changed at a time.

    python benchmarks/ablation.py [--steps 700] [--seeds 0] [--only PREFIX] [--side-by-side 2]

Each row is a run of `distill.py` of `steps` x 2,048 tokens on one thread, measured on the first
16,384 tokens of each test text.
"""

import argparse

from runs import table

READS = "memory.mean_k=32"  # of variants that spend one budget on all layers and tokens
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "metric: plain": ("memory.metric=euclidean",),
    "budget: the same k for all": ("memory.k=32",),
    # These cannot share a budget. Compare them with the row above or with the one they differ from
    # in one setting.
    "k = 32: plain metric": ("memory.k=32", "memory.metric=euclidean"),
    "k = 32, plain metric: ranking by score": ("memory.k=32", "memory.selection=score"),
    "k = 32, ranking by score: softmax weights": (
        "memory.k=32",
        "memory.selection=score",
        "memory.activation=softmax",
    ),
    "k = 32, ranking by score: distance weights": (
        "memory.k=32",
        "memory.selection=score",
        "memory.activation=distance",
    ),
    "k = 32, plain metric: means only": (
        "memory.k=32",
        "memory.metric=euclidean",
        "memory.skip_connection=false",
    ),
    "k = 32, plain metric, means only: no calibration": (
        "memory.k=32",
        "memory.metric=euclidean",
        "memory.skip_connection=false",
        "stages.calibration_tokens=0",
    ),
    "init: random": ("memory.init=random",),
    "weighting: relu": ("memory.activation=relu",),
    "ranking: centered": ("memory.selection=centered",),
    "gradient: straight-through": ("memory.gradient=straight_through",),
    "compensation: means only": ("memory.skip_connection=false",),
    "layer-wise: none": ("stages.layerwise_steps=0",),
    "layer-wise: 300 steps": ("stages.layerwise_steps=300",),
    "layer-wise: raw MSE": ("stages.layerwise_loss=mse",),
    "k schedule: from 4 k": ("stages.k_warmup_factor=4",),
    "values: a third of the rate": ("optim.value_lr_scale=0.33",),
    "values: three times the rate": ("optim.value_lr_scale=3",),
    "loss: KL alone": ("loss.hidden_mse=0", "loss.block_fvu=0"),
    "loss: KL and hidden": ("loss.block_fvu=0",),
    "loss: KL and block": ("loss.hidden_mse=0",),
    "loss: and CE 0.3": ("loss.ce=0.3",),
    "loss: CE for KL": ("loss.kl=0", "loss.ce=1"),
    "loss: reverse KL": ("loss.kl=0", "loss.reverse_kl=1"),
    "loss: temperature 2": ("loss.temperature=2",),
    "trainable: memory": ("student.trainable=memory",),
    "rate: 2e-3": ("stages.end_to_end_lr=2e-3",),
    "rate: 5e-4": ("stages.end_to_end_lr=5e-4",),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="prefix of the names of variants")
    parser.add_argument(
        "--side-by-side", type=int, default=2, help="runs at a time, each on one thread"
    )
    options = parser.parse_args()
    chosen = {
        name: settings if "memory.k=32" in settings else (READS, *settings)
        for name, settings in VARIANTS.items()
        if name.startswith(options.only)
    }
    if not chosen:
        parser.error(
            f"--only: no variant begins with {options.only}; there are {'; '.join(VARIANTS)}"
        )
    table(
        chosen,
        options.steps,
        [int(seed) for seed in options.seeds.split(",")],
        1,
        options.side_by_side,
    )
