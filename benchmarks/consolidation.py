"""Consolidate a context by every objective into every target, beside next-token training on it.

    python -m benchmarks.consolidation [--model reader] [--context people] [--steps 150]
                                       [--only TEXT] [--quick]

Each consolidation is a run of its own in a temporary folder, by configs/consolidation/CONTEXT.yaml
with another objective and target. `benefit` of a type of question is the share of the context's
effect on the log-probability that is retained, above 1 where the student is more confident than the
model with the context; `-` where the context itself does not help. `recall` is the share of answers
that greedy decoding generates: without context, with it, consolidated. KL is that of unrelated test
text, the largest of the corpora. `causal_lm` into weights is plain next-token training on the
context, without a teacher: the baseline. Bytes are of rows, weights or embeddings; `cache` is what
the context takes in the KV cache. With `--model smollm2` use `--context facts` or `page`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import Row, table

from dmt.cli.main import distill_main

CONDITIONS = ("without_context", "with_context", "consolidated")
OBJECTIVES = ("causal_lm", "logits", "hidden_last", "hidden_all", "generated")
# Models, and the default context of each.
TEACHERS = {"reader": "people", "embedded": "people", "smollm2": "facts"}


@dataclass(frozen=True)
class Target:
    """A target of consolidation, its settings, and the objectives that train it."""

    name: str
    settings: tuple[str, ...]
    objectives: tuple[str, ...] = OBJECTIVES


TARGETS = (
    Target(
        "memory, difference",
        ("context.target=memory", "context.row_method=activation_delta"),
        ("logits", "generated"),
    ),
    Target(
        "memory, gradient",
        ("context.target=memory", "context.row_method=gradient"),
        ("logits", "generated"),
    ),
    Target(
        "memory, trained",
        ("context.target=memory", "context.row_method=trained", "stages.end_to_end_lr=0.03"),
        OBJECTIVES[1:],
    ),
    Target(
        "weights, lora",
        ("context.target=weights", "context.trainable=lora", "stages.end_to_end_lr=2e-3"),
    ),
    Target(
        "weights, all",
        ("context.target=weights", "context.trainable=all", "stages.end_to_end_lr=3e-4"),
    ),
    Target("prompt", ("context.target=prompt", "stages.end_to_end_lr=3e-2")),
)


def measure(
    target: Target, objective: str, context: str, model: str, steps: int, more: list[str]
) -> Row:
    """Run one consolidation; return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        args = [
            f"configs/consolidation/{context}.yaml",
            f"teacher={model}",
            f"context.objective={objective}",
            *target.settings,
        ]
        args += [
            f"trainer.log_dir={folder}",
            f"stages.end_to_end_steps={steps}",
            "trainer.progress_bar=false",
            *more,
        ]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = distill_main(args)
        if code:
            raise SystemExit(f"{' '.join(args)}: {output.getvalue().splitlines()[-1]}")
        record = json.loads((Path(folder) / "version_0" / "run.json").read_text(encoding="utf-8"))
    row: Row = {"table": f"{model}, {context}", "target": target.name, "objective": objective}
    for question_type, scores in record["question_types"].items():
        benefit = scores["benefit_retained"]
        recalls = (f"{scores[f'recall_{condition}']:.2f}" for condition in CONDITIONS)
        row |= {
            f"{question_type}: benefit": "-" if benefit is None else f"{benefit:.2f}",
            f"{question_type}: recall": " ".join(recalls),
        }
    row["KL"] = f"{max(scores['kl'] for scores in record['unrelated'].values()):.1e}"
    cost = record["cost"]
    row |= {
        "bytes": record["rows_written"]["bytes"],
        "cache": cost["kv_cache_bytes"],
        "tokens saved": cost["prompt_tokens_saved"],
    }
    row |= {
        f"ms, {method}": cost[f"seconds_{method}"] * 1e3
        for method in ("context_in_prompt", "kv_cache", "consolidated")
    }
    return row | {"seconds": record["seconds"]["consolidate"]}


def figures(
    quick: bool = False, model: str = "reader", context: str = "", steps: int = 150, only: str = ""
) -> list[Row]:
    """Measure every target with every objective that trains it."""
    rows = []
    context = context or ("person" if quick else TEACHERS[model])
    more = ["trainer.validate_every=0", "trainer.num_threads=1", "trainer.precision=32-true"]
    if quick:
        more += [
            "data.test_tokens=512",
            "data.validation_tokens=256",
            "data.corpora=[biographies]",
            "context.num_samples=8",
        ]
    elif model != "smollm2":
        more += ["context.num_samples=32", "context.resample_every=50"]
    for target in TARGETS:
        for objective in target.objectives[-1:] if quick else target.objectives:
            if only in f"{target.name} {objective}":
                num_steps = 2 if quick else steps
                rows.append(measure(target, objective, context, model, num_steps, more))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reader", choices=TEACHERS)
    parser.add_argument("--context", default="", help="a name in configs/consolidation")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--only", default="", help="rows that contain this, such as 'memory' or 'lora generated'"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(table(figures(args.quick, args.model, args.context, args.steps, args.only)))


if __name__ == "__main__":
    main()
