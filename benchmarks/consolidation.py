"""What of a context is left once it is gone: every objective into every destination, beside plain next-token training on it.

    python -m benchmarks.consolidation [--model reader] [--context people] [--steps 150] [--only WORDS] [--quick]

One consolidation after the other, each a run of its own in a temporary folder, by `configs/consolidation/CONTEXT.yaml` with another
objective and destination. `share` of a kind of question is (log-probability without - consolidated) / (without - with), above 1
where the student is surer than the model with the context; `-` where the context itself does not help. `said` is the share of
answers that greedy decoding would say: without, with, consolidated. KL is of unrelated test text, the largest of the corpora.
`causal_lm` into weights is plain next-token training on the context, without a teacher: the baseline. Bytes are of rows, weights
or embeddings; the last line is what keeping the context in the cache takes. With `--model smollm2` use `--context facts` or `page`.
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

from dmt.cli.main import distill_main as distill

OBJECTIVES = ("causal_lm", "logits", "hidden_last", "hidden_all", "generated")
TEACHERS = {"reader": "people", "embedded": "people", "smollm2": "facts"}
"""Models, and the context that each is told unless another is named."""


@dataclass(frozen=True)
class Way:
    """One destination, how it is reached, and the objectives that it can have."""

    name: str
    words: tuple[str, ...]
    objectives: tuple[str, ...] = OBJECTIVES


WAYS = (
    Way(
        "memory, difference",
        ("context.target=memory", "context.row_method=activation_delta"),
        ("logits", "generated"),
    ),
    Way(
        "memory, gradient",
        ("context.target=memory", "context.row_method=gradient"),
        ("logits", "generated"),
    ),
    Way(
        "memory, trained",
        ("context.target=memory", "context.row_method=trained", "stages.end_to_end_lr=0.03"),
        OBJECTIVES[1:],
    ),
    Way(
        "weights, lora",
        ("context.target=weights", "context.trainable=lora", "stages.end_to_end_lr=2e-3"),
    ),
    Way(
        "weights, all",
        ("context.target=weights", "context.trainable=all", "stages.end_to_end_lr=3e-4"),
    ),
    Way("tokens", ("context.target=prompt", "stages.end_to_end_lr=3e-2")),
)


def measured(
    way: Way, objective: str, context: str, model: str, steps: int, more: list[str]
) -> Row:
    """One consolidation; a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"configs/consolidation/{context}.yaml",
            f"teacher={model}",
            f"context.objective={objective}",
            *way.words,
        ]
        words += [
            f"trainer.log_dir={folder}",
            f"stages.end_to_end_steps={steps}",
            "trainer.progress_bar=false",
            *more,
        ]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            code = distill(words)
        if code:
            raise SystemExit(f"{' '.join(words)}: {quiet.getvalue().splitlines()[-1]}")
        found = json.loads((Path(folder) / "version_0" / "run.json").read_text(encoding="utf-8"))
    row: Row = {"table": f"{model}, {context}", "into": way.name, "objective": objective}
    for kind, each in found["question_types"].items():
        share = "-" if each["benefit_retained"] is None else f"{each['benefit_retained']:.2f}"
        said = " ".join(
            f"{each[f'recall_{who}']:.2f}" for who in ("without_context", "with_context", "consolidated")
        )
        row |= {f"{kind}: share": share, f"{kind}: said": said}
    row["KL"] = f"{max(each['kl'] for each in found['unrelated'].values()):.1e}"
    cost = found["cost"]
    row |= {
        "bytes": found["rows_written"]["bytes"],
        "cache": cost["kv_cache_bytes"],
        "tokens saved": cost["prompt_tokens_saved"],
    }
    row |= {
        f"ms, {way}": cost[f"seconds_{way}"] * 1e3
        for way in ("context_in_prompt", "kv_cache", "consolidated")
    }
    return row | {"seconds": found["seconds"]["consolidate"]}


def figures(
    quick: bool = False, model: str = "reader", context: str = "", steps: int = 150, only: str = ""
) -> list[Row]:
    """Every way with every objective that it can have."""
    rows = []
    context = context or ("person" if quick else TEACHERS[model])
    more = (
        [
            "data.test_tokens=512",
            "data.validation_tokens=256",
            "data.corpora=[biographies]",
            "context.num_samples=8",
        ]
        if quick
        else []
    )
    more += (
        ["context.num_samples=32", "context.resample_every=50"]
        if model != "smollm2" and not quick
        else []
    )
    more += ["trainer.validate_every=0", "trainer.num_threads=1", "trainer.precision=32-true"]
    for way in WAYS:
        for objective in way.objectives[-1:] if quick else way.objectives:
            if only in f"{way.name} {objective}":
                rows.append(measured(way, objective, context, model, 2 if quick else steps, more))
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
        "--only", default="", help="lines that contain this, such as 'memory' or 'lora generated'"
    )
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    print(table(figures(given.quick, given.model, given.context, given.steps, given.only)))


if __name__ == "__main__":
    main()
