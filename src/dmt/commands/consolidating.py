"""`dmt consolidate`: from a context to rows, weights or memory tokens of a student; the words of a command to a config."""

from __future__ import annotations

import argparse
from dataclasses import replace

from dmt import settings
from dmt.commands.printing import Output
from dmt.distill.folder import check_free, check_writable, read_record
from dmt.errors import UserError
from dmt.facts.opening import student_folder
from dmt.tasks import carry_out
from dmt.wording import names

STEPS, RATE = 200, 2e-3
"""Of what is trained, unless something else is asked for."""
SETTINGS = {
    "file": "context.file", "questions": "context.questions", "into": "context.into",
    "objective": "context.objective", "write": "context.write", "weights": "context.weights", "rank": "context.rank",
    "tokens": "context.tokens", "steps": "stages.end_to_end_steps", "lr": "stages.end_to_end_lr",
    "temperature": "loss.temperature", "seed": "seed",
}  # fmt: skip
"""Options of the command and the settings that they are."""


def consolidate(given: argparse.Namespace, out: Output) -> None:
    """Put a context into a student; the result is a run of its own, the student it began with stays as it is."""
    if given.student is not None and given.model is not None:
        raise UserError("--student and --model both name what learns; give one of them")
    source = given.model or str(student_folder(given.student))
    words = ["task=consolidate", f"teacher={source}", f"stages.end_to_end_steps={STEPS}", f"stages.end_to_end_lr={RATE}"]
    named = {setting: getattr(given, option) for option, setting in SETTINGS.items() if getattr(given, option) is not None}
    words += [f"{setting}={value}" for setting, value in named.items()]
    changes, text = list(given.settings), given.text
    if text is not None and text.partition("=")[0] in names():  # no text, but the first of the settings
        changes, text = [text, *changes], None
    words += changes
    config = settings.load(None, [*words, *(["context.text=given"] if text is not None else [])])
    if text is not None:  # as it is: not to be read as YAML
        config = replace(config, context=replace(config.context, text=text))
    if out.as_json:
        config = replace(config, trainer=replace(config.trainer, progress=False))
    check_writable(config.trainer.log_dir, "trainer.log_dir")
    check_free(config)
    with out.silent():
        folder = carry_out(config)
    found = read_record(folder)
    kept = ("written", "kinds", "unrelated", "cost", "seconds")
    out.data({"folder": str(folder), **{name: found[name] for name in kept if name in found}})
