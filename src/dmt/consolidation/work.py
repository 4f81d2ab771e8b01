"""One consolidation in hand: the model, its context and questions; and its training, where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.consolidation.asking import Answers, Question, answers, likeliest, share_kept
from dmt.consolidation.hearing import Hearing, after
from dmt.consolidation.module import TERM, Consolidator
from dmt.consolidation.reading import Context
from dmt.consolidation.telling import Lesson, Lessons
from dmt.data.blocks import TextData
from dmt.distill.callbacks import Charts, Layout
from dmt.distill.fitting import computing, fit


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

    def asked(self, model: PreTrainedModel, before: list[int]) -> Answers:
        """What a model answers that has read `before` alone."""
        return answers(partial(after, model, before), self.tokenizer, self.questions, self.device)

    def known(self) -> Answers:
        """What the model with the context answers; of several windows the one that knows it best."""
        return likeliest([answers(hearing.signals, self.tokenizer, self.questions, self.device) for hearing in self.hearings])


class ContextCharts(Charts):
    """The curves of a consolidation in groups: what is learnt, what is answered, what other text notices of it."""

    def charts(self, module: Any, corpora: list[str]) -> Layout:
        terms = ("loss", TERM[module.settings.context.objective], *(["unrelated"] if module.settings.context.keep else []))
        found: Layout = {"context": {"loss": ["Multiline", [f"consolidate/{name}" for name in terms]]}}
        if module.ask is not None:
            found["context"] |= {name: ["Multiline", [f"consolidated/{name}"]] for name in ("share", "recall")}
        found["unrelated text"] = {"kl": ["Multiline", [f"{corpus}/kl" for corpus in corpora]]}
        return found


def train(
    work: Work,
    student: PreTrainedModel,
    chosen: dict[str, nn.Parameter],
    before: list[int],
    data: TextData,
    run: Path,
    fresh: bool,
) -> None:
    """Train `chosen` of the student, before whose texts `before` stands, to the last step, with the logs of every task."""
    config = work.config
    lessons = Lessons(
        work.hearings, work.tokenizer, work.context, config.context, config.data.micro_batch * 2, config.seed,
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
    with computing(config, student):
        fit(config, module, data, run, [ContextCharts()])
