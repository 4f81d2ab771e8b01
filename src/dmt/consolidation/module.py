"""One consolidation in hand: the model, its context and questions; and its training, where there is one.

The LightningModule of consolidation: a student learns to say without a context what its teacher says with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config, LossConfig
from dmt.consolidation.context import Context
from dmt.consolidation.sampling import BatchSampler, DistillationBatch
from dmt.data.windows import TextDataModule
from dmt.distillation.losses import (
    Batch,
    LossScales,
    compute_loss_terms,
    next_token_mask,
    sum_weighted_terms,
)
from dmt.evaluation.metrics import FidelityMetrics
from dmt.evaluation.questions import (
    AnswerScores,
    Question,
    benefit_retained,
    best_scores,
    score_answers,
)
from dmt.models.forward import ContextTeacher, ForwardOutputs, forward_with_prefix
from dmt.training.callbacks import ChartGroups, ChartLayout
from dmt.training.checkpoints import check_finite, clip_gradients
from dmt.training.trainer import build_adamw, fit, lr_schedule, use_training_kernels

OBJECTIVE_TERMS = {
    "causal_lm": "ce",
    "logits": "kl",
    "hidden_last": "hidden_mse",
    "hidden_all": "block_fvu",
    "generated": "kl",
}
"""What each objective is called among the losses."""


def build_loss_config(config: Config) -> LossConfig:
    """The losses of an objective: its own alone, by the weight that the config gives it, 1 where that is 0."""
    term = OBJECTIVE_TERMS[config.context.objective]
    zeros = {
        "kl": 0.0,
        "reverse_kl": 0.0,
        "ce": 0.0,
        "hidden_mse": 0.0,
        "block_fvu": 0.0,
        "hidden_cosine": 0.0,
    }
    return replace(config.loss, **(zeros | {term: getattr(config.loss, term) or 1.0}))


class ContextDistillationModule(pl.LightningModule):
    """One step is one lesson and some windows of unrelated text, on which the student is to stay as it was.

    Args:
        student: learns.
        base: the model as it was, in eval mode; outside the module tree, so in no checkpoint.
        chosen: what of the student is trained, by name.
        lesson: that of a step.
        before: token ids that stand before every text of the student, and before those of the base.
        ask: the share of the context's benefit that the student has, to be logged; None where nothing is asked.
    """

    def __init__(
        self,
        config: Config,
        student: PreTrainedModel,
        base: PreTrainedModel,
        trainable: dict[str, nn.Parameter],
        get_batch: Callable[[int], DistillationBatch],
        prefixes: tuple[Sequence[int], Sequence[int]],
        evaluate_questions: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings, self.loss_config = config, build_loss_config(config)
        self.trainable = nn.ParameterDict(
            {name.replace(".", "/"): parameter for name, parameter in trainable.items()}
        )
        self._models = (student, base)  # what is trained is above, and that alone is kept
        self.get_batch, self.prefixes, self.evaluate_questions = (
            get_batch,
            prefixes,
            evaluate_questions,
        )
        self.register_buffer("layer_scales", torch.ones(student.config.num_hidden_layers))
        self.register_buffer("hidden_scale", torch.ones(()))
        self.val_metrics: list[FidelityMetrics] = []

    @property
    def student(self) -> PreTrainedModel:
        """Who learns."""
        return self._models[0]

    @property
    def base(self) -> PreTrainedModel:
        """The model as it was."""
        return self._models[1]

    @property
    def compares_blocks(self) -> bool:
        """Whether the states of all layers are to be compared."""
        return bool(self.loss_config.block_fvu)

    @torch.no_grad()
    def measure_scales(self) -> None:
        """Variances of the teacher's states, from its first lesson; once, before the first step of a new run."""
        batch = self.get_batch(0)
        if batch.teacher_signals is None:
            return
        states = [batch.teacher_signals.hidden, *batch.teacher_signals.layer_outputs]
        variances = [state[batch.mask].float().var(0).sum() for state in states]
        self.hidden_scale.copy_(variances[0])  # type: ignore[operator]
        if len(variances) > 1:
            self.layer_scales.copy_(torch.stack(variances[1:]))  # type: ignore[operator]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_adamw(self.trainable.values(), self.settings.optim)

    def on_fit_start(self) -> None:
        for model in self._models:
            model.to(self.device)  # type: ignore[arg-type]

    def training_step(self, windows: Tensor, batch_idx: int) -> None:
        step, steps = self.global_step, self.settings.stages.end_to_end_steps
        optimizer = self.optimizers()
        lr = lr_schedule(step, steps, self.settings.stages.end_to_end_lr, self.settings.optim)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = lr * group["lr_scale"]
        optimizer.zero_grad()  # type: ignore[union-attr]
        terms = self._compute_loss_terms(self.get_batch(step))
        loss = sum_weighted_terms(terms, self.loss_config)
        if loss.requires_grad:  # rows that no text of a lesson reads learn nothing from it
            self.manual_backward(loss)
        logs = {name: float(value.detach()) for name, value in terms.items()}
        if self.settings.context.unrelated_kl_weight:
            unrelated_kl = 0.0
            for micro_batch in windows.split(self.settings.data.micro_batch_size):
                kl = self._compute_unrelated_kl(micro_batch, len(windows))
                if (
                    kl.requires_grad
                ):  # of rows that are read nowhere in it there is nothing to learn
                    self.manual_backward(self.settings.context.unrelated_kl_weight * kl)
                unrelated_kl += float(kl.detach())
            logs["unrelated"] = unrelated_kl
        grad_norm = clip_gradients(optimizer, self.settings.optim.grad_clip)  # type: ignore[arg-type]
        check_finite(
            step + 1,
            loss + logs.get("unrelated", 0.0),
            grad_norm,
            self.student,
            lambda: self._rerun_forward(step, windows),
        )
        optimizer.step()  # type: ignore[union-attr]
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if step % self.settings.trainer.log_every == 0 or step == steps - 1:
            metrics = {"learning_rate": lr, "consolidate/loss": float(loss.detach())}
            for logger in self.loggers:
                logger.log_metrics(
                    metrics | {f"consolidate/{name}": value for name, value in logs.items()}, step
                )

    def _rerun_forward(self, step: int, windows: Tensor) -> None:
        self._compute_loss_terms(self.get_batch(step))
        for micro_batch in windows.split(self.settings.data.micro_batch_size):
            self._compute_unrelated_kl(micro_batch, len(windows))

    def _compute_loss_terms(self, batch: DistillationBatch) -> dict[str, Tensor]:
        student_signals = forward_with_prefix(
            self.student, self.prefixes[0], batch.tokens, blocks=self.compares_blocks
        )
        teacher_signals = (
            student_signals if batch.teacher_signals is None else batch.teacher_signals
        )
        token_counts = float(batch.mask.sum()), float(next_token_mask(batch.mask).sum())
        scales = LossScales(self.layer_scales, self.hidden_scale)  # type: ignore[arg-type]
        return compute_loss_terms(
            _compare_streams(student_signals),
            _compare_streams(teacher_signals),
            Batch(batch.tokens, batch.mask, *token_counts),
            self.loss_config,
            scales,
        )

    def _compute_unrelated_kl(self, windows: Tensor, num_windows: int) -> Tensor:
        """KL from the model as it was, per token of a step of `of` windows."""
        with torch.no_grad():
            base_signals = forward_with_prefix(self.base, self.prefixes[1], windows)
        student_signals, mask = (
            forward_with_prefix(self.student, self.prefixes[0], windows),
            torch.ones_like(windows, dtype=torch.bool),
        )
        batch = Batch(windows, mask, float(num_windows * windows.shape[1]), 1.0)
        kl_only = LossConfig(
            kl=1.0, hidden_mse=0.0, block_fvu=0.0, chunk_size=self.loss_config.chunk_size
        )
        return compute_loss_terms(
            student_signals,
            base_signals,
            batch,
            kl_only,
            LossScales(self.layer_scales, self.hidden_scale),
        )["kl"]  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, windows: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        base_logits = forward_with_prefix(self.base, self.prefixes[1], windows).logits
        self.val_metrics[dataloader_idx].update(
            forward_with_prefix(self.student, self.prefixes[0], windows).logits,
            base_logits,
            windows,
        )

    def on_validation_epoch_end(self) -> None:
        for corpus, metrics in zip(self.trainer.datamodule.corpora, self.val_metrics, strict=True):  # type: ignore[attr-defined]
            self.log(f"{corpus.name}/kl", metrics.kl)
        for name, value in (
            {} if self.evaluate_questions is None else self.evaluate_questions()
        ).items():
            self.log(name, value, prog_bar=True)


def _compare_streams(signals: ForwardOutputs) -> ForwardOutputs:
    """Signals whose `block` term is about states after whole layers: what the objective of all hidden states compares."""
    return replace(signals, block_outputs=signals.layer_outputs)


@dataclass
class ConsolidationRun:
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
    prefix: list[int]
    context: Context
    questions: list[Question]
    teachers: list[ContextTeacher]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.base.parameters()).device

    def score_questions(self, model: PreTrainedModel, prefix: list[int]) -> AnswerScores:
        """What a model answers that has read `before` alone."""
        return score_answers(
            partial(forward_with_prefix, model, prefix), self.tokenizer, self.questions, self.device
        )

    def score_with_context(self) -> AnswerScores:
        """What the model with the context answers; of several windows the one that knows it best."""
        return best_scores(
            [
                score_answers(teacher.predict, self.tokenizer, self.questions, self.device)
                for teacher in self.teachers
            ]
        )


class ConsolidationCharts(ChartGroups):
    """The curves of a consolidation in groups: what is learnt, what is answered, what other text notices of it."""

    def build_layout(self, module: Any, corpora: list[str]) -> ChartLayout:
        terms = (
            "loss",
            OBJECTIVE_TERMS[module.settings.context.objective],
            *(["unrelated"] if module.settings.context.unrelated_kl_weight else []),
        )
        layout: ChartLayout = {
            "context": {"loss": ["Multiline", [f"consolidate/{name}" for name in terms]]}
        }
        if module.evaluate_questions is not None:
            layout["context"] |= {
                name: ["Multiline", [f"consolidated/{name}"]] for name in ("share", "recall")
            }
        layout["unrelated text"] = {"kl": ["Multiline", [f"{corpus}/kl" for corpus in corpora]]}
        return layout


def train_student(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    prefix: list[int],
    data: TextDataModule,
    run_dir: Path,
    from_scratch: bool,
) -> None:
    """Train `chosen` of the student, before whose texts `before` stands, to the last step, with the logs of every task."""
    config = run_state.config
    sampler = BatchSampler(
        run_state.teachers,
        run_state.tokenizer,
        run_state.context,
        config.context,
        config.data.micro_batch_size * 2,
        config.seed,
        blocks=config.context.objective == "hidden_all",
    )

    def get_batch(step: int) -> DistillationBatch:
        with torch.autocast(
            run_state.device.type, enabled=False
        ):  # what was read is kept in full precision
            return sampler.get_batch(step)

    def evaluate_questions() -> dict[str, float]:
        consolidated = run_state.score_questions(student, prefix)
        return {
            "consolidated/share": benefit_retained(with_context, without_context, consolidated),
            "consolidated/recall": consolidated.recall,
        }

    if run_state.questions:
        with_context, without_context = (
            run_state.score_with_context(),
            run_state.score_questions(run_state.base, run_state.prefix),
        )
    module = ContextDistillationModule(
        config,
        student,
        run_state.base,
        trainable,
        get_batch,
        (prefix, run_state.prefix),
        evaluate_questions if run_state.questions else None,
    )
    if from_scratch:
        module.measure_scales()
    with use_training_kernels(config, student):
        fit(config, module, data, run_dir, [ConsolidationCharts()])
