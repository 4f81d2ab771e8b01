"""The LightningModule of consolidation: a student learns to say without a context what its teacher says with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config, LossConfig
from dmt.consolidation.hearing import after
from dmt.consolidation.telling import Lesson
from dmt.distill.finite import check_finite, clipped
from dmt.distill.losses import Batch, Scales, distillation_terms, next_token_mask, weighted_sum
from dmt.distill.signals import Signals
from dmt.distill.stepping import adamw, learning_rate
from dmt.evaluate import Tally

TERM = {"causal_lm": "ce", "logits": "kl", "hidden_last": "hidden", "hidden_all": "block", "generated": "kl"}
"""What each objective is called among the losses."""


def weights_of(config: Config) -> LossConfig:
    """The losses of an objective: its own alone, by the weight that the config gives it, 1 where that is 0."""
    term = TERM[config.context.objective]
    none = {"kl": 0.0, "reverse_kl": 0.0, "ce": 0.0, "hidden": 0.0, "block": 0.0, "cosine": 0.0, "revive": 0.0}
    return replace(config.loss, **(none | {term: getattr(config.loss, term) or 1.0}))


class Consolidator(pl.LightningModule):
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
        chosen: dict[str, nn.Parameter],
        lesson: Callable[[int], Lesson],
        before: tuple[Sequence[int], Sequence[int]],
        ask: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings, self.weights = config, weights_of(config)
        self.learnt = nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in chosen.items()})
        self._outside = (student, base)  # what is trained is above, and that alone is kept
        self.lesson, self.before, self.ask = lesson, before, ask
        self.register_buffer("layer_scales", torch.ones(student.config.num_hidden_layers))
        self.register_buffer("hidden_scale", torch.ones(()))
        self.tallies: list[Tally] = []

    @property
    def student(self) -> PreTrainedModel:
        """Who learns."""
        return self._outside[0]

    @property
    def base(self) -> PreTrainedModel:
        """The model as it was."""
        return self._outside[1]

    @property
    def blocks(self) -> bool:
        """Whether the states of all layers are to be compared."""
        return bool(self.weights.block)

    @torch.no_grad()
    def measure_scales(self) -> None:
        """Variances of the teacher's states, from its first lesson; once, before the first step of a new run."""
        lesson = self.lesson(0)
        if lesson.wanted is None:
            return
        states = [lesson.wanted.hidden, *lesson.wanted.streams]
        spread = [state[lesson.mask].float().var(0).sum() for state in states]
        self.hidden_scale.copy_(spread[0])  # type: ignore[operator]
        if len(spread) > 1:
            self.layer_scales.copy_(torch.stack(spread[1:]))  # type: ignore[operator]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.learnt.values(), self.settings.optim)

    def on_fit_start(self) -> None:
        for model in self._outside:
            model.to(self.device)  # type: ignore[arg-type]

    def training_step(self, windows: Tensor, batch_idx: int) -> None:
        step, steps = self.global_step, self.settings.stages.end_to_end_steps
        optimizer = self.optimizers()
        rate = learning_rate(step, steps, self.settings.stages.end_to_end_lr, self.settings.optim)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * group["share"]
        optimizer.zero_grad()  # type: ignore[union-attr]
        terms = self._terms(self.lesson(step))
        loss = weighted_sum(terms, self.weights)
        if loss.requires_grad:  # rows that no text of a lesson reads learn nothing from it
            self.manual_backward(loss)
        logged = {name: float(value.detach()) for name, value in terms.items()}
        if self.settings.context.keep:
            kept = 0.0
            for part in windows.split(self.settings.data.micro_batch):
                apart = self._apart(part, len(windows))
                if apart.requires_grad:  # of rows that are read nowhere in it there is nothing to learn
                    self.manual_backward(self.settings.context.keep * apart)
                kept += float(apart.detach())
            logged["unrelated"] = kept
        norm = clipped(optimizer, self.settings.optim.clip)  # type: ignore[arg-type]
        check_finite(step + 1, loss + logged.get("unrelated", 0.0), norm, self.student, lambda: self._again(step, windows))
        optimizer.step()  # type: ignore[union-attr]
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if step % self.settings.trainer.log_every == 0 or step == steps - 1:
            found = {"learning_rate": rate, "consolidate/loss": float(loss.detach())}
            for logger in self.loggers:
                logger.log_metrics(found | {f"consolidate/{name}": value for name, value in logged.items()}, step)

    def _again(self, step: int, windows: Tensor) -> None:
        self._terms(self.lesson(step))
        for part in windows.split(self.settings.data.micro_batch):
            self._apart(part, len(windows))

    def _terms(self, lesson: Lesson) -> dict[str, Tensor]:
        mine = after(self.student, self.before[0], lesson.tokens, blocks=self.blocks)
        wanted = mine if lesson.wanted is None else lesson.wanted
        counts = float(lesson.mask.sum()), float(next_token_mask(lesson.mask).sum())
        scales = Scales(self.layer_scales, self.hidden_scale)  # type: ignore[arg-type]
        return distillation_terms(_layers(mine), _layers(wanted), Batch(lesson.tokens, lesson.mask, *counts), self.weights, scales)

    def _apart(self, windows: Tensor, of: int) -> Tensor:
        """KL from the model as it was, per token of a step of `of` windows."""
        with torch.no_grad():
            wanted = after(self.base, self.before[1], windows)
        mine, mask = after(self.student, self.before[0], windows), torch.ones_like(windows, dtype=torch.bool)
        batch = Batch(windows, mask, float(of * windows.shape[1]), 1.0)
        only = LossConfig(kl=1.0, hidden=0.0, block=0.0, chunk=self.weights.chunk)
        return distillation_terms(mine, wanted, batch, only, Scales(self.layer_scales, self.hidden_scale))["kl"]  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        self.tallies = [Tally() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, windows: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        wanted = after(self.base, self.before[1], windows).logits
        self.tallies[dataloader_idx].add(after(self.student, self.before[0], windows).logits, wanted, windows)

    def on_validation_epoch_end(self) -> None:
        for corpus, tally in zip(self.trainer.datamodule.corpora, self.tallies, strict=True):  # type: ignore[attr-defined]
            self.log(f"{corpus.name}/kl", tally.kl)
        for name, value in ({} if self.ask is None else self.ask()).items():
            self.log(name, value, prog_bar=True)


def _layers(seen: Signals) -> Signals:
    """Signals whose `block` term is about states after whole layers: what the objective of all hidden states compares."""
    return replace(seen, block_outputs=seen.streams)
