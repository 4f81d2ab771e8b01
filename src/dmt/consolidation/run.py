"""One consolidation from start to end: read, write or train, save a student, measure it as it is loaded, report."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.config import Config
from dmt.consolidation import report
from dmt.consolidation.asking import check_room, read_questions, share_kept
from dmt.consolidation.destinations import check_destination, finish, prepare, student_of
from dmt.consolidation.hearing import Hearing, after
from dmt.consolidation.reading import read_context
from dmt.consolidation.report import trains
from dmt.consolidation.rows import into_memory
from dmt.consolidation.work import Work, train
from dmt.data.blocks import TextData, first_windows
from dmt.data.encoding import start_of
from dmt.disk import whole_folder
from dmt.distill.fitting import compute_device, keep_freed_memory
from dmt.distill.folder import new_run, newest_checkpoint, unless_refused, write_record
from dmt.distill.timing import measured
from dmt.evaluate import Tally
from dmt.facts.opening import load_student
from dmt.models.books import put_aside
from dmt.models.loading import SAFELY
from dmt.models.overlay import overlay_of
from dmt.models.teacher import load_teacher
from dmt.pages.curves import read_curves


def consolidate(config: Config, run: Path | None) -> Path:
    """Read the context, put it where the config says, save and measure; the run's folder."""
    began = time.perf_counter()
    base, tokenizer = opened(config.teacher)
    check_destination(config.context, base)
    positions, more = base.config.max_position_embeddings, config.context.tokens if config.context.into == "tokens" else 0
    context = read_context(config.context, tokenizer, positions, more)
    questions = read_questions(config.context.questions) if config.context.questions else []
    longest = max(len(window.ids) for window in context.windows)
    check_room(questions, config.context.questions, tokenizer, positions - longest - more)
    steps = config.stages.end_to_end_steps if trains(config) else 0
    block = min(config.data.block, positions - len(start_of(tokenizer)) - more)
    # Books are read where the processor is; weights and tokens are trained wherever there is something to compute on.
    accelerator = "cpu" if config.context.into == "memory" else config.trainer.accelerator
    config = replace(config, data=replace(config.data, block=block), trainer=replace(config.trainer, accelerator=accelerator))
    base.to(compute_device(config))  # type: ignore[arg-type]
    data = TextData(config, tokenizer, steps)
    data.setup()
    keep_freed_memory()
    before = start_of(tokenizer)
    student = student_of(base)
    if steps:
        config = measured(config, student, data.calibration_windows(block * config.data.micro_batch))
    elif config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    work = Work(config, base, tokenizer, before, context, questions, [Hearing(base, window.ids) for window in context.windows])
    fresh = run is None or newest_checkpoint(run) is None
    run = run or new_run(config)
    facts = overlay_of(base)
    report.plan(config, run, context, questions, steps, 0 if facts is None else len(facts))
    write_record(run, config, {}, begins=True)
    prepared = time.perf_counter()
    with unless_refused(run, fresh):
        found = (into_memory if config.context.into == "memory" else _into_model)(work, student, data, run, fresh)
    spent = {"prepare": prepared - began, "consolidate": time.perf_counter() - prepared}
    results = measure(work, run, data) | {"written": found}
    results["seconds"] = spent | {"measure": time.perf_counter() - began - sum(spent.values())}
    results["curves"] = read_curves(run)
    write_record(run, config, results)
    report.finish(run, config, context, questions, results)
    return run


def opened(source: str) -> tuple[PreTrainedModel, Any]:
    """A teacher, or a saved student with its facts; in eval mode, without gradients."""
    folder = Path(source).expanduser()
    for place in (folder / "student", folder):
        if (place / "config.json").is_file() and '"dmt_' in (place / "config.json").read_text(encoding="utf-8", errors="replace"):
            return load_student(place, f"teacher={source}")
    return load_teacher(source)


def _into_model(work: Work, student: PreTrainedModel, data: TextData, run: Path, fresh: bool) -> dict[str, Any]:
    """Train weights or memory tokens, save the student; what was trained."""
    config, tokenizer = work.config, work.tokenizer
    student, chosen = prepare(config, student, tokenizer, work.context.text)
    after_all = start_of(tokenizer)
    train(work, student, chosen, after_all, data, run, fresh)
    weights = sum(parameter.numel() for parameter in chosen.values())
    student = finish(student.cpu())
    with whole_folder(run / "student", put_aside) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"weights": weights, "bytes": 4 * weights}


@torch.no_grad()
def measure(work: Work, run: Path, data: TextData) -> dict[str, Any]:
    """What the student answers that was saved, loaded anew; what unrelated text has become for it; what it costs."""
    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32, **SAFELY).eval().to(work.device)
    tokenizer = AutoTokenizer.from_pretrained(run / "student", trust_remote_code=False)
    before = start_of(tokenizer)
    results: dict[str, Any] = {"unrelated": {}}
    for corpus in data.corpora:
        tally = Tally()
        for windows in first_windows(corpus.test, work.config.data.test_tokens).split(work.config.data.micro_batch):
            windows = windows.to(work.device)
            tally.add(after(student, before, windows).logits, after(work.base, work.before, windows).logits, windows)
        results["unrelated"][corpus.name] = {"kl": tally.kl, "ratio": tally.ratio, "tokens": tally.tokens}
    if work.questions:
        said = {"with": work.known(), "without": work.asked(work.base, work.before), "consolidated": work.asked(student, before)}
        results["answers"] = {name: {"nats": each.nats, "right": each.right} for name, each in said.items()}
        kinds = {question.kind: None for question in work.questions}
        for kind in kinds:
            chosen = [i for i, question in enumerate(work.questions) if question.kind == kind]
            some = {name: each.of(chosen) for name, each in said.items()}
            share = share_kept(some["with"], some["without"], some["consolidated"])
            results.setdefault("kinds", {})[kind] = {
                "questions": len(chosen),
                "share": None if math.isnan(share) else share,
                **{f"log_probability_{name}": each.mean for name, each in some.items()},
                **{f"recall_{name}": each.recall for name, each in some.items()},
            }
        results["cost"] = report.cost(work, student, before)
    return results
