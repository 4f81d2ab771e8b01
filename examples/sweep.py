"""Distill variants with several seeds and print a table with mean and spread.

Usage: python examples/sweep.py
"""

import dmt

runs = []
for mean_k in (8, 32):
    for seed in (0, 1):
        result = dmt.distill(
            "embedded",
            ["biographies"],
            mean_k=mean_k,
            seed=seed,
            run_name=f"example-k{mean_k}-seed{seed}",
            layerwise_steps=2,
            end_to_end_steps=4,
            test_tokens=2048,
            validation_tokens=1024,
        )
        runs.append(result.run_dir)

print(dmt.compare(runs).to_markdown())
