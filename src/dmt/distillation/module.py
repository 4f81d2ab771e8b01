"""The LightningModule that distills a teacher into a student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.declared_text import DeclaredText
from dmt.data.windows import TextDataModule
from dmt.distillation.logit_cache import LogitCache
from dmt.distillation.losses import (
    Batch,
    DeclaredAnswers,
    LossScales,
    block_fvu,
    compute_loss_terms,
    measure_scales,
    select_layers,
    sum_weighted_terms,
)
from dmt.distillation.row_sync import RowStoreSync, set_row_targets
from dmt.distributed import all_reduce_mean, all_reduce_sum, is_distributed
from dmt.errors import UserError
from dmt.evaluation.metrics import FidelityMetrics
from dmt.memory.lookup_table import LookupTable
from dmt.memory.sparsity_budget import reset_counts, update_threshold
from dmt.memory.token_context import use_contexts
from dmt.models.calibration import calibrate_memories
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
from dmt.models.memories import (
    get_associative_memories,
    get_featural_memories,
    get_memories,
    get_slot_memories,
    list_student_contexts,
)
from dmt.ops import kl
from dmt.training.module import TrainingModule
from dmt.training.optimization import build_adamw, k_schedule, lr_schedule

SCALE_TOKENS = 4_096  # minimum number of tokens from which the teacher's variances are measured
# Rate at which a shared threshold follows the slots read: too many by a factor f raise it by f to
# the power of this rate in each step.
THRESHOLD_RATE = 0.1
FIDELITY_METRICS = (
    "kl",
    "ppl_ratio",
    "top1_agreement",
    "student_perplexity",
    "teacher_perplexity",
)


class DistillationModule(TrainingModule):
    """Train a student to predict what its teacher predicts, layer by layer, then end to end.

    Works in any Lightning `Trainer`: with `dmt.data.windows.TextDataModule` or with data loaders of
    your own, any logger and any callbacks. A batch is token ids `(windows, time)`, a pair of token
    ids and window indices `(windows,)` (see `LogitCache`), or a dict with `input_ids` and, where
    rows are padded, `attention_mask`. Other keys are not read: targets are what the teacher
    predicts, so `labels` have no effect. One training step is one optimizer step, computed in
    micro-batches of at most `data.micro_batch_size` windows of equal length; no model sees padding.
    Call `calibrate` once before the first step. Training stops after `total_steps` steps:

        student, _ = dmt.models.conversion.convert_blocks(teacher, memories)
        module = DistillationModule(config, student, teacher)
        module.calibrate(windows)
        trainer = pl.Trainer(logger=my_logger)
        trainer.fit(module, train_loader, {"news": val_loader})

    Validation metrics are logged as `val/<corpus>/<metric>`: the corpora of a `TextDataModule`, the
    keys of a dict of loaders, or `data` (`data_0`, `data_1`, ... of several).

    `load_from_checkpoint(path, student=..., teacher=...)` loads what a Trainer saved; `student` is
    converted like the one that was trained, and its weights are replaced.

    Args:
        config: settings of the run, or their dict in a checkpoint; `stages`, `loss`, `optim`,
            `student`, `data.micro_batch_size` and `trainer.log_every` are read here.
        student: a model whose feed-forward blocks were replaced by `convert_blocks`.
        teacher: the model to imitate, in eval mode. It is kept outside the module tree: no
            checkpoint contains it and `.train()` does not reach it.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        student: PreTrainedModel,
        teacher: PreTrainedModel,
    ) -> None:
        super().__init__(config)
        self.student = student
        self._teacher_ref = (teacher,)  # a tuple hides it from the module tree
        layers = student.config.num_hidden_layers
        self.register_buffer("block_scales", torch.ones(layers))
        self.register_buffer("block_limits", torch.full((layers,), torch.inf))
        self.register_buffer("hidden_scale", torch.ones(()))
        self.row_sync: RowStoreSync | None = None
        self.logit_cache: LogitCache | None = None
        self.declared_text: DeclaredText | None = None
        self.val_metrics: list[FidelityMetrics] = []
        self.val_errors: list[Tensor] = []
        self.num_val_tokens = 0
        self._writes_rows = False
        trainable = self.trainable_parameters()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in trainable)

    @property
    def teacher(self) -> PreTrainedModel:
        """The model to imitate."""
        return self._teacher_ref[0]

    @property
    def trained_model(self) -> PreTrainedModel:
        """The student."""
        return self.student

    @property
    def scales(self) -> LossScales:
        """Variances of the teacher, measured once before the first step."""
        return LossScales(self.block_scales, self.hidden_scale, self.block_limits)  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.settings.stages.layerwise_steps + self.settings.stages.end_to_end_steps

    def stage_at(self, step: int) -> tuple[str, int, int, float]:
        """Return the stage of a step: its name, the step within it, its length, its peak rate."""
        stages = self.settings.stages
        if step < stages.layerwise_steps:
            return "layerwise", step, stages.layerwise_steps, stages.layerwise_lr
        step -= stages.layerwise_steps
        return "end_to_end", step, stages.end_to_end_steps, stages.end_to_end_lr

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the end-to-end stage changes, by name.

        The layerwise stage changes the memories only.
        """
        memory_ids = {
            id(parameter)
            for memory in get_memories(self.student).values()
            for parameter in memory.parameters()
        }
        train_all = self.settings.student.trainable == "all"
        return {
            name: parameter
            for name, parameter in self.student.named_parameters()
            if parameter.requires_grad and (train_all or id(parameter) in memory_ids)
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters."""
        value_ids = {id(memory.values) for memory in get_slot_memories(self.student).values()}
        table_ids = {
            id(parameter)
            for module in self.student.modules()
            if isinstance(module, LookupTable)
            for parameter in module.parameters()
        }
        return build_adamw(
            self.trainable_parameters().values(), self.settings.optim, value_ids, table_ids
        )

    def on_fit_start(self) -> None:
        """Put the student into training mode and the teacher on its device."""
        reset_counts(get_featural_memories(self.student).values())
        self.student.train()  # a converted student is in eval mode
        self.teacher.to(self.device)  # type: ignore[arg-type]

    def calibrate(self, windows: Tensor) -> None:
        """Measure the teacher's variances, then set means, biases and linear maps of the memories.

        This stage needs no gradient. Call it once before the first step of a new run; a resumed run
        reads the results from its checkpoint.

        Args:
            windows: token ids `(windows, time)`. All of them are used for the variances, the first
                `stages.calibration_tokens` tokens for the rest.
        """
        scales = measure_scales(self.teacher, windows)
        self.block_scales.copy_(scales.block_variances)  # type: ignore[operator]
        self.block_limits.copy_(scales.outlier_norms)  # type: ignore[operator,arg-type]
        self.hidden_scale.copy_(scales.hidden_variance)  # type: ignore[operator]
        if tokens := self.settings.stages.calibration_tokens:
            num_windows = -(-tokens // windows.shape[1])
            calibrate_memories(self.student, self.teacher, windows[:num_windows])

    def get_lr(self, step: int) -> float:
        """Return the learning rate of a step in the schedule of its stage."""
        _, stage_step, stage_steps, peak_lr = self.stage_at(step)
        return lr_schedule(stage_step, stage_steps, peak_lr, self.settings.optim)

    @contextmanager
    def step_context(self, step: int) -> Iterator[None]:
        """Set how many slots are read and whether rows are written in this step."""
        stage, stage_step, stage_steps, _ = self.stage_at(step)
        end_to_end = stage == "end_to_end"
        k_warmup_factor = self.settings.stages.k_warmup_factor
        k_factor = (
            k_schedule(stage_step, stage_steps, k_warmup_factor) if end_to_end else k_warmup_factor
        )
        progress = stage_step / stage_steps if end_to_end else None
        with ExitStack() as stack:
            for memory in get_featural_memories(self.student).values():
                stack.enter_context(memory.scaled_k(k_factor))
            self._writes_rows = self.row_sync is not None and stack.enter_context(
                self.row_sync.writes_enabled(progress)
            )
            yield

    def split_batch(self, batch: Any) -> Sequence[Batch]:
        """Split token ids into micro-batches that count the tokens of the whole step."""
        tokens, attention_mask, window_ids = self._read_batch(batch)
        groups = _remove_padding(tokens, attention_mask)
        num_tokens = float(sum(group.numel() for group in groups))
        num_targets = num_tokens - sum(len(group) for group in groups)
        if attention_mask is not None and is_distributed():
            # Processes average their gradients, and they may have different numbers of tokens.
            counts = torch.tensor([num_tokens, num_targets], device=tokens.device)
            num_tokens, num_targets = all_reduce_mean(counts).tolist()
        size = self.settings.data.micro_batch_size
        if self.declared_text is not None and window_ids is not None:
            return self._split_declared(tokens, window_ids, num_tokens, num_targets)
        return [
            Batch(
                group[start : start + size],
                torch.ones_like(group[start : start + size], dtype=torch.bool),
                num_tokens,
                num_targets,
                window_ids=None if window_ids is None else window_ids[start : start + size],
            )
            for group in groups
            for start in range(0, len(group), size)
        ]

    def _split_declared(
        self, tokens: Tensor, window_ids: Tensor, num_tokens: float, num_targets: float
    ) -> list[Batch]:
        """Split windows of text with declared facts; their subjects are replaced."""
        assert self.declared_text is not None, "checked by the caller"
        size = self.settings.data.micro_batch_size
        parts = [
            (part_ids, *self.declared_text.replace_subjects(part_ids, self.global_step))
            for part_ids in window_ids.cpu().split(size)
        ]
        return [
            Batch(
                replaced.to(tokens.device),
                torch.ones_like(part_tokens, dtype=torch.bool),
                num_tokens,
                num_targets,
                part_ids,
                DeclaredAnswers(part_tokens, positions),
            )
            for (part_ids, replaced, positions), part_tokens in zip(
                parts, tokens.split(size), strict=True
            )
        ]

    def _read_batch(self, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the parts of a batch, see `_unpack_batch`, of windows that the models can read."""
        tokens, attention_mask, window_ids = _unpack_batch(batch)
        max_length = self.student.config.max_position_embeddings
        if tokens.shape[1] > max_length:
            raise UserError(
                f"a batch has windows of {tokens.shape[1]:,} tokens, the model reads "
                f"{max_length:,} at most; cut the texts into shorter windows"
            )
        return tokens, attention_mask, window_ids

    def compute_terms(self, micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and terms of the stage that the current step belongs to."""
        if self.stage_at(self.global_step)[0] == "layerwise":
            return self.layerwise_loss(micro_batch)
        return self.end_to_end_loss(micro_batch)

    def before_update(self, step: int) -> None:
        """Mark the row store as incomplete until the step is committed."""
        if self.row_sync is not None:
            self.row_sync.dirty = self._writes_rows

    def after_update(self, step: int) -> None:
        """Move the shared threshold and commit the rows of the step."""
        update_threshold(get_featural_memories(self.student).values(), rate=THRESHOLD_RATE)
        if self.row_sync is not None and self._writes_rows:
            self.row_sync.commit_step(step + 1)

    def extra_metrics(self) -> dict[str, float]:
        """Return what the step wrote to the row store."""
        if self.row_sync is None or not self._writes_rows:
            return {}
        return self.row_sync.step_metrics

    def layerwise_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare every memory with its block, both on the teacher's block inputs."""
        teacher = forward_teacher(self.teacher, batch.tokens, capture_blocks=True)
        errors = self._memory_fvu(teacher, batch)
        if self.settings.stages.layerwise_loss == "mse":
            layers = list(get_memories(self.student))
            errors = errors * select_layers(self.scales.block_variances, layers)
        loss = errors.sum()
        return loss, {"layerwise_loss": loss}

    def end_to_end_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare the student with the teacher, or with the cached distributions of its windows."""
        weights = self.settings.loss
        if self.logit_cache is not None and batch.window_ids is not None:
            cached = self.logit_cache.read(batch.window_ids, self.device)
            student = forward_with_activations(self.student, batch.tokens)
            terms = compute_loss_terms(student, cached, batch, weights, self.scales)
        else:
            capture_blocks = bool(weights.block_fvu or weights.extra or self.row_sync)
            teacher = forward_teacher(self.teacher, batch.tokens, capture_blocks=capture_blocks)
            student = forward_with_activations(
                self.student, batch.tokens, capture_blocks=capture_blocks
            )
            set_row_targets(self.student, self.teacher, student, teacher)
            layers = list(get_memories(self.student))
            terms = compute_loss_terms(student, teacher, batch, weights, self.scales, layers)
        loss = sum_weighted_terms(terms, weights)
        if batch.declared is not None and (weight := self.settings.knowledge.weight):
            terms["knowledge"] = self._declared_loss(batch.declared, teacher) / batch.tokens_in_step
            loss = loss + weight * terms["knowledge"]
        return loss, {"loss": loss, **terms}

    def _declared_loss(self, declared: DeclaredAnswers, teacher: ForwardOutputs) -> Tensor:
        """Compare the student, asked about declared subjects, with the teacher about strangers.

        Args:
            declared: the text with its subjects, and where it asks for their facts.
            teacher: outputs for the same text with other subjects.
        """
        positions = declared.positions
        device = declared.tokens.device
        if not len(positions.windows):
            return torch.zeros((), device=device)
        rows, row_numbers = positions.windows.unique(return_inverse=True)
        with self._usage_paused():  # no row may hold a declared subject
            student = forward_with_activations(self.student, declared.tokens[rows.to(device)])
        hidden = student.hidden[row_numbers.to(device), positions.columns.to(device)]
        target = teacher.hidden[positions.windows.to(device), positions.replaced_columns.to(device)]
        weights = self.settings.loss
        divergence = kl(student.head(hidden), teacher.head(target), weights.temperature)
        error = (hidden.float() - target.float()).square().sum(-1) / self.scales.hidden_variance
        values = weights.kl * divergence + weights.hidden_mse * error
        return values.sum()

    @contextmanager
    def _usage_paused(self) -> Iterator[None]:
        """Count no reads and write no rows, which the student's own forward pass does."""
        memories: tuple[Any, ...] = (
            *get_slot_memories(self.student).values(),
            *get_associative_memories(self.student).values(),
        )
        with ExitStack() as stack:
            for memory in memories:
                stack.enter_context(memory.usage_paused())
            yield

    def _memory_fvu(self, teacher: ForwardOutputs, batch: Batch) -> Tensor:
        """Return each memory's error on the teacher's block inputs, a fraction of variance."""
        memories = get_memories(self.student)
        layers = list(memories)
        with ExitStack() as stack:
            stack.enter_context(self._usage_paused())
            stack.enter_context(use_contexts(list_student_contexts(self.student, batch.tokens)))
            outputs = tuple(
                memory(teacher.block_inputs[layer]) for layer, memory in memories.items()
            )
        targets = tuple(teacher.block_outputs[layer] for layer in layers)
        scales = self.scales
        assert scales.outlier_norms is not None, "registered in the constructor"
        layer_scales = LossScales(
            select_layers(scales.block_variances, layers),
            scales.hidden_variance,
            select_layers(scales.outlier_norms, layers),
        )
        return block_fvu(outputs, targets, batch.mask, batch.tokens_in_step, layer_scales)

    def _val_names(self) -> list[str]:
        """Return the names of the validation loaders."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, TextDataModule):
            return [corpus.name for corpus in datamodule.corpora]
        loaders = self.trainer.val_dataloaders
        if isinstance(loaders, dict):
            return list(loaders)
        if isinstance(loaders, list | tuple) and len(loaders) > 1:
            return [f"data_{index}" for index in range(len(loaders))]
        return ["data"]

    def on_validation_start(self) -> None:
        """Start new sums for every validation loader."""
        self.teacher.to(self.device)  # type: ignore[arg-type]
        self.val_metrics = [FidelityMetrics() for _ in self._val_names()]
        self.val_errors, self.num_val_tokens = [], 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the sums of its loader."""
        tokens, attention_mask, _ = self._read_batch(batch)
        for group in _remove_padding(tokens, attention_mask):
            teacher = forward_teacher(self.teacher, group, capture_blocks=True)
            student = forward_with_activations(self.student, group)
            self.val_metrics[dataloader_idx].update(student.logits, teacher.logits, group)
            errors = self._memory_fvu(teacher, Batch.full_step(group))
            self.val_errors.append(errors * group.numel())
            self.num_val_tokens += group.numel()

    def on_validation_epoch_end(self) -> None:
        """Log fidelity by corpus and the error of each memory."""
        for corpus, rank_metrics in zip(self._val_names(), self.val_metrics, strict=True):
            metrics = rank_metrics.all_reduce()
            if not metrics.tokens:
                raise UserError(
                    f"the validation loader {corpus} has no window of two tokens; give it more text"
                )
            for name in FIDELITY_METRICS:
                self.log(f"val/{corpus}/{name}", getattr(metrics, name), sync_dist=True)
        num_tokens = all_reduce_sum(torch.tensor(self.num_val_tokens)).to(self.device)
        errors = all_reduce_sum(torch.stack(self.val_errors).sum(0)) / num_tokens
        for layer, error in zip(get_memories(self.student), errors, strict=True):
            self.log(f"val/fvu/layer_{layer}", error, sync_dist=True)

    def close(self) -> None:
        """Close the row store, if there is one."""
        if self.row_sync is not None:
            self.row_sync.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave stored rows out of the checkpoint; they are in the store."""
        teacher_keys = [name for name in checkpoint["state_dict"] if "teacher" in name]
        assert not teacher_keys, f"no checkpoint may contain the teacher, got {teacher_keys[:3]}"
        if self.row_sync is not None:
            # Rows are in the store; the checkpoint holds their ids and their order.
            for name in self._row_state_keys():
                del checkpoint["state_dict"][name]
            checkpoint["rows"] = self.row_sync.checkpoint_state(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore stored rows as of the step of the checkpoint."""
        if self.row_sync is not None:
            self.row_sync.restore_checkpoint(checkpoint["global_step"], checkpoint["rows"])
            own_state = self.state_dict()
            checkpoint["state_dict"] |= {name: own_state[name] for name in self._row_state_keys()}
        elif "rows" in checkpoint:
            raise UserError(
                "the stored rows of this checkpoint are in the store of its run; resume with "
                "dmt distill --resume RUN, or load the run's student with dmt.load"
            )

    def _row_state_keys(self) -> list[str]:
        """Return the names of the tensors in the state that hold stored rows."""
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


def _unpack_batch(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return token ids `(windows, time)`, their attention mask and window indices, if any.

    Raises:
        UserError: the batch has another form.
    """
    attention_mask = window_ids = None
    if isinstance(batch, list | tuple):
        tokens, *rest = batch or [None]
        if rest:
            window_ids = rest[0]
        if len(rest) > 1 or (rest and getattr(window_ids, "shape", None) != (len(tokens),)):
            raise UserError(
                "a batch of several tensors must be token ids (windows, time) and window indices "
                f"(windows,), got {_describe(batch)}; pass an attention mask in a dict of "
                "input_ids and attention_mask"
            )
    elif isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise UserError(
                f"a batch needs the key input_ids, got {', '.join(map(str, batch))}; "
                "pass token ids (windows, time)"
            )
        tokens, attention_mask = batch["input_ids"], batch.get("attention_mask")
    else:
        tokens = batch
    is_token_ids = isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.numel()
    if not is_token_ids or tokens.dtype not in (torch.long, torch.int):
        raise UserError(
            f"a batch must have integer token ids of shape (windows, time), got {_describe(tokens)}"
        )
    return tokens, attention_mask, window_ids


def _describe(value: Any) -> str:
    """Return shape and type of what a batch has, for an error."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]" if len(value) < 4 else f"{len(value)} values"
    return type(value).__name__


def _remove_padding(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Return the rows of `tokens` `(windows, time)` without padding, those of a length together.

    So padding costs nothing and no memory reads, counts or stores it.

    Raises:
        UserError: the mask has another shape, gaps, or no token.
    """
    if attention_mask is None:
        return [tokens]
    if attention_mask.shape != tokens.shape:
        raise UserError(
            f"attention_mask must have the shape of input_ids {tuple(tokens.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if mask.all():
        return [tokens]
    lengths, starts = mask.sum(1), mask.int().argmax(1)
    offsets = torch.arange(tokens.shape[1], device=tokens.device) - starts.unsqueeze(1)
    if not torch.equal(mask, (offsets >= 0) & (offsets < lengths.unsqueeze(1))):
        raise UserError(
            "attention_mask has gaps; a row must be one text, padded on its left or right"
        )
    groups = [
        tokens[mask & (lengths == length).unsqueeze(1)].view(-1, length)
        for length in lengths.unique().tolist()
        if length
    ]
    if not groups:
        raise UserError("attention_mask masks every token of a batch; leave empty texts out")
    return groups
