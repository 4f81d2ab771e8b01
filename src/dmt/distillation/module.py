"""The LightningModule: a student, the stages it goes through, and a teacher that stands beside it, not in it.

Slots that nothing reads get no gradient, so they stay unread. This gives them some: they are asked for what is missing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.distillation.calibration import calibrate_memories, measure_scales
from dmt.distillation.logit_cache import LogitCache
from dmt.distillation.losses import (
    Batch,
    LossScales,
    block_fvu,
    compute_loss_terms,
    next_token_mask,
    outlier_weights,
    sum_weighted_terms,
)
from dmt.distillation.row_sync import RowStoreSync, set_row_targets
from dmt.distributed import all_reduce_mean, all_reduce_sum
from dmt.evaluation.metrics import FidelityMetrics
from dmt.memory import FeaturalMemory
from dmt.memory.featural import ids_to_mask
from dmt.memory.sparsity_budget import reset_counts, update_threshold
from dmt.models.conversion import get_associative_memories, get_featural_memories, get_memories
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
from dmt.training.checkpoints import check_finite, clip_gradients
from dmt.training.trainer import build_adamw, k_schedule, lr_schedule, no_sync


def auxk_error(
    memory: FeaturalMemory,
    dead_slots: Tensor,
    hidden: Tensor,
    residual: Tensor,
    token_weights: Tensor,
) -> Tensor:
    """Squared error, summed over width and tokens, of the dead slots' own forecast of what the memory lacks.

    Args:
        dead: which slots have not been read for long, `(slots,)`.
        hidden: what the memory was given, `(tokens, width)`.
        missing: what its answer lacked, same shape, without gradient. Of the dead slots the k ranked highest are asked.
        counts: what each token counts, `(tokens,)`, see `outliers.share`.

    Source: the auxiliary loss of Gao et al. 2024, arXiv 2406.04093, section 2.4.
    """
    dead_ids = dead_slots.nonzero().flatten()
    if not len(dead_ids):
        return hidden.new_zeros(())
    weights = memory.compute_weights(hidden, memory.compute_scores(hidden))[:, dead_ids]
    ranks = weights.detach().abs() * memory.value_norms()[dead_ids]
    selected = ids_to_mask(
        ranks.topk(min(memory.k, len(dead_ids)), dim=-1, sorted=False).indices, len(dead_ids)
    )
    prediction = (weights * selected) @ memory.values[dead_ids]
    return ((residual - prediction).float().square().sum(-1) * token_weights).sum()


@torch.no_grad()
def update_idle_tokens(memory: FeaturalMemory, idle_tokens: Tensor) -> None:
    """Bring `idle` `(slots,)`, tokens since each slot was read, up to date with `memory.reads`."""
    if memory.read_counts is not None:
        idle_tokens.add_(
            all_reduce_sum(idle_tokens.new_tensor(memory.counted_tokens))
        ).masked_fill_(all_reduce_sum(memory.read_counts) > 0, 0)


SCALE_TOKENS = 4_096
"""Least number of tokens from which the teacher's variances are measured."""
THRESHOLD_RATE = 0.1
"""How fast a shared threshold follows the slots read: too many by a factor f raise it by f to this power a step."""


class DistillationModule(pl.LightningModule):
    """Trains a student to say what its teacher says: `calibrate`, then `layerwise`, then `end_to_end`.

    One training step is one optimiser step. Its batch is computed in pieces of `data.micro_batch_size` windows whose
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
        self._teacher_ref = (teacher,)  # a tuple hides it from the module tree
        layers = student.config.num_hidden_layers
        self.register_buffer("block_scales", torch.ones(layers))
        self.register_buffer("block_limits", torch.full((layers,), torch.inf))
        self.register_buffer("hidden_scale", torch.ones(()))
        if config.loss.revive:
            for layer, memory in get_featural_memories(student).items():
                self.register_buffer(
                    f"idle_{layer}", torch.zeros(memory.num_slots, dtype=torch.long)
                )
        self.row_sync: RowStoreSync | None = None
        self.logit_cache: LogitCache | None = None
        self.val_metrics: list[FidelityMetrics] = []
        self.val_errors: list[Tensor] = []
        self.num_val_windows = 0
        trainable = self.trainable_parameters()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in trainable)

    @property
    def teacher(self) -> PreTrainedModel:
        """The model to be imitated."""
        return self._teacher_ref[0]

    @property
    def scales(self) -> LossScales:
        """Variances of the teacher, measured once before the first step."""
        return LossScales(self.block_scales, self.hidden_scale, self.block_limits)  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.settings.stages.layerwise_steps + self.settings.stages.end_to_end_steps

    def stage_at(self, step: int) -> tuple[str, int, int, float]:
        """Name, step within, length and peak learning rate of the stage that a step belongs to."""
        stages = self.settings.stages
        if step < stages.layerwise_steps:
            return "layerwise", step, stages.layerwise_steps, stages.layerwise_lr
        return (
            "end_to_end",
            step - stages.layerwise_steps,
            stages.end_to_end_steps,
            stages.end_to_end_lr,
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the end-to-end stage may change, by name; the layer-wise stage only ever reaches memories."""
        memory_ids = {
            id(parameter)
            for memory in get_memories(self.student).values()
            for parameter in memory.parameters()
        }
        train_all = self.settings.student.trainable == "all"
        return {
            name: parameter
            for name, parameter in self.student.named_parameters()
            if train_all or id(parameter) in memory_ids
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        value_ids = {id(memory.values) for memory in get_featural_memories(self.student).values()}
        return build_adamw(self.trainable_parameters().values(), self.settings.optim, value_ids)

    def on_fit_start(self) -> None:
        reset_counts(get_featural_memories(self.student).values())
        self.teacher.to(self.device)  # type: ignore[arg-type]

    def calibrate(self, windows: Tensor) -> None:
        """The first stage, without gradient: measure the teacher's variances, then set means, biases and linear maps.

        All of `windows` are for the variances, the first `stages.calibration_tokens` tokens of them for the rest.
        Called once before the first step of a new run; a resumed run finds the results in its checkpoint.
        """
        scales = measure_scales(self.teacher, windows)
        self.block_scales.copy_(scales.block_variances)  # type: ignore[operator]
        self.block_limits.copy_(scales.outlier_norms)  # type: ignore[operator,arg-type]
        self.hidden_scale.copy_(scales.hidden_variance)  # type: ignore[operator]
        if tokens := self.settings.stages.calibration_tokens:
            calibrate_memories(
                self.student, self.teacher, windows[: -(-tokens // windows.shape[1])]
            )

    def training_step(self, batch: Tensor | list[Tensor], batch_idx: int) -> None:
        tokens, window_ids = batch if isinstance(batch, list | tuple) else (batch, None)
        stage, step, stage_steps, peak_lr = self.stage_at(self.global_step)
        optimizer = self.optimizers()
        lr = lr_schedule(step, stage_steps, peak_lr, self.settings.optim)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = lr * group["share"]
        optimizer.zero_grad()  # type: ignore[union-attr]
        writes_rows = self.row_sync is not None and self.row_sync.enable_writes(
            step / stage_steps if stage == "end_to_end" else None
        )
        for memory in get_featural_memories(self.student).values():
            memory.k_multiplier = (
                k_schedule(step, stage_steps, self.settings.stages.k_warmup_factor)
                if stage == "end_to_end"
                else 1.0
            )
        totals: dict[str, Tensor] = {}
        mask = torch.ones_like(tokens, dtype=torch.bool)
        # Processes average their gradients, so each divides by its own share of the step's tokens.
        token_counts = float(mask.sum()), float(next_token_mask(mask).sum())
        for indices in torch.arange(len(tokens)).split(self.settings.data.micro_batch_size):
            micro_batch = Batch(tokens[indices], mask[indices], *token_counts)
            micro_batch_ids = None if window_ids is None else window_ids[indices]
            with no_sync(self, is_last=int(indices[-1]) + 1 == len(tokens)):
                terms = (
                    self._layerwise_terms(micro_batch)
                    if stage == "layerwise"
                    else self._end_to_end_terms(micro_batch, micro_batch_ids)
                )
                self.manual_backward(terms["loss"])
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
        if self.settings.loss.revive and stage == "end_to_end":
            self.update_idle_counters()
        grad_norm, steps_done = (
            clip_gradients(optimizer, self.settings.optim.grad_clip),
            self.global_step,
        )  # type: ignore[arg-type]
        check_finite(
            steps_done + 1,
            totals["loss"],
            grad_norm,
            self.student,
            lambda: self._replay_forward(stage, tokens, mask, token_counts),
        )
        if self.row_sync is not None:
            self.row_sync.dirty = writes_rows
        optimizer.step()  # type: ignore[union-attr]
        update_threshold(get_featural_memories(self.student).values(), rate=THRESHOLD_RATE)
        if self.row_sync is not None and writes_rows:
            self.row_sync.enable_writes(
                None
            )  # what measures the student between steps leaves nothing behind
            self.row_sync.commit_step(steps_done + 1)
        self.log("loss", totals["loss"], prog_bar=True, logger=False)
        if steps_done % self.settings.trainer.log_every == 0 or steps_done == self.total_steps - 1:
            row_metrics = (
                self.row_sync.step_metrics if writes_rows and self.row_sync is not None else {}
            )
            means = all_reduce_mean(torch.stack([value.float() for value in totals.values()]))
            train_metrics = {
                f"{stage}/{name}": value for name, value in zip(totals, means.tolist(), strict=True)
            }
            self._log_metrics({"learning_rate": lr} | train_metrics | row_metrics, steps_done)

    def _replay_forward(
        self, stage: str, tokens: Tensor, mask: Tensor, token_counts: tuple[float, float]
    ) -> None:
        for indices in torch.arange(len(tokens)).split(self.settings.data.micro_batch_size):
            micro_batch = Batch(tokens[indices], mask[indices], *token_counts)
            self._layerwise_terms(micro_batch) if stage == "layerwise" else self._end_to_end_terms(
                micro_batch
            )

    def _log_metrics(self, metrics: dict[str, float], step: int) -> None:
        # Not `self.log`: within one epoch that goes on writing the last value of a stage that is over.
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def _layerwise_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Each memory on the teacher's own block inputs, against the teacher's own block outputs."""
        teacher = forward_teacher(self.teacher, batch.tokens, capture_blocks=True)
        memory_fvu = self._memory_fvu(teacher, batch)
        if self.settings.stages.layerwise_loss == "mse":
            memory_fvu = memory_fvu * self.scales.block_variances[list(get_memories(self.student))]
        return {"loss": memory_fvu.sum()}

    def _end_to_end_terms(
        self, batch: Batch, window_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        weights = self.settings.loss
        if self.logit_cache is not None and window_ids is not None:
            cached = self.logit_cache.read(window_ids, self.device)
            terms = compute_loss_terms(
                forward_with_activations(self.student, batch.tokens),
                cached,
                batch,
                weights,
                self.scales,
            )
            return {"loss": sum_weighted_terms(terms, weights), **terms}
        capture_blocks = bool(weights.block_fvu or weights.revive or self.row_sync)
        teacher = forward_teacher(self.teacher, batch.tokens, capture_blocks=capture_blocks)
        if weights.revive:
            for memory in get_featural_memories(self.student).values():
                if memory.read_counts is None:  # else an earlier piece of this step began
                    memory.count_reads()
        student = forward_with_activations(
            self.student, batch.tokens, capture_blocks=capture_blocks
        )
        set_row_targets(self.student, self.teacher, student, teacher)
        terms = compute_loss_terms(
            student, teacher, batch, weights, self.scales, list(get_memories(self.student))
        )
        if weights.revive:
            terms["revive"] = self._auxk_loss(student, teacher, batch)
        return {"loss": sum_weighted_terms(terms, weights), **terms}

    def _auxk_loss(self, student: ForwardOutputs, teacher: ForwardOutputs, batch: Batch) -> Tensor:
        """Mean over memories of how badly their dead slots forecast what they lack, a fraction of variance."""
        errors = []
        for layer, memory in get_featural_memories(self.student).items():
            idle_tokens = self.get_buffer(f"idle_{layer}")
            # Without gradient, so that nobody but the dead is moved by it.
            hidden, outputs = (
                states[layer][batch.mask].detach()
                for states in (student.block_inputs, student.block_outputs)
            )
            residual = teacher.block_outputs[layer][batch.mask] - outputs
            token_weights = outlier_weights(
                teacher.block_outputs[layer][batch.mask], self.scales.outlier_norms[layer]
            )  # type: ignore[index]
            error = auxk_error(
                memory,
                idle_tokens >= self.settings.loss.revive_after,
                hidden,
                residual,
                token_weights,
            )
            errors.append(error / batch.tokens_in_step / self.scales.block_variances[layer])
        return torch.stack(errors).mean()

    def update_idle_counters(self) -> None:
        """End a step of revival: slots that none of its pieces read have been idle for longer. In all processes at once."""
        for layer, memory in get_featural_memories(self.student).items():
            update_idle_tokens(memory, self.get_buffer(f"idle_{layer}"))
            memory.read_counts = None

    def on_validation_start(self) -> None:
        self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]
        self.val_errors, self.num_val_windows = [], 0

    def validation_step(self, tokens: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        teacher = forward_teacher(self.teacher, tokens, capture_blocks=True)
        self.val_metrics[dataloader_idx].update(
            forward_with_activations(self.student, tokens).logits, teacher.logits, tokens
        )
        self.val_errors.append(self._memory_fvu(teacher, Batch.full_step(tokens)) * len(tokens))
        self.num_val_windows += len(tokens)

    def _memory_fvu(self, teacher: ForwardOutputs, batch: Batch) -> Tensor:
        """Error of each memory on the teacher's own block inputs, a fraction of variance, `(memories,)`."""
        memories = get_memories(self.student)
        layers = list(memories)
        outputs = []
        for layer, memory in memories.items():
            slot_memory = get_featural_memories(self.student).get(layer)
            saved_reads = None if slot_memory is None else slot_memory.read_counts
            if slot_memory is not None:
                slot_memory.read_counts = (
                    None  # usage is counted in the student's own pass, not in this one
                )
            outputs.append(memory(teacher.block_inputs[layer]))
            if slot_memory is not None:
                slot_memory.read_counts = saved_reads
        targets = tuple(teacher.block_outputs[layer] for layer in layers)
        scales = LossScales(
            self.scales.block_variances[layers],
            self.scales.hidden_variance,
            self.scales.outlier_norms[layers],
        )  # type: ignore[index]
        return block_fvu(tuple(outputs), targets, batch.mask, batch.tokens_in_step, scales)

    def on_validation_epoch_end(self) -> None:
        for corpus, rank_metrics in zip(
            self.trainer.datamodule.corpora, self.val_metrics, strict=True
        ):  # type: ignore[attr-defined]
            metrics = rank_metrics.all_reduce()
            for name in ("kl", "ppl_ratio", "top1_agreement", "student_perplexity", "teacher_perplexity"):
                self.log(f"{corpus.name}/{name}", getattr(metrics, name), sync_dist=True)
        errors = all_reduce_sum(torch.stack(self.val_errors).sum(0)) / all_reduce_sum(
            torch.tensor(self.num_val_windows)
        ).to(self.device)
        for layer, error in zip(get_memories(self.student), errors, strict=True):
            self.log(f"block_error/layer_{layer}", error, sync_dist=True)

    def close(self) -> None:
        """Let go of the store, where there is one."""
        if self.row_sync is not None:
            self.row_sync.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        teacher_keys = [name for name in checkpoint["state_dict"] if "teacher" in name]
        assert not teacher_keys, f"the teacher must be in no checkpoint, found {teacher_keys[:3]}"
        if (
            self.row_sync is not None
        ):  # rows are in the store; the checkpoint says which of them, and where they lie
            for name in self._row_state_keys():
                del checkpoint["state_dict"][name]
            checkpoint["rows"] = self.row_sync.checkpoint_state(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.row_sync is not None:
            self.row_sync.restore_checkpoint(checkpoint["global_step"], checkpoint["rows"])
            own_state = self.state_dict()
            checkpoint["state_dict"] |= {name: own_state[name] for name in self._row_state_keys()}

    def _row_state_keys(self) -> list[str]:
        """Names, in the state, of the tensors that hold stored rows."""
        row_tensors = [
            tensor
            for memory in get_associative_memories(self.student).values()
            for tensor in memory.rows.buffers()
        ]
        return [
            name
            for name, tensor in self.state_dict(keep_vars=True).items()
            if any(tensor is row_tensor for row_tensor in row_tensors)
        ]
