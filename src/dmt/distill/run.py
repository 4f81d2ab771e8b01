"""One run from settings to results: prepare, train, measure, save, tell."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dmt import disk
from dmt.config import Config, MemoryConfig
from dmt.data.blocks import TextData, first_windows
from dmt.data.corpora import load_corpus
from dmt.disk import whole_folder
from dmt.distill import report
from dmt.distill.budgets import TOKENS, kl_by_budget
from dmt.distill.cached import FILE, TeacherCache, teacher_cache
from dmt.distill.callbacks import Charts, Samples, SlotUsage, StoredRows
from dmt.distill.continuing import continued
from dmt.distill.fitting import (
    compute_device,
    computing,
    fit,
    keep_freed_memory,
)
from dmt.distill.folder import check_writable, new_run, newest_checkpoint, read_record, write_record
from dmt.distill.keeper import Keeper
from dmt.distill.module import SCALE_TOKENS, Distiller
from dmt.distill.planning import estimated, plan, timed
from dmt.distill.pretrain import Pretrainer, fresh_gpt2, train_tokenizer
from dmt.distill.processes import first_alone, first_makes, rank
from dmt.distill.signals import observe_teacher
from dmt.distill.timing import WINDOWS, measured
from dmt.errors import UserError
from dmt.evaluate import Tally, compare, recall
from dmt.layers import layer_memories
from dmt.memory.associative import Heard
from dmt.models.books import put_aside
from dmt.models.fingerprint import fingerprint
from dmt.models.loading import SAFELY
from dmt.models.slots import filed_in
from dmt.models.surgery import TransferReport, associative_of, featural_of, transplant
from dmt.models.teacher import load_teacher
from dmt.pages.curves import read_curves
from dmt.pages.page import leave
from dmt.pages.pretrained import pretrained
from dmt.store import Store


def distil(config: Config, run: Path | None) -> Path:
    """Clone, calibrate, train, measure on test text, save the student; the run's folder."""
    began = time.perf_counter()
    teacher, tokenizer = load_teacher(config.teacher)
    layers, positions = teacher.config.num_hidden_layers, teacher.config.max_position_embeddings
    if config.data.block > positions:
        raise UserError(f"data.block={config.data.block} is longer than the {positions} positions of teacher={config.teacher}")
    memories, stages = layer_memories(config, layers), config.stages
    if all(memory.kind == "dense" for memory in memories):
        raise UserError("every layer is left dense, so there is nothing to distil; give a layer memory.kind=featural")
    data = TextData(config, tokenizer, stages.layerwise_steps + stages.end_to_end_steps)
    data.setup()
    keep_freed_memory()  # not before: the tokenizer's threads would wait for each other's memory
    student, transfer = transplant(teacher, memories, _given_to_blocks(config, teacher, memories, data))
    config = measured(config, student, data.calibration_windows(config.data.block * min(WINDOWS, config.data.micro_batch)))
    cache = first_alone(lambda: kept_answers(config, teacher, data))
    fresh = run is None or newest_checkpoint(run) is None
    keeps = bool(associative_of(student))
    model = fingerprint(teacher) if keeps else ""
    shared = _store(config.store.place, model) if keeps and config.store.place else None  # refused before a folder is made
    begun_before, run = run is not None, run or first_makes(lambda: new_run(config))
    module = Distiller(config, student, teacher)
    module.cache = cache
    if keeps:
        store = shared or _store(str(run / "memory.db"), model)
        module.keeper = first_alone(lambda: Keeper(config.store, store, student, run))
        if begun_before and fresh:
            module.keeper.take_back()
    with closing(module):
        _train(config, run, fresh, module, tokenizer, data, transfer, began)
    return run


def _store(place: str, model: str) -> Store:
    """An open store, which of several processes the first alone writes to."""
    return first_alone(lambda: Store(place, model, read_only=rank() > 0))


def kept_answers(config: Config, teacher: Any, data: TextData) -> TeacherCache | None:
    """The teacher's answers to every window of the end-to-end stage, where `cache.place` says that they are kept."""
    if not config.cache.place:
        return None
    if not (Path(config.cache.place).expanduser() / FILE).exists():
        check_writable(config.cache.place, "cache.place")
    numbers = data.numbers_from(config.stages.layerwise_steps)
    teacher.to(compute_device(config))
    return teacher_cache(config, teacher, data.training_windows().windows, numbers)


def _train(
    config: Config,
    run: Path,
    fresh: bool,
    module: Distiller,
    tokenizer: Any,
    data: TextData,
    transfer: TransferReport,
    began: float,
) -> None:
    """From a student in place to results in the folder."""
    student, teacher, stages = module.student, module.teacher, config.stages
    place, last = compute_device(config), newest_checkpoint(run)
    module.to(place)
    teacher.to(place)  # type: ignore[arg-type]
    steps_before = 0 if fresh or last is None else int(last.stem[5:])
    estimate = estimated(config, timed(config, module, data), data, fresh, steps_before)
    plan(config, run, student, module.trainable(), transfer, estimate)
    untrained: dict[str, Tally] = {}
    if fresh:
        pl.seed_everything(config.seed, workers=True, verbose=False)
        if module.keeper is not None:
            module.keeper.begin()
        module.calibrate(data.calibration_windows(max(stages.calibrate_tokens, SCALE_TOKENS)).to(place))
        held = {c.name: first_windows(c.validation, config.data.validation_tokens) for c in data.corpora} if rank() == 0 else {}
        untrained = {name: compare(student, teacher, windows, config.data.micro_batch) for name, windows in held.items()}
        report.untrained(untrained)
    if rank() == 0:
        disk.write(run / "transfer.txt", transfer.table() + "\n")
        known: dict[str, Any] = {"estimated": asdict(estimate)}
        known |= {"calibrated": {name: report.numbers(tally) for name, tally in untrained.items()}} if fresh else {}
        write_record(run, config, known, begins=True)
    prepared = time.perf_counter() - began
    if data.steps:
        student.train()
        with computing(config, student, teacher):
            fit(config, module, data, run, [Charts(), SlotUsage(), StoredRows(), Samples(tokenizer)])
    if rank():
        return  # what is left is for one
    trained = time.perf_counter() - began - prepared
    student = _as_saved(run, student.eval().cpu(), tokenizer)
    place = torch.device("cpu") if filed_in(student) else compute_device(config)
    results = measure(config, student.to(place), teacher.to(place), tokenizer, data)  # type: ignore[arg-type]
    results["budgets"] = _budgets(config, student, teacher, data)
    results |= _costs(config, data, began, prepared, trained, steps_before)
    _conclude(config, run, student.cpu(), teacher.cpu(), tokenizer, data, results)


def _given_to_blocks(config: Config, teacher: Any, memories: list[MemoryConfig], data: TextData) -> tuple[Tensor, ...] | None:
    """The teacher's block inputs on calibration text, where a memory with other slots than its block is to be made."""
    if all(memory.slots is None or memory.init == "random" for memory in memories):
        return None
    return observe_teacher(
        teacher, data.calibration_windows(max(config.stages.calibrate_tokens, SCALE_TOKENS)), blocks=True
    ).block_inputs


def _budgets(config: Config, student: Any, teacher: Any, data: TextData) -> dict[str, Any]:
    """How far the student is from its teacher with other budgets than its own."""
    tests = {corpus.name: first_windows(corpus.test, config.data.test_tokens) for corpus in data.corpora}
    return kl_by_budget(student, teacher, tests, data.calibration_windows(TOKENS), config.data.micro_batch)


def _costs(config: Config, data: TextData, began: float, prepared: float, trained: float, steps_before: int) -> dict[str, Any]:
    """Seconds and tokens; of a resumed run the seconds and the speed are those since it was resumed."""
    step = config.data.batch * config.data.block
    measured_for = time.perf_counter() - began - prepared - trained
    return {
        "seconds": {"prepare": prepared, "train": trained, "measure": measured_for},
        "tokens": {"trained": data.steps * step, "per_second": (data.steps - steps_before) * step / max(trained, 1e-9)},
    }


def _as_saved(run: Path, student: Any, tokenizer: Any) -> Any:
    """Save the student; itself, or where its slots leave RAM or lose digits the one that was saved, to be measured."""
    with whole_folder(run / "student", put_aside) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32, **SAFELY) if filed_in(student) else student


def _conclude(
    config: Config, run: Path, student: Any, teacher: Any, tokenizer: Any, data: TextData, results: dict[str, Any]
) -> None:
    """Write `run.json`, HParams, `report.md` and `report.html`, print the table."""
    results["bytes"] = report.sizes(teacher, student, run / "student")
    said = {c.name: continued(student, teacher, tokenizer, c.test) for c in data.corpora}
    results["samples"] = {corpus: [asdict(each) for each in found] for corpus, found in said.items()}
    results["curves"] = read_curves(run)
    write_record(run, config, results)
    report.hyperparameters(config, run, results)
    report.finish(run, config, results, said)


def measure(config: Config, student: Any, teacher: Any, tokenizer: Any, data: TextData) -> dict[str, Any]:
    """Everything that is reported, on test text: fidelity and recall by corpus, slot usage by layer."""
    for memory in featural_of(student).values():
        memory.count_reads()
    for associative in associative_of(student).values():
        associative.heard = Heard()
    fidelity: dict[str, Any] = {}
    for corpus in data.corpora:
        windows = first_windows(corpus.test, config.data.test_tokens)
        fidelity[corpus.name] = report.numbers(compare(student, teacher, windows, config.data.micro_batch))
        fidelity[corpus.name] |= {"window": config.data.block, "stride": config.data.block, "windows": len(windows)}
    slots, rows = report.slots(student), report.stored(student)
    for layer, share in report.searched(student, data.corpora[0].test[: config.data.micro_batch]).items():
        slots[layer]["recall"] = share
    for corpus in data.corpora:
        for name, probes in (("recall", corpus.probes), ("recall_unseen", corpus.unseen_probes)):
            if probes:
                said = {"teacher": recall(teacher, tokenizer, probes), "student": recall(student, tokenizer, probes)}
                fidelity[corpus.name][name] = said | {"probes": len(probes)}
    return {"fidelity": fidelity, "slots": slots} | ({"rows": rows} if rows else {})


def pretrain(config: Config, run: Path | None) -> Path:
    """Train a teacher from scratch and write it, in half precision, to `pretrain.output`; the run's folder."""
    began = time.perf_counter()
    if config.pretrain.start is None:
        documents = [text for source in config.data.corpora for text in load_corpus(source, config.seed).train]
        tokenizer = train_tokenizer(documents, config.pretrain.vocabulary, config.data.block)
        model = fresh_gpt2(config, len(tokenizer))
    else:
        model, tokenizer = load_teacher(config.pretrain.start)
        model.requires_grad_(True).train()
    data = TextData(config, tokenizer, config.pretrain.steps)
    data.setup()
    keep_freed_memory()  # not before: the tokenizer's threads would wait for each other's memory
    config = measured(config, model, data.calibration_windows(config.data.block * config.data.micro_batch))
    run = run or first_makes(lambda: new_run(config))
    print(f"run folder {run}; {sum(p.numel() for p in model.parameters()):,} weights, {config.pretrain.steps:,} steps")
    if rank() == 0:
        write_record(run, config, {}, begins=True)
    with computing(config, model):
        fit(config, Pretrainer(config, model, tokenizer), data, run, [])
    if rank():
        return run
    model = model.cpu().half().float().eval()  # measured as it is saved
    results: dict[str, Any] = {"fidelity": {}, "seconds": {"total": time.perf_counter() - began}}
    for corpus in data.corpora:
        windows = first_windows(corpus.test, config.data.test_tokens)
        tally = compare(model, model, windows, config.data.micro_batch)
        found: dict[str, Any] = {"perplexity": tally.teacher_perplexity, "tokens": tally.tokens, "window": config.data.block}
        for name, probes in (("recall", corpus.probes), ("recall_unseen", corpus.unseen_probes)):
            if probes:
                found[name] = {"teacher": recall(model, tokenizer, probes), "probes": len(probes)}
        results["fidelity"][corpus.name] = found
        print(f"{corpus.name}: {found}")
    output = Path(config.pretrain.output).expanduser()
    with whole_folder(output) as folder:
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    results["curves"] = read_curves(run)
    write_record(run, config, results)
    print(f"report   {leave(lambda: pretrained(run, config, read_record(run)), run / 'report.html')}")
    print(f"the teacher is in {output}: teacher={output}")
    return run
