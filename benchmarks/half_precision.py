"""What half precision costs: KL from the same weights in float32, for a model and its students.

    python benchmarks/half_precision.py [STUDENT ...] [--tokens 1024]

Rows are the embedded teacher, students just converted from it, and saved students. Slots whose
ranks are nearly equal change places when they are rounded, so a student reads other slots for some
tokens. Takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

import dmt
from dmt.config import FeaturalConfig
from dmt.data.corpora import load_corpus
from dmt.data.windows import tokenize_corpus
from dmt.models.loading import load_teacher
from dmt.ops import kl

WINDOW, CALIBRATION_WINDOWS = 256, 16
STUDENTS = {
    "featural, one budget": FeaturalConfig(),
    "featural, k=64": FeaturalConfig(k=64),
}


@torch.no_grad()
def measure(model: Any, windows: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the mean KL per token and the share of equal predictions in another dtype."""
    rounded = copy.deepcopy(model).to(dtype)
    divergence, equal = 0.0, 0.0
    for window in windows.split(1):
        expected, logits = model(window).logits, rounded(window).logits.float()
        divergence += float(kl(logits, expected).mean())
        equal += float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    return divergence / len(windows), equal / len(windows)


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("students", nargs="*", help="folders of saved students")
    parser.add_argument("--tokens", type=int, default=1_024)
    arguments = parser.parse_args()
    teacher, tokenizer = load_teacher("embedded")
    tokens = tokenize_corpus(load_corpus("speeches", 0), tokenizer, WINDOW)
    windows = tokens.test[: max(1, arguments.tokens // WINDOW)]
    calibration = tokens.train[:CALIBRATION_WINDOWS]
    print("| model | bfloat16: KL | same top-1 | float16: KL | same top-1 |")
    print("|---|---:|---:|---:|---:|")
    models: dict[str, Any] = {"plain GPT-2": lambda: teacher}
    for name, config in STUDENTS.items():
        models[name] = lambda config=config: dmt.convert(teacher, config, calibration=calibration)
    for folder in arguments.students:
        models[folder] = lambda folder=folder: dmt.load(folder)[0]
    for name, make in models.items():
        model = make().eval()
        cells = [
            f"{divergence:.1e} | {equal:.3f}"
            for divergence, equal in (
                measure(model, windows, dtype) for dtype in (torch.bfloat16, torch.float16)
            )
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
