"""The LightningModule: a student, the stages it goes through, and a teacher that stands beside it, not in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.distill.cached import TeacherCache
from dmt.distill.calibrate import calibrate, measure_scales
from dmt.distill.finite import check_finite, clipped
from dmt.distill.keeper import Keeper
from dmt.distill.lessons import teach
from dmt.distill.losses import Batch, Scales, block_errors, distillation_terms, next_token_mask, weighted_sum
from dmt.distill.outliers import share
from dmt.distill.revive import count_idle, revival_error
from dmt.distill.signals import Signals, observe, observe_teacher
from dmt.distill.stepping import adamw, gradients_apart, learning_rate, widening
from dmt.evaluate import Tally
from dmt.memory.budget import hold, watch
from dmt.memory.together import averaged, summed
from dmt.models.surgery import associative_of, featural_of, memories_of

SCALE_TOKENS = 4_096
"""Least number of tokens from which the teacher's variances are measured."""
HOLD_RATE = 0.1
"""How fast a shared threshold follows the slots read: too many by a factor f raise it by f to this power a step."""


class Distiller(pl.LightningModule):
    """Trains a student to say what its teacher says: `calibrate`, then `layerwise`, then `end_to_end`.

    One training step is one optimiser step. Its batch is computed in pieces of `data.micro_batch` windows whose
    gradients add up to that of the whole, so memory is a setting and the result is not.

    Args:
        config: every setting of the run.
        student: a model from `transplant`.
        teacher: in eval mode; kept out of the module tree, so it is in no checkpoint and `.train()` never reaches it.
    """

    def __init__(self, config: Config, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.save_hyperparameters({"config": asdict(config)})
        self.automatic_optimization = False
        self.settings = config
        self.student = student
        self._outside = (teacher,)  # a tuple hides it from the module tree
        layers = student.config.num_hidden_layers
        self.register_buffer("block_scales", torch.ones(layers))
        self.register_buffer("block_limits", torch.full((layers,), torch.inf))
        self.register_buffer("hidden_scale", torch.ones(()))
        if config.loss.revive:
            for layer, memory in featural_of(student).items():
                self.register_buffer(f"idle_{layer}", torch.zeros(memory.slots, dtype=torch.long))
        self.keeper: Keeper | None = None
        self.cache: TeacherCache | None = None
        self.tallies: list[Tally] = []
        self.errors: list[Tensor] = []
        self.validated = 0
        trainable = self.trainable()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in trainable)

    @property
    def teacher(self) -> PreTrainedModel:
        """The model to be imitated."""
        return self._outside[0]

    @property
    def scales(self) -> Scales:
        """Variances of the teacher, measured once before the first step."""
        return Scales(self.block_scales, self.hidden_scale, self.block_limits)  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.settings.stages.layerwise_steps + self.settings.stages.end_to_end_steps

    def stage_at(self, step: int) -> tuple[str, int, int, float]:
        """Name, step within, length and peak learning rate of the stage that a step belongs to."""
        stages = self.settings.stages
        if step < stages.layerwise_steps:
            return "layerwise", step, stages.layerwise_steps, stages.layerwise_lr
        return "end_to_end", step - stages.layerwise_steps, stages.end_to_end_steps, stages.end_to_end_lr

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the end-to-end stage may change, by name; the layer-wise stage only ever reaches memories."""
        memory = {id(p) for m in memories_of(self.student).values() for p in m.parameters()}
        everything = self.settings.student.trainable == "all"
        return {n: p for n, p in self.student.named_parameters() if everything or id(p) in memory}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        values = {id(memory.values) for memory in featural_of(self.student).values()}
        return adamw(self.trainable().values(), self.settings.optim, values)

    def on_fit_start(self) -> None:
        watch(featural_of(self.student).values())
        self.teacher.to(self.device)  # type: ignore[arg-type]

    def calibrate(self, windows: Tensor) -> None:
        """The first stage, without gradient: measure the teacher's variances, then set means, biases and linear maps.

        All of `windows` are for the variances, the first `stages.calibrate_tokens` tokens of them for the rest.
        Called once before the first step of a new run; a resumed run finds the results in its checkpoint.
        """
        scales = measure_scales(self.teacher, windows)
        self.block_scales.copy_(scales.blocks)  # type: ignore[operator]
        self.block_limits.copy_(scales.limits)  # type: ignore[operator,arg-type]
        self.hidden_scale.copy_(scales.hidden)  # type: ignore[operator]
        if tokens := self.settings.stages.calibrate_tokens:
            calibrate(self.student, self.teacher, windows[: -(-tokens // windows.shape[1])])

    def training_step(self, given: Tensor | list[Tensor], batch_idx: int) -> None:
        tokens, numbers = given if isinstance(given, list | tuple) else (given, None)
        stage, step, length, peak = self.stage_at(self.global_step)
        optimizer = self.optimizers()
        rate = learning_rate(step, length, peak, self.settings.optim)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * group["share"]
        optimizer.zero_grad()  # type: ignore[union-attr]
        writing = self.keeper is not None and self.keeper.write(step / length if stage == "end_to_end" else None)
        for memory in featural_of(self.student).values():
            memory.widened = widening(step, length, self.settings.stages.k_start) if stage == "end_to_end" else 1.0
        logged: dict[str, Tensor] = {}
        mask = torch.ones_like(tokens, dtype=torch.bool)
        # Processes average their gradients, so each divides by its own share of the step's tokens.
        counts = float(mask.sum()), float(next_token_mask(mask).sum())
        for rows in torch.arange(len(tokens)).split(self.settings.data.micro_batch):
            batch = Batch(tokens[rows], mask[rows], *counts)
            asked = None if numbers is None else numbers[rows]
            with gradients_apart(self, until=int(rows[-1]) + 1 == len(tokens)):
                terms = self._layerwise(batch) if stage == "layerwise" else self._end_to_end(batch, asked)
                self.manual_backward(terms["loss"])
            for name, value in terms.items():
                logged[name] = logged.get(name, torch.zeros_like(value)) + value.detach()
        if self.settings.loss.revive and stage == "end_to_end":
            self.count_idle()
        norm, done = clipped(optimizer, self.settings.optim.clip), self.global_step  # type: ignore[arg-type]
        check_finite(done + 1, logged["loss"], norm, self.student, lambda: self._again(stage, tokens, mask, counts))
        if self.keeper is not None:
            self.keeper.unsettled = writing
        optimizer.step()  # type: ignore[union-attr]
        hold(featural_of(self.student).values(), rate=HOLD_RATE)
        if self.keeper is not None and writing:
            self.keeper.write(None)  # what measures the student between steps leaves nothing behind
            self.keeper.settle(done + 1)
        self.log("loss", logged["loss"], prog_bar=True, logger=False)
        if done % self.settings.trainer.log_every == 0 or done == self.total_steps - 1:
            stored = self.keeper.written if writing and self.keeper is not None else {}
            means = averaged(torch.stack([value.float() for value in logged.values()]))
            found = {f"{stage}/{name}": value for name, value in zip(logged, means.tolist(), strict=True)}
            self._write({"learning_rate": rate} | found | stored, done)

    def _again(self, stage: str, tokens: Tensor, mask: Tensor, counts: tuple[float, float]) -> None:
        for rows in torch.arange(len(tokens)).split(self.settings.data.micro_batch):
            batch = Batch(tokens[rows], mask[rows], *counts)
            self._layerwise(batch) if stage == "layerwise" else self._end_to_end(batch)

    def _write(self, values: dict[str, float], step: int) -> None:
        # Not `self.log`: within one epoch that goes on writing the last value of a stage that is over.
        for logger in self.loggers:
            logger.log_metrics(values, step)

    def _layerwise(self, batch: Batch) -> dict[str, Tensor]:
        """Each memory on the teacher's own block inputs, against the teacher's own block outputs."""
        teacher = observe_teacher(self.teacher, batch.tokens, blocks=True)
        errors = self._memory_errors(teacher, batch)
        if self.settings.stages.layerwise_loss == "mse":
            errors = errors * self.scales.blocks[list(memories_of(self.student))]
        return {"loss": errors.sum()}

    def _end_to_end(self, batch: Batch, numbers: Tensor | None = None) -> dict[str, Tensor]:
        weights = self.settings.loss
        if self.cache is not None and numbers is not None:
            kept = self.cache.read(numbers, self.device)
            terms = distillation_terms(observe(self.student, batch.tokens), kept, batch, weights, self.scales)
            return {"loss": weighted_sum(terms, weights), **terms}
        blocks = bool(weights.block or weights.revive or self.keeper)
        teacher = observe_teacher(self.teacher, batch.tokens, blocks=blocks)
        if weights.revive:
            for memory in featural_of(self.student).values():
                if memory.reads is None:  # else an earlier piece of this step began
                    memory.count_reads()
        student = observe(self.student, batch.tokens, blocks=blocks)
        teach(self.student, self.teacher, student, teacher)
        terms = distillation_terms(student, teacher, batch, weights, self.scales, list(memories_of(self.student)))
        if weights.revive:
            terms["revive"] = self._revival(student, teacher, batch)
        return {"loss": weighted_sum(terms, weights), **terms}

    def _revival(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Mean over memories of how badly their dead slots forecast what they lack, a fraction of variance."""
        errors = []
        for layer, memory in featural_of(self.student).items():
            idle = self.get_buffer(f"idle_{layer}")
            # Without gradient, so that nobody but the dead is moved by it.
            hidden, said = (states[layer][batch.mask].detach() for states in (student.block_inputs, student.block_outputs))
            missing = teacher.block_outputs[layer][batch.mask] - said
            counts = share(teacher.block_outputs[layer][batch.mask], self.scales.limits[layer])  # type: ignore[index]
            error = revival_error(memory, idle >= self.settings.loss.revive_after, hidden, missing, counts)
            errors.append(error / batch.tokens_in_step / self.scales.blocks[layer])
        return torch.stack(errors).mean()

    def count_idle(self) -> None:
        """End a step of revival: slots that none of its pieces read have been idle for longer. In all processes at once."""
        for layer, memory in featural_of(self.student).items():
            count_idle(memory, self.get_buffer(f"idle_{layer}"))
            memory.reads = None

    def on_validation_start(self) -> None:
        self.tallies = [Tally() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]
        self.errors, self.validated = [], 0

    def validation_step(self, tokens: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        teacher = observe_teacher(self.teacher, tokens, blocks=True)
        self.tallies[dataloader_idx].add(observe(self.student, tokens).logits, teacher.logits, tokens)
        self.errors.append(self._memory_errors(teacher, Batch.whole(tokens)) * len(tokens))
        self.validated += len(tokens)

    def _memory_errors(self, teacher: Signals, batch: Batch) -> Tensor:
        """Error of each memory on the teacher's own block inputs, a fraction of variance, `(memories,)`."""
        memories = memories_of(self.student)
        layers = list(memories)
        said = []
        for layer, memory in memories.items():
            slots = featural_of(self.student).get(layer)
            counted = None if slots is None else slots.reads
            if slots is not None:
                slots.reads = None  # usage is counted in the student's own pass, not in this one
            said.append(memory(teacher.block_inputs[layer]))
            if slots is not None:
                slots.reads = counted
        wanted = tuple(teacher.block_outputs[layer] for layer in layers)
        scales = Scales(self.scales.blocks[layers], self.scales.hidden, self.scales.limits[layers])  # type: ignore[index]
        return block_errors(tuple(said), wanted, batch.mask, batch.tokens_in_step, scales)

    def on_validation_epoch_end(self) -> None:
        for corpus, mine in zip(self.trainer.datamodule.corpora, self.tallies, strict=True):  # type: ignore[attr-defined]
            tally = mine.of_all()
            for name in ("kl", "ratio", "agreement", "student_perplexity", "teacher_perplexity"):
                self.log(f"{corpus.name}/{name}", getattr(tally, name), sync_dist=True)
        errors = summed(torch.stack(self.errors).sum(0)) / summed(torch.tensor(self.validated)).to(self.device)
        for layer, error in zip(memories_of(self.student), errors, strict=True):
            self.log(f"block_error/layer_{layer}", error, sync_dist=True)

    def close(self) -> None:
        """Let go of the store, where there is one."""
        if self.keeper is not None:
            self.keeper.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stray = [name for name in checkpoint["state_dict"] if "teacher" in name]
        assert not stray, f"the teacher must be in no checkpoint, found {stray[:3]}"
        if self.keeper is not None:  # rows are in the store; the checkpoint says which of them, and where they lie
            for name in self._row_names():
                del checkpoint["state_dict"][name]
            checkpoint["rows"] = self.keeper.state(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.keeper is not None:
            self.keeper.restore(checkpoint["global_step"], checkpoint["rows"])
            mine = self.state_dict()
            checkpoint["state_dict"] |= {name: mine[name] for name in self._row_names()}

    def _row_names(self) -> list[str]:
        """Names, in the state, of the tensors that hold stored rows."""
        tensors = [tensor for memory in associative_of(self.student).values() for tensor in memory.rows.buffers()]
        return [name for name, tensor in self.state_dict(keep_vars=True).items() if any(tensor is mine for mine in tensors)]
