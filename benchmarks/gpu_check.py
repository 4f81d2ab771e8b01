"""Everything that only a GPU can show, in one command: `scripts/gpu_check.sh`.

    python -m benchmarks.gpu_check [OUTPUT.json] [--dry-run]

- parity: logits and generated tokens of students of each kind, on the GPU and on the CPU;
- precision: the losses of a run in float32 and in bfloat16;
- speed: a token and a training step, dense and student, and bytes at the peak;
- waits: what `torch.cuda.set_sync_debug_mode` counts in a token and in a step;
- the default run, `dmt distill`, with its perplexity ratio.

Without a GPU it ends with the exit code 2. `--dry-run` takes tests/second_device.py for one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.tables import Row, machine, table

TOLERANCE = 2e-3  # of logits, relative to the largest; a GPU may multiply in TF32
MAX_PPL_RATIO = 1.2  # of the default run
PROMPT_TOKENS, NEW_TOKENS, TIMED_STEPS = 16, 32, 5
# GPT-2 124M, and a shape of seconds for `--dry-run`.
SHAPES = {
    False: {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257},
    True: {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 300},
}
# Students by kind: settings of the memories.
KINDS: dict[str, dict[str, Any]] = {
    "top k": {"k": 8},
    "threshold": {"k": "auto", "mean_k": 8},
    "centered": {"k": 8, "selection": "centered"},
    "softmax": {"k": 8, "activation": "softmax", "selection": "score"},
    "int8 keys": {"k": 8, "search": "int8"},
    "int8 values": {"k": 8, "value_dtype": "int8"},
    "values in a file": {"k": 8, "offload": "values"},
    "slots in a file": {"k": 8, "offload": "slots", "search": "int8"},
}


def make_model(shape: dict[str, int], positions: int = 256) -> Any:
    """Return a GPT-2 with random weights and peaked logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**shape, n_positions=positions, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return model


def make_tokens(shape: dict[str, int], windows: int, length: int) -> torch.Tensor:
    """Return random token ids `(windows, length)` on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, shape["vocab_size"], (windows, length), generator=generator)


def generate(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return the most likely continuation of `ids` by `length` tokens, on the CPU."""
    device = model.get_output_embeddings().weight.device
    return model.generate(
        ids.to(device),
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    ).cpu()


def check_parity() -> list[Row]:
    """Compare students of each kind on the GPU with the same on the CPU, at a tiny shape."""
    from transformers import AutoModelForCausalLM

    import dmt

    shape = SHAPES[True]
    teacher, tokens = make_model(shape), make_tokens(shape, 2, PROMPT_TOKENS)
    rows = []
    for kind, settings in KINDS.items():
        student: Any = dmt.convert(teacher, dmt.FeaturalConfig(**settings), calibration=tokens)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            student.save_pretrained(folder)
            cpu_model, gpu_model = (
                AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
                for device in ("cpu", "cuda")
            )
            logits, gpu_logits = cpu_model(tokens).logits, gpu_model(tokens.to("cuda")).logits
            difference = float((gpu_logits.cpu() - logits).abs().max() / logits.abs().max())
            texts = [generate(model, tokens, NEW_TOKENS) for model in (cpu_model, gpu_model)]
        agreement = float((texts[0] == texts[1]).float().mean())
        passed = difference < TOLERANCE and agreement == 1
        rows.append(_row("parity", kind, passed, logits=difference, tokens_equal=agreement))
    return rows


def check_facts(folder: Path) -> list[Row]:
    """Write a fact into the embedded teacher on the GPU and ask for it."""
    import dmt

    with dmt.Memory.open("embedded", store=str(folder / "facts.db"), device="cuda") as facts:
        facts.write("Ada Winterbourne was born in the town of Ravenhill.")
        answer = facts.generate("Ada Winterbourne was born in the town of", 4)
    return [_row("facts", "write and ask", "Ravenhill" in answer, answer=answer)]


def distill(log_dir: Path, *arguments: str) -> Any:
    """Run `dmt distill` on the GPU; return its result."""
    from dmt.cli.main import distill_main
    from dmt.distillation.run import read_result

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = distill_main([f"trainer.log_dir={log_dir}", "trainer.accelerator=gpu", *arguments])
    if code:
        raise RuntimeError(output.getvalue().strip().rpartition("\n")[2])
    return read_result(max(log_dir.glob("version_*")))


def list_short_settings(dry_run: bool) -> list[str]:
    """Return settings of a run of a few steps."""
    size = ["data.seq_len=32", "data.batch_size=2", "data.corpora=[speeches]"] if dry_run else []
    return [
        "stages.layerwise_steps=2",
        "stages.end_to_end_steps=4",
        "stages.calibration_tokens=64",
        "data.validation_tokens=64",
        "data.test_tokens=64",
        "trainer.progress_bar=false",
        "trainer.log_every=1",
        *size,
    ]


def check_precision(folder: Path, dry_run: bool) -> list[Row]:
    """Compare the loss of a short run in bfloat16 with that in float32, for both memories."""
    rows = []
    kinds = {"featural": [], "associative": ["memory.write_start=0"]}
    for kind, settings in kinds.items():
        losses = {}
        for precision in ("32-true", "bf16-mixed"):
            result = distill(
                folder / f"{kind}-{precision}",
                f"memory.kind={kind}",
                *settings,
                f"trainer.precision={precision}",
                *list_short_settings(dry_run),
            )
            losses[precision] = result.metrics["train/loss"]
        passed = abs(losses["bf16-mixed"] / losses["32-true"] - 1) < 0.1
        rows.append(_row("precision", kind, passed, **losses))
    return rows


@contextlib.contextmanager
def count_waits(dry_run: bool) -> Any:
    """Count the times that the host waits inside the block; yields a list that holds the count."""
    counts: list[int] = []
    if dry_run:
        import second_device

        with second_device.WaitCounter() as counter:
            yield counts
        counts.append(counter.waits)
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield counts
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("synchroniz" in str(warning.message) for warning in caught))


def time_call(call: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds of the fastest of some calls, after one that warms up."""
    best = float("inf")
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def measure_speed(dry_run: bool) -> list[Row]:
    """Time a token and a training step of a dense model and of students; count their waits."""
    import dmt

    shape = SHAPES[dry_run]
    teacher = make_model(shape)
    length = 256 if not dry_run else 32
    tokens, prompt = make_tokens(shape, 8, length).to("cuda"), make_tokens(shape, 1, PROMPT_TOKENS)
    k = max(1, 4 * shape["n_embd"] // 16)
    students = {
        "dense": teacher,
        "student, top k": dmt.convert(teacher, dmt.FeaturalConfig(k=k)),
        "student, threshold": dmt.convert(
            teacher, dmt.FeaturalConfig(k="auto", mean_k=k), calibration=tokens[:2].cpu()
        ),
    }
    rows: list[Row] = []
    for name, model in students.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = model.to("cuda", dtype).eval()
            long, short = (
                time_call(lambda length=length, model=model: generate(model, prompt, length), 2)
                for length in (NEW_TOKENS, 1)
            )
            with count_waits(dry_run) as counts:
                generate(model, prompt, NEW_TOKENS)
            figures = {"ms": (long - short) / (NEW_TOKENS - 1), "waits": counts[0] / NEW_TOKENS}
            rows.append(_row("token", f"{name}, {str(dtype)[6:]}", True, **figures))
        model = model.to(torch.float32)
        rows.append(_measure_step(name, model, teacher, tokens, dry_run))
        model.requires_grad_(False).cpu()
    return rows


def _measure_step(name: str, model: Any, teacher: Any, tokens: torch.Tensor, dry_run: bool) -> Row:
    """Time a step on the KL to the teacher, all windows at once, under bfloat16 autocast."""
    from dmt.models.forward import forward_teacher, forward_with_activations
    from dmt.ops import kl

    teacher = teacher if teacher is model else teacher.to("cuda", torch.float32)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            target = forward_teacher(teacher, tokens).logits
            loss = kl(forward_with_activations(model, tokens).logits, target).mean()
        loss.backward()
        optimizer.step()

    milliseconds = time_call(step, TIMED_STEPS)
    with count_waits(dry_run) as counts:
        step()
    peak = torch.cuda.max_memory_allocated() / 1e6 if not dry_run else 0.0
    return _row("step", f"{name}, bf16-mixed", True, ms=milliseconds, waits=counts[0], peak_mb=peak)


def check_default_run(folder: Path, dry_run: bool) -> list[Row]:
    """Distill as `dmt distill` does without arguments."""
    start = time.perf_counter()
    arguments = list_short_settings(True) if dry_run else ["trainer.progress_bar=false"]
    result = distill(folder / "default", *arguments)
    seconds = time.perf_counter() - start
    ratios = {
        name.split("/")[1]: value
        for name, value in result.metrics.items()
        if name.startswith("test/") and name.endswith("/ppl_ratio")
    }
    passed = dry_run or all(ratio < MAX_PPL_RATIO for ratio in ratios.values())
    return [_row("default run", "dmt distill", passed, seconds=seconds, **ratios)]


def _row(check: str, what: str, passed: bool, **figures: Any) -> Row:
    return {"check": check, "what": what, "passed": passed, "figures": figures}


def run_checks(dry_run: bool) -> list[Row]:
    """Run all checks; one that raises has failed, and the others go on."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks: dict[str, Callable[[], list[Row]]] = {
            "parity": check_parity,
            "facts": lambda: check_facts(folder),
            "speed": lambda: measure_speed(dry_run),
            "precision": lambda: check_precision(folder, dry_run),
            "default run": lambda: check_default_run(folder, dry_run),
        }
        for check, run in checks.items():
            start = time.perf_counter()
            try:
                rows += run()
            except Exception as error:  # whatever fails on a GPU is what this looks for
                rows.append(_row(check, "raised", False, error=f"{type(error).__name__}: {error}"))
            print(f"{check}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def format_rows(rows: list[Row]) -> str:
    """Return the table that is printed: a line for each check."""
    return table(
        [
            {
                "check": row["check"],
                "what": row["what"],
                "result": "passed" if row["passed"] else "FAILED",
                "figures": ", ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in row["figures"].items()
                ),
            }
            for row in rows
        ]
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--dry-run", action="store_true", help="on CPU tensors that act as a GPU's")
    args = parser.parse_args()
    if args.dry_run:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import second_device

        second_device.install("cuda")
    elif not torch.cuda.is_available():
        print("error: torch sees no GPU here; run this where there is one", file=sys.stderr)
        return 2
    logging.getLogger("dmt").setLevel(logging.ERROR)
    rows = run_checks(args.dry_run)
    gpu = torch.cuda.get_device_name(0)
    document = {"gpu": gpu, "dry_run": args.dry_run, "machine": machine(), "rows": rows}
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(format_rows(rows))
    print(f"{gpu}: {sum(row['passed'] for row in rows)} of {len(rows)} passed; {args.output}")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
