"""Any settings drawn from the schema either train or are rejected in one line.

A rejected run writes nothing.
"""

import contextlib
import io
import os
import shutil
import signal
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import pytorch_lightning as pl
from cli_asserts import line_of, snapshot
from conftest import SENTENCES, make_llama, make_teacher
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as draw

from dmt.cli.main import distill_main
from dmt.config import MEMORY_CONFIGS, Config, FeaturalConfig
from dmt.data.tokenizer import train_tokenizer
from dmt.models.conversion import convert_blocks

# Number of drawn runs; with DMT_FUZZ=5000 in the environment 5,000, newly drawn each time.
EXAMPLES = int(os.environ.get("DMT_FUZZ", "80"))
# The error that a run can raise only after the model has read the context.
LATE_ERROR = "the context does not change the model's predictions"
# Seconds after which a run that has not begun counts as hanging.
TIMEOUT = 120
SMALL_RUN = [
    "data.corpora=[text.txt]",
    "data.seq_len=16",
    "data.batch_size=2",
    "data.micro_batch_size=1",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "stages.calibration_tokens=32",
    "stages.lookup_tokens=32",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=1",
    "trainer.num_threads=1",
    "trainer.progress_bar=false",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "memory.mean_k=8",
    "context.text=Ada Holbrook was born in Ravenhill.",
    "context.num_samples=2",
    "context.qa_per_sentence=1",
]
INTEGERS = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "4",
    "8",
    "16",
    "17",
    "63",
    "64",
    "65",
    "300",
    "1000000007",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "1e3",
    "0x10",
]
COMMON_INTEGERS = ("1", "2", "3", "4", "8", "16", "64")
FLOATS = [
    "-1",
    "0",
    "1e-30",
    "1e-300",
    "0.25",
    "0.5",
    "1",
    "1.5",
    "2",
    "1e30",
    "1e308",
    "1e309",
    ".nan",
    "-.inf",
]
ODDITIES = [
    "",
    "null",
    "nul",
    "???",
    "true",
    "[]",
    "[1]",
    "{}",
    "{a: 1}",
    "x",
    "'\\ud800'",
    '"a\\nb"',
    "${x}",
    "!!python/none x",
    "\0",
    "é",
]
PATHS = [
    "new",
    "new/er",
    "text.txt",
    "gpt2",
    "other.db",
    "postgresql://127.0.0.1:9/x",
    "mysql://x/y",
    "http://x/y",
    "~nobody/x",
    ".",
]
# Values of settings that are strings or lists.
VALUES = {
    "teacher": [
        "gpt2",
        "llama",
        "long",
        "student",
        "text.txt",
        "nowhere",
        "./nowhere",
        "http://x/y",
    ],
    "data.corpora": [
        "[text.txt]",
        "[text.txt, prose.txt]",
        "[empty.txt]",
        "[lines.jsonl]",
        "[gpt2]",
        "[utf16.txt]",
        "[http://x/y.txt]",
        "[nowhere.txt]",
        "[text.txt, text.txt]",
    ],
    "data.mixture_weights": [
        "[]",
        "[1]",
        "[0]",
        "[1, 3]",
        "[0, 1]",
        "[1e308, 1e308]",
        "[.nan]",
        "[1e-320]",
    ],
    "context.text": ["", "A", "'  '", "geese", "'Ada has a dog. It runs.'"],
    "context.file": ["", "text.txt", "empty.txt", "utf16.txt", "nowhere.txt", "gpt2", "one.txt"],
    "context.questions": ["", "questions.jsonl", "lines.jsonl", "text.txt", "empty.txt", "gpt2"],
    # More than one device starts more processes.
    "trainer.devices": ["1", "0", "-1", "200", "257", "1000000007"],
    "store.url": ["", *PATHS],
    "logit_cache.dir": ["", *PATHS],
    "trainer.log_dir": PATHS,
}


def draw_value(name: str, annotation: Any) -> draw.SearchStrategy[str]:
    """Draw a value of a setting as it is typed: one that fits its annotation, or an oddity."""
    if name in VALUES:
        return draw.one_of(
            draw.sampled_from(VALUES[name]),
            draw.sampled_from(VALUES[name]),
            draw.sampled_from(ODDITIES),
        )
    choices = (
        [choice for choice in (get_args(annotation) or (annotation,)) if choice is not type(None)]
        if get_origin(annotation) is not Literal
        else [annotation]
    )
    values: list[str] = []
    for choice in choices:
        if get_origin(choice) is Literal:
            values += get_args(choice)
        else:
            values += {int: INTEGERS, float: FLOATS, bool: ["true", "false"]}.get(choice, ["x"])
    if type(None) in get_args(annotation):
        values.append("")
    common = [value for value in values if value not in INTEGERS or value in COMMON_INTEGERS]
    return draw.one_of(
        *[draw.sampled_from(common)] * 8,
        *[draw.sampled_from(values)] * 3,
        draw.sampled_from(ODDITIES),
    )


def draw_settings() -> dict[str, draw.SearchStrategy[str]]:
    strategies = {}
    for name, annotation in get_type_hints(Config).items():
        if not is_dataclass(annotation):
            strategies[name] = draw_value(name, annotation)
            continue
        if name == "memory":
            strategies |= {f"memory.{inner}": MEMORY[inner] for inner in MEMORY}
            continue
        for inner, inner_annotation in get_type_hints(annotation).items():
            strategies[f"{name}.{inner}"] = draw_value(f"{name}.{inner}", inner_annotation)
    strategies["student.layer_overrides"] = draw.lists(rule, max_size=2).map(
        lambda rules: f"[{', '.join(rules)}]"
    )
    return strategies


MEMORY = {
    item.name: draw_value(f"memory.{item.name}", get_type_hints(config_class)[item.name])
    for config_class in reversed(MEMORY_CONFIGS.values())  # those of featural memories win
    for item in fields(config_class)
    if item.name != "kind"
} | {"kind": draw.sampled_from([*MEMORY_CONFIGS, "sparse", "x:y", ""])}
changes = draw.lists(
    draw.sampled_from(sorted(MEMORY)).flatmap(
        lambda name: MEMORY[name].map(lambda value: f"{name}: {value}")
    ),
    max_size=3,
)
layers = draw.sampled_from(["all", "0", "0-1", "2-", "last", "7", "x", "[0, 2]"])
rule = draw.tuples(layers, changes).map(
    lambda parts: f"{{layers: {parts[0]}, memory: {{{', '.join(parts[1])}}}}}"
)
SETTINGS = draw_settings()
override = draw.sampled_from(sorted(SETTINGS)).flatmap(
    lambda name: SETTINGS[name].map(lambda value: f"{name}={value}")
)
memory_override = draw.sampled_from(sorted(MEMORY)).flatmap(
    lambda name: MEMORY[name].map(lambda value: f"memory.{name}={value}")
)
# Settings that belong together, so that later checks are reached too.
COMBINATIONS = [
    [],
    [],
    ["task=consolidate", "teacher=long"],
    ["task=consolidate", "teacher=long", "context.target=weights"],
    ["task=consolidate", "teacher=long", "context.target=prompt", "context.prompt_length=2"],
    ["task=consolidate", "teacher=student"],
    ["memory.k=4", "memory.mean_k="],
    ["memory.k=", "memory.mean_k=", "memory.selection=score"],
    ["loss.hidden_mse=0", "loss.block_fvu=0", "logit_cache.dir=new", "logit_cache.top_k=16"],
    ["memory.kind=associative", "stages.layerwise_steps=0"],
    ["memory.kind=associative", "memory.index=flat", "memory.write_start=0"],
    ["memory.search=int8", "memory.offload=slots"],
    ["memory.search=ivf"],
    ["memory.projections=true", "memory.init=random", "memory.num_slots=32"],
    ["teacher=llama"],
    *(
        [f"student.layer_overrides=[{{layers: all, memory: {{kind: {kind}}}}}]"]
        for kind in MEMORY_CONFIGS
    ),
    ["teacher=llama", "memory.init=random", "memory.num_slots=9", "memory.mean_k=3"],
]
overrides = draw.tuples(
    draw.sampled_from(COMBINATIONS), draw.lists(draw.one_of(override, memory_override), max_size=5)
).map(lambda parts: [*parts[0], *parts[1]])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer):
    """Create a folder with the files and models that settings can name."""
    folder = tmp_path_factory.mktemp("fuzz")
    student, _ = convert_blocks(
        make_teacher(len(tokenizer), n_positions=160), [FeaturalConfig(k=8)] * 3
    )
    models = {
        "gpt2": make_teacher(len(tokenizer)),
        "llama": make_llama(len(tokenizer)),
        "student": student,
    }
    models["long"] = make_teacher(len(tokenizer), n_positions=160)
    long_tokenizer = train_tokenizer(SENTENCES * 3, 300, 160)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (tokenizer if name in ("gpt2", "llama") else long_tokenizer).save_pretrained(folder / name)
    text = "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(200))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "prose.txt").write_text(text.replace("fox", "hen"), encoding="utf-8")
    (folder / "utf16.txt").write_text(text, encoding="utf-16")
    (folder / "one.txt").write_text("a", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "lines.jsonl").write_text('{"text": "a"}\n["b"]\n', encoding="utf-8")
    (folder / "questions.jsonl").write_text(
        '{"prompt": "Ada was born in", "answer": " Ravenhill"}\n', encoding="utf-8"
    )
    return folder


class FirstStepDone(BaseException):
    """Raised after the first step, which is all the test needs."""


class FirstStep(pl.Callback):
    """End a run after its first step."""

    begun = False

    def on_train_batch_start(self, *_: Any) -> None:
        FirstStep.begun = True

    def on_train_batch_end(self, *_: Any) -> None:
        raise FirstStepDone


def run_until_first_step(arguments: list[str]) -> tuple[int | None, str, str]:
    """Return the exit code, or None if a training step began, stdout and stderr."""
    original_trainer, FirstStep.begun = pl.Trainer, False

    def make_trainer(*, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
        return original_trainer(callbacks=[*callbacks, FirstStep()], **options)

    def hang(*_: Any) -> None:
        raise AssertionError(f"hangs: {arguments}")

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(TIMEOUT)
    try:
        pl.Trainer = make_trainer
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: int | None = distill_main(arguments)
    except FirstStepDone:
        code = None
    finally:
        pl.Trainer = original_trainer
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return (None if FirstStep.begun else code), out.getvalue(), err.getvalue()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="DMT_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(overrides)
# Each example failed once.
@example(["memory.search=ivf", "memory.num_slots=1000000007"])
@example(["task=consolidate", "teacher=long", "context.target=weights", "logit_cache.dir=new"])
@example(["task=consolidate", "teacher=student"])
@example(["trainer.num_threads=1000000007"])
@example(["data.batch_size=1000000007", "data.micro_batch_size=1000000007"])
@example(["data.corpora=[utf16.txt]"])
def test_every_config_trains_or_is_rejected_in_one_line(workspace, overrides):
    before = snapshot(workspace)
    original_folder = Path.cwd()
    os.chdir(workspace)
    try:
        code, out, err = run_until_first_step(
            [*SMALL_RUN, "teacher=gpt2", "trainer.log_dir=logs", *overrides]
        )
    finally:
        os.chdir(original_folder)
    try:
        assert_rejected_without_traces(overrides, code, out, err, before, snapshot(workspace))
    finally:
        for path in sorted(set(snapshot(workspace)) - set(before)):
            if Path(path).is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                Path(path).unlink(missing_ok=True)


def assert_rejected_without_traces(
    overrides: list[str], code: int | None, out: str, err: str, before: dict, after: dict
) -> None:
    """Fail unless a step began, rows were written in one pass, or the run was rejected."""
    if code is None:
        return
    if code == 0:
        assert "task=consolidate" in overrides or any(
            "steps=0" in override for override in overrides
        ), (
            overrides,
            out,
            err,
        )
        return
    if LATE_ERROR in err:  # raised after the run folder was created, which is deleted again
        out, err = "", err.splitlines()[-1]
        after = {
            path: entry
            for path, entry in after.items()
            if path in before or not (Path(path).is_dir() and not any(Path(path).iterdir()))
        }
    line_of(code, out, err)
    assert after == before, (
        f"{overrides} was rejected, but wrote {sorted(set(after) - set(before))[:5]}: {err}"
    )
