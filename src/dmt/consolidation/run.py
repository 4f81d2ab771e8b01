"""One consolidation from start to end: read, write or train, save a student, measure it as it is loaded, report."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.config import Config
from dmt.consolidation import report
from dmt.consolidation.asking import Answers, Question, answers, likeliest, read_questions, share_kept
from dmt.consolidation.destinations import check_destination, finish, prepare, student_of
from dmt.consolidation.hearing import Hearing, after
from dmt.consolidation.module import Consolidator
from dmt.consolidation.reading import Context, read_context
from dmt.consolidation.telling import Lesson, Lessons, own, sampled, self_asked
from dmt.consolidation.writing import facts_in, learnt, near_enough, write_differences
from dmt.data.blocks import TextData, first_windows
from dmt.data.encoding import start_of
from dmt.distill.fitting import attending, fit, keep_freed_memory, measured
from dmt.distill.folder import new_run, write_record
from dmt.errors import UserError
from dmt.evaluate import Tally
from dmt.facts.book import Book
from dmt.facts.lines import Line
from dmt.facts.opening import load_student, open_book
from dmt.facts.sentences import Fact
from dmt.memory.facts import FactRows
from dmt.models.teacher import load_teacher


@dataclass
class Work:
    """What a consolidation goes on with, from step to step.

    Attributes:
        base, tokenizer: the model as it is, and its own.
        before: token ids that stand before every text of it.
        context, questions: what it is told, and asked.
        hearings: it, having read each window of the context.
    """

    config: Config
    base: PreTrainedModel
    tokenizer: Any
    before: list[int]
    context: Context
    questions: list[Question]
    hearings: list[Hearing]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.base.parameters()).device

    def asked(self, model: PreTrainedModel, before: list[int], tokenizer: Any = None) -> Answers:
        """What a model answers that has read `before` alone."""
        return answers(partial(after, model, before), tokenizer or self.tokenizer, self.questions, self.device)

    def known(self) -> Answers:
        """What the model with the context answers; of several windows the one that knows it best."""
        return likeliest([answers(hearing.signals, self.tokenizer, self.questions, self.device) for hearing in self.hearings])


def consolidate(config: Config, run: Path | None) -> Path:
    """Read the context, put it where the config says, save and measure; the run's folder."""
    began = time.perf_counter()
    base, tokenizer = opened(config.teacher)
    check_destination(config.context, base)
    positions, more = base.config.max_position_embeddings, config.context.tokens if config.context.into == "tokens" else 0
    context = read_context(config.context, tokenizer, positions, more)
    questions = read_questions(config.context.questions) if config.context.questions else []
    steps = config.stages.end_to_end_steps if trains(config) else 0
    block = min(config.data.block, positions - len(start_of(tokenizer)) - more)
    config = replace(config, data=replace(config.data, block=block))
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
    fresh = run is None
    run = run or new_run(config)
    report.plan(config, run, context, questions, steps)
    write_record(run, config, {}, begins=True)
    prepared = time.perf_counter()
    found = (_into_memory if config.context.into == "memory" else _into_model)(work, student, data, run, fresh)
    spent = {"prepare": prepared - began, "consolidate": time.perf_counter() - prepared}
    results = measure(work, run, data) | {"written": found}
    results["seconds"] = spent | {"measure": time.perf_counter() - began - sum(spent.values())}
    write_record(run, config, results)
    report.finish(run, config, context, questions, results)
    return run


def trains(config: Config) -> bool:
    """Whether there are gradient steps: not where rows are written in one pass."""
    return config.context.into != "memory" or config.context.write == "trained"


def opened(source: str) -> tuple[PreTrainedModel, Any]:
    """A teacher, or a saved student with its facts; in eval mode, without gradients."""
    folder = Path(source).expanduser()
    for place in (folder / "student", folder):
        if (place / "config.json").is_file() and '"dmt_' in (place / "config.json").read_text(encoding="utf-8", errors="replace"):
            return load_student(place)
    return load_teacher(source)


def _into_model(work: Work, student: PreTrainedModel, data: TextData, run: Path, fresh: bool) -> dict[str, Any]:
    """Train weights or memory tokens, save the student; what was trained."""
    config, tokenizer = work.config, work.tokenizer
    student, chosen = prepare(config, student, tokenizer, work.context.text)
    after_all = start_of(tokenizer)
    _fit(work, student, chosen, after_all, data, run, fresh)
    weights = sum(parameter.numel() for parameter in chosen.values())
    student = finish(student.cpu())
    student.save_pretrained(run / "student")
    tokenizer.save_pretrained(run / "student")
    return {"weights": weights, "bytes": 4 * weights}


def _fit(
    work: Work,
    student: PreTrainedModel,
    chosen: dict[str, nn.Parameter],
    before: list[int],
    data: TextData,
    run: Path,
    fresh: bool,
) -> None:
    config = work.config
    lessons = Lessons(
        work.base, work.tokenizer, work.context, config.context, config.data.micro_batch * 2, config.seed,
        blocks=config.context.objective == "hidden_all",
    )  # fmt: skip

    def lesson(step: int) -> Lesson:
        with torch.autocast(work.device.type, enabled=False):  # what was read is kept in full precision
            return lessons.lesson(step)

    def ask() -> dict[str, float]:
        mine = work.asked(student, before)
        return {"consolidated/share": share_kept(known, without, mine), "consolidated/recall": mine.recall}

    if work.questions:
        known, without = work.known(), work.asked(work.base, work.before)
    module = Consolidator(config, student, work.base, chosen, lesson, (before, work.before), ask if work.questions else None)
    if fresh:
        module.measure_scales()
    with attending(config, student):
        fit(config, module, data, run, [])


def _into_memory(work: Work, student: PreTrainedModel, data: TextData, run: Path, fresh: bool) -> dict[str, Any]:
    """Write rows into the book beside the student; trained, where that is wanted, before they are written for good."""
    config, folder = work.config, run / "student"
    if fresh or not (folder / "config.json").is_file():
        (work.base if work.base.config.model_type.startswith("dmt_") else student).save_pretrained(folder)
        work.tokenizer.save_pretrained(folder)
    tag, source = _tag(config), config.context.file or "context.text"
    with closing(open_book(folder)) as book:
        there = set(book.known)
        spans = {window: _spans(work, window) for window in range(len(work.hearings))}
        firsts = facts_in([span for each in spans.values() for span in each], tag, source)
        if not firsts:
            raise UserError("the context tells this model nothing that it would not have said anyway, so there is nothing to write")
        last = book.model.config.num_hidden_layers - 1
        _begin(book, firsts, None if config.context.write == "gradient" else last, data)
        for window, each in spans.items():
            if config.context.write == "gradient":
                book.write(facts_in(each, tag, source))
            else:
                write_differences(book, work.hearings[window], each, tag, source)
        mine = [fact for number, fact in book.known.items() if number not in there]
        if config.context.write == "trained":
            mine = _train_rows(work, book, data, run, fresh, {fact.id for fact in mine} or there)
    rows = sum(len(fact.rows) for fact in mine)
    return {"facts": len(mine), "rows": rows, "bytes": rows * 2 * 4 * student.config.hidden_size, "tag": tag}


def _spans(work: Work, which: int) -> list[Any]:
    """What one window of the context told about places in texts, its own sentences last: they are right where texts contradict."""
    window, settings = work.context.windows[which], work.config.context
    texts = own(window, work.tokenizer)
    if settings.objective == "generated":
        seed = work.config.seed * 101 + which
        asked = self_asked(work.base, window, work.tokenizer, settings, seed)
        texts = sampled(work.hearings[which], window, work.tokenizer, settings, seed) + asked + texts
    names = [name for each in work.context.windows for name in each.names]
    spans = learnt(work.base, work.hearings[which], work.tokenizer, texts, names)
    return [span for span in spans if near_enough(work.tokenizer, span)]


def _begin(book: Book, firsts: list[Fact], answers_in: int | None, data: TextData) -> None:
    """Measure once, where nobody has, in which layer facts are heard; answered in `answers_in`, or where a gradient does most."""
    assert book.store is not None, "opened for writing"
    if book.ledger.exists:
        return
    book.begin(firsts, answers=answers_in)


def _train_rows(work: Work, book: Book, data: TextData, run: Path, fresh: bool, ids: set[int]) -> list[Any]:
    """Train what rows of these facts add; in the end they are written anew."""
    memory = book.overlay.memory
    values = nn.Parameter(memory.rows.values.clone())
    own_rows = {row for number in ids for row in book.known[number].rows}
    mine = torch.tensor([int(row) in own_rows for row in memory.rows.ids])
    values.register_hook(lambda slope: slope * mine.unsqueeze(1))
    memory.rows = FactRows(**{**vars(memory.rows), "values": values})
    _fit(work, book.model, {"values": values}, work.before, data, run, fresh)
    at = {int(row): place for place, row in enumerate(memory.rows.ids)}
    lines = []
    for number in sorted(ids):
        told, parts = book.known[number], book.parts(number)
        trained = torch.stack([values[at[part.row]].detach() for part in parts])
        keys = torch.stack([part.key for part in parts])
        lines.append(Line(replace(told, id=0, rows=()), keys, trained, book.calibration.compared(keys[:1])[0], 0.0, 1.0))
    book.forget(sorted(ids), "replaced")
    return [outcome.fact for outcome in book.take(lines)]


def _tag(config: Config) -> str:
    return Path(config.context.file).stem if config.context.file else "context"


@torch.no_grad()
def measure(work: Work, run: Path, data: TextData) -> dict[str, Any]:
    """What the student answers that was saved, loaded anew; what unrelated text has become for it; what it costs."""
    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32).eval().to(work.device)
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
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
            results.setdefault("kinds", {})[kind] = {
                "questions": len(chosen),
                "share": share_kept(some["with"], some["without"], some["consolidated"]),
                **{f"log_probability_{name}": each.mean for name, each in some.items()},
                **{f"recall_{name}": each.recall for name, each in some.items()},
            }
        results["cost"] = report.cost(work, student, before)
    return results
