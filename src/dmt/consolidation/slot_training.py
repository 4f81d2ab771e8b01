"""Train slots to predict what rows predict, while predictions on unrelated text stay as they are.

Steps are taken in coordinates in which equally long steps change the model's predictions on
unrelated text equally (K-FAC), so that slots change where that costs least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.consolidation.replay import ReplayExample, batch_examples
from dmt.errors import UserError
from dmt.evaluation.metrics import FidelityMetrics
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.calibration import sample_output_gradients
from dmt.models.forward import forward_with_activations, pad_token_ids
from dmt.ops import inverse_sqrt, kl
from dmt.training.callbacks import ChartGroups, ChartLayout
from dmt.training.module import TrainingModule
from dmt.training.optimization import cosine_decay

BATCH_WINDOWS = 8  # windows in one forward pass without gradient
ROWS_PER_STEP = 64  # rows of each associative memory in a step
NOISE_SCALE = 0.1  # noise on a row's own state, as a share of the spread of states
SHARED_FACT_WEIGHT = 1 / 3  # of new and of retained facts, each, where a step has both
SAMPLING_FLOOR = 0.05  # nats added to an example's KL, so that learned ones are sampled too
UNKNOWN_KL = 5.0  # nats that a new example is taken to lack before it is first measured
MIN_LR_RATIO = 0.05  # learning rate at the end, as a share of its peak


@dataclass(frozen=True)
class TransferData:
    """What slots are trained on.

    Attributes:
        new_examples: texts that state the facts to be transferred.
        retained_examples: texts that state facts which earlier transfers have moved into slots.
        windows: training text, token ids `(windows, time)`, on which nothing should change.
        row_queries: states that retrieve rows of associative memories, by layer.
    """

    new_examples: Sequence[ReplayExample]
    retained_examples: Sequence[ReplayExample]
    windows: Tensor
    row_queries: dict[int, RowQueries]


class SlotTransferModule(TrainingModule):
    """Move facts and rows into slots by preconditioned SGD; one step is one optimizer step.

    A checkpoint holds the steps taken so far, the state of the random generator and the KL of
    every example; the models and the preconditioner are computed again from the same inputs.

    Args:
        config: settings; `sleep` and `optim.grad_clip` are used here.
        teacher: the model with rows, in eval mode.
        student: the model without them, in eval mode; its slots change.
        memories: memories of `student` to train, by layer; nothing else of it changes.
        data: what is learned, and what stays.
    """

    def __init__(
        self,
        config: Config,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        memories: Mapping[int, FeaturalMemory],
        data: TransferData,
    ) -> None:
        super().__init__(config)
        settings = config.sleep
        self._models = (teacher, student)  # not as submodules: checkpoints hold neither
        self.data = data
        self._generator = torch.Generator().manual_seed(config.seed)
        self._replay = {
            "new": ReplayLoss(teacher, data.new_examples, UNKNOWN_KL, settings.kl_tolerance),
            "replay": ReplayLoss(teacher, data.retained_examples, 0.0, 0.0),
        }
        self._teacher_hidden = torch.cat(
            [compute_hidden(teacher, tokens) for tokens in data.windows.split(BATCH_WINDOWS)]
        )
        # Examples of retained facts are no part of the Fisher information: so much more is at
        # stake in them that unrelated text would cost nothing beside them (docs/experiments).
        self._kfac = KFACParameters(
            student, memories, data.windows[: settings.fisher_windows], settings.damping
        )
        for tensor in self._kfac.model_tensors:
            tensor.requires_grad_(True)
        self.deltas = nn.ParameterList(self._kfac.deltas)
        self._save_random_state()
        self.val_metrics: list[FidelityMetrics] = []

    @property
    def teacher(self) -> PreTrainedModel:
        """The model with rows."""
        return self._models[0]

    @property
    def student(self) -> PreTrainedModel:
        """The model whose slots are trained."""
        return self._models[1]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.settings.sleep.steps

    @property
    def trained_model(self) -> PreTrainedModel:
        """The student."""
        return self.student

    def get_lr(self, step: int) -> float:
        """Return the largest step's length: linear warm-up times a cosine over the whole run."""
        settings = self.settings.sleep
        warmup = min(1, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1
        return settings.lr * warmup * cosine_decay(step / settings.steps, MIN_LR_RATIO)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum on the deltas."""
        groups = [{"params": list(self.deltas), "lr_scale": 1.0}]
        settings = self.settings.sleep
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)

    def on_train_start(self) -> None:
        """Set the student to the state of the checkpoint."""
        self.update_student()

    def update_student(self) -> None:
        """Set the student's slots to where the steps so far lead."""
        self._kfac.update_model()

    def split_batch(self, batch: Any) -> list[str]:
        """Return the names of the losses of a step; each is propagated by itself."""
        replay = [name for name, loss in self._replay.items() if loss.examples]
        rows = [f"row_error/layer_{layer}" for layer in self.data.row_queries]
        return [*replay, *rows, "unrelated"]

    def compute_terms(self, micro_batch: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute one loss of a step, by its name in `split_batch`."""
        settings = self.settings.sleep
        if micro_batch == "unrelated":
            loss = self._compute_unrelated_kl()
            return settings.unrelated_kl_weight * loss, {"kl_unrelated": loss}
        if micro_batch in self._replay:
            num_examples = settings.examples_per_step // (1 if micro_batch == "new" else 2)
            has_both = all(loss.examples for loss in self._replay.values())
            loss = self._replay[micro_batch].compute_loss(
                self.student, num_examples, self._generator
            )
            return (SHARED_FACT_WEIGHT if has_both else 1.0) * loss, {f"kl_{micro_batch}": loss}
        layer = int(micro_batch.rpartition("_")[2])
        loss = self.data.row_queries[layer].compute_loss(self._generator)
        return loss, {micro_batch: loss}

    def _compute_unrelated_kl(self) -> Tensor:
        windows = self.data.windows
        indices = torch.randperm(len(windows), generator=self._generator)
        indices = indices[: self.settings.sleep.windows_per_step]
        head = self.student.get_output_embeddings()
        tokens = windows[indices].to(_device(self.student))
        hidden = forward_with_activations(self.student, tokens).hidden
        return kl(head(hidden), head(self._teacher_hidden[indices])).mean()

    def after_backward(self, step: int) -> None:
        """Move the gradients of the slots to the deltas."""
        self._kfac.transfer_gradients()

    def after_update(self, step: int) -> None:
        """Set the student to where the step leads."""
        self.update_student()
        self._save_random_state()

    def _save_random_state(self) -> None:
        """Keep the random state of the last complete step: a step may fail half-way."""
        self._random_state = {
            "generator": self._generator.get_state(),
            **{name: loss.example_kls.clone() for name, loss in self._replay.items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random state beside the deltas."""
        checkpoint["random_state"] = self._random_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the random state.

        Raises:
            UserError: the facts of the teacher have changed since the checkpoint.
        """
        state = checkpoint["random_state"]
        if any(len(state[name]) != len(loss.examples) for name, loss in self._replay.items()):
            raise UserError(
                f"teacher={self.settings.teacher} has other facts than when this run began;"
                " begin again"
            )
        self._random_state = state
        self._generator.set_state(state["generator"])
        for name, loss in self._replay.items():
            loss.example_kls = state[name].clone()

    def on_validation_start(self) -> None:
        """Start new sums."""
        self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, tokens: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch of one corpus to its sums."""
        self.val_metrics[dataloader_idx].update(
            forward_with_activations(self.student, tokens).logits,
            forward_with_activations(self.teacher, tokens).logits,
            tokens,
        )

    def on_validation_epoch_end(self) -> None:
        """Log the KL by corpus."""
        for corpus, metrics in zip(self.trainer.datamodule.corpora, self.val_metrics, strict=True):  # type: ignore[attr-defined]
            self.log(f"val/{corpus.name}/kl", metrics.kl, prog_bar=True)


@dataclass(frozen=True)
class ValidationCorpus:
    """Validation text of one corpus: its name, and token ids `(windows, time)`."""

    name: str
    validation: Tensor


class SlotTransferDataModule(pl.LightningDataModule):
    """Numbers of the steps for training, which samples by itself; text for validation.

    Args:
        steps: steps of the whole run.
        corpora: validation text by corpus.
    """

    def __init__(self, steps: int, corpora: Sequence[ValidationCorpus]) -> None:
        super().__init__()
        self.steps, self.corpora = steps, list(corpora)

    def train_dataloader(self) -> DataLoader:
        """Return the numbers of the steps that remain."""
        return DataLoader(range(self.steps), sampler=_RemainingSteps(self), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader]:
        """Return a loader of validation windows for each corpus."""
        return [
            DataLoader(corpus.validation, batch_size=BATCH_WINDOWS)  # type: ignore[arg-type]
            for corpus in self.corpora
        ]


class _RemainingSteps(Sampler[int]):
    """Numbers of the steps that a run has yet to take."""

    def __init__(self, data: SlotTransferDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps  # of the whole run: Lightning counts earlier steps as fetched

    def __iter__(self) -> Iterator[int]:
        first_step = self.data.trainer.global_step if self.data.trainer else 0
        return iter(range(first_step, self.data.steps))


class SlotTransferCharts(ChartGroups):
    """TensorBoard charts of a slot transfer: what is learned, and what changes elsewhere."""

    def build_layout(self, module: Any, corpora: list[str]) -> ChartLayout:
        """Return the charts of losses, row errors and validation KL."""
        tags = [f"train/{name}" for name in module.split_batch(None) if name.startswith("row_")]
        losses = [
            f"train/kl_{name}" for name in module.split_batch(None) if not name.startswith("row_")
        ]
        return {
            "slot transfer": {
                "KL": ["Multiline", losses],
                **({"row error": ["Multiline", tags]} if tags else {}),
            },
            "unrelated text": {"KL": ["Multiline", [f"val/{corpus}/kl" for corpus in corpora]]},
        }


class ReplayLoss:
    """KL from the teacher on replay examples, sampled by how far the student is from the teacher.

    Args:
        teacher: the model whose predictions are learned, in eval mode.
        examples: texts to sample from.
        initial_kl: KL in nats that an example is taken to have before it is first measured.
        tolerance: KL in nats per position that counts as learned.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        examples: Sequence[ReplayExample],
        initial_kl: float,
        tolerance: float,
    ) -> None:
        self.tolerance = tolerance
        self.examples, self.weights = examples, [example.position_weights() for example in examples]
        self.example_kls = torch.full((len(examples),), initial_kl)
        self._teacher_hidden: list[Tensor] = [torch.empty(0)] * len(examples)
        for batch, tokens in batch_examples(examples):
            hidden = compute_hidden(teacher, tokens)
            for row, index in enumerate(batch):
                self._teacher_hidden[index] = hidden[row, : len(examples[index].ids)].clone()

    def compute_loss(
        self, student: PreTrainedModel, num_examples: int, generator: torch.Generator
    ) -> Tensor:
        """Return the mean KL `()` of sampled examples per weighted position."""
        indices = torch.multinomial(
            self.example_kls + SAMPLING_FLOOR,
            min(num_examples, len(self.examples)),
            generator=generator,
        ).tolist()
        device = _device(student)
        tokens = pad_token_ids([self.examples[index].ids for index in indices]).to(device)
        weights = torch.nn.utils.rnn.pad_sequence(
            [self.weights[index] for index in indices], batch_first=True
        ).to(device)
        mask = weights > 0
        head = student.get_output_embeddings()
        student_logits = head(forward_with_activations(student, tokens).hidden[mask])
        teacher_logits = head(torch.cat([self._teacher_hidden[index] for index in indices]))
        token_kls = kl(student_logits, teacher_logits) * weights[mask]
        summed_kls = torch.zeros_like(weights).masked_scatter(mask, token_kls.detach()).sum(1)
        self.example_kls[indices] = (summed_kls / weights.sum(1)).cpu()
        return (token_kls - self.tolerance * weights[mask]).clamp_min(0).sum() / weights.sum()


class RowQueries:
    """Hidden states that retrieve the rows of one memory, reconstructed from the rows' keys.

    The text that wrote the rows is not needed.

    Args:
        teacher: the memory with the rows.
        student: the memory without them; its base is to output what they output.
        row_ids: ids of the rows.
        hidden: inputs `(n, width)` of the memory on text; they set the norm and spread of states.
    """

    def __init__(
        self,
        teacher: AssociativeMemory,
        student: AssociativeMemory,
        row_ids: Iterable[int],
        hidden: Tensor,
    ) -> None:
        self.teacher, self.student = teacher, student
        indices = [teacher.rows.index_by_id[row_id] for row_id in row_ids]
        with torch.no_grad():
            self.keys = teacher.rows.keys[indices].float()
            self._key_pinv = torch.linalg.pinv(teacher.key.weight.float())
            self._mean_key_norm = float(teacher.key(hidden).norm(dim=-1).mean())
            self._hidden_spread = (
                float((hidden - hidden.mean(0)).norm(dim=-1).mean()) / hidden.shape[1] ** 0.5
            )
            states = self.reconstruct_states(self.keys)
            self._initial_error = float(
                (teacher(states) - student(states)).square().sum(-1).mean().clamp_min(1e-12)
            )

    def reconstruct_states(self, keys: Tensor) -> Tensor:
        """Return hidden states with these keys `(n, width)`, with the key norm of text."""
        return (keys * self._mean_key_norm - self.teacher.key.bias) @ self._key_pinv.t()

    def compute_loss(self, generator: torch.Generator) -> Tensor:
        """Return the squared error `()` near sampled rows, as a share of the initial error."""
        indices = torch.randperm(len(self.keys), generator=generator)[:ROWS_PER_STEP].to(
            self.keys.device
        )
        states = self.reconstruct_states(self.keys[indices])
        noise = (
            torch.randn(states.shape, generator=generator).to(states)
            * self._hidden_spread
            * NOISE_SCALE
        )
        with torch.no_grad():
            targets = self.teacher(states + noise)
        errors = (self.student(states + noise) - targets).square().sum(-1)
        return errors.mean() / self._initial_error

    @torch.no_grad()
    def explained_share(self) -> float:
        """Return the share of the rows' squared output that the student explains; 1 is all."""
        states = self.reconstruct_states(self.keys)
        error = (self.student(states) - self.teacher(states)).square().sum(-1).mean()
        return 1 - float(error) / self._initial_error


@dataclass
class _KFACParameter:
    """A matrix of a memory, or two side by side: `initial + left_root @ delta @ right_root`."""

    tensors: list[Tensor]
    initial: Tensor
    delta: Tensor
    left_root: Tensor
    right_root: Tensor

    def gradients(self) -> Tensor:
        return _concat_tensors(
            [
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                for tensor in self.tensors
            ]
        )


class KFACParameters:
    """Changes of the slots of `memories`, in coordinates whitened by the Fisher information.

    A change of length 1 costs unrelated text the same in any direction. The Fisher information of
    the model's predictions is approximated for each matrix by the product of two second moments:
    of its inputs, and of the gradients of its outputs.

    Args:
        model: the model that holds the memories.
        memories: memories to change, by layer; nothing else of the model changes.
        windows: unrelated text, token ids `(windows, time)`, whose predictions should stay.
        damping: added to every direction's share of the Fisher information, mean 1, so that no
            direction is taken to be free.

    Source: Martens and Grosse 2015, arXiv 1503.05671 (the product); here as coordinates in which
        SGD with momentum descends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memories: Mapping[int, FeaturalMemory],
        windows: Tensor,
        damping: float,
    ) -> None:
        factors_by_layer = _estimate_fisher_factors(model, memories, windows)
        self._damping = damping
        self._parameters: list[_KFACParameter] = []
        for layer, memory in memories.items():
            factors = factors_by_layer[layer]
            self._add_parameter([memory.values], factors["reads"], factors["slopes"])
            self._add_parameter(
                [memory.keys, memory.key_bias], factors.get("scores"), factors.get("queries")
            )
            if memory.gains is not None and memory.gain_bias is not None:
                self._add_parameter([memory.gains, memory.gain_bias], None, factors["inputs"])

    def _add_parameter(
        self, tensors: list[Tensor], left_factor: Tensor | None, right_factor: Tensor | None
    ) -> None:
        initial = _concat_tensors([tensor.detach() for tensor in tensors])
        roots = [
            torch.eye(dim, device=initial.device)
            if factor is None
            else inverse_sqrt_factor(factor, self._damping)
            for factor, dim in zip((left_factor, right_factor), initial.shape, strict=True)
        ]
        delta = nn.Parameter(torch.zeros_like(initial))
        self._parameters.append(_KFACParameter(tensors, initial, delta, *roots))

    @property
    def model_tensors(self) -> list[Tensor]:
        """Tensors of the model that change; they need gradients."""
        return [tensor for parameter in self._parameters for tensor in parameter.tensors]

    @property
    def deltas(self) -> list[Tensor]:
        """Parameters for an optimizer."""
        return [parameter.delta for parameter in self._parameters]

    def transfer_gradients(self) -> None:
        """Move the gradients of the model's tensors to the deltas."""
        for parameter in self._parameters:
            parameter.delta.grad = (
                parameter.left_root @ parameter.gradients() @ parameter.right_root
            )
            for tensor in parameter.tensors:
                tensor.grad = None

    @torch.no_grad()
    def update_model(self) -> None:
        """Set the model's tensors to where the deltas lead."""
        for parameter in self._parameters:
            updated = (
                parameter.initial + parameter.left_root @ parameter.delta @ parameter.right_root
            )
            if len(parameter.tensors) == 1:
                parameter.tensors[0].copy_(updated)
            else:
                parameter.tensors[0].copy_(updated[:, :-1])
                parameter.tensors[1].copy_(updated[:, -1])


def _concat_tensors(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].clone()
    return torch.cat([tensors[0], tensors[1].unsqueeze(1)], 1)


def inverse_sqrt_factor(factor: Tensor, damping: float) -> Tensor:
    """Return the damped inverse square root of a factor scaled to a mean diagonal of 1."""
    factor64 = factor.cpu().double()
    mean_diagonal = factor64.diagonal().mean().clamp_min(1e-30)
    return inverse_sqrt(factor64 / mean_diagonal, damping).to(factor)


def _estimate_fisher_factors(
    model: PreTrainedModel, memories: Mapping[int, FeaturalMemory], windows: Tensor
) -> dict[int, dict[str, Tensor]]:
    """Return second moments `(n, n)` of inputs and output gradients of the matrices, by layer."""
    factors: dict[int, dict[str, Tensor]] = {layer: {} for layer in memories}
    generator = torch.Generator().manual_seed(0)
    batches = windows.split(BATCH_WINDOWS)
    for tokens in batches:
        inputs, gradients = sample_output_gradients(
            model, memories, tokens.to(_device(model)), generator
        )
        for layer, memory in memories.items():
            for name, samples in _collect_factor_samples(
                memory, inputs[layer].flatten(0, 1), gradients[layer].flatten(0, 1)
            ).items():
                weight = 1 / len(batches) / max(1, len(samples))
                factors[layer][name] = factors[layer].get(name, 0) + samples.t() @ samples * weight
    return factors


@torch.no_grad()
def _collect_factor_samples(
    memory: FeaturalMemory, hidden: Tensor, gradients: Tensor
) -> dict[str, Tensor]:
    """Return inputs of values, keys and gains for tokens `(n, width)`, and output gradients."""
    gradients = gradients if memory.output is None else gradients @ memory.output
    mask, weights = memory.select_with_weights(hidden)
    mean_weights = 0 if memory.means is None else memory.means
    inputs = F.pad(hidden, (0, 1), value=1.0)
    samples = {"reads": weights + mean_weights, "slopes": gradients, "inputs": inputs}
    if memory.heads == 1:
        samples["queries"] = F.pad(memory.compute_queries(hidden)[:, 0], (0, 1), value=1.0)
    if memory.activation_fn is not None:
        with torch.enable_grad():
            scores = memory.compute_scores(hidden).detach().requires_grad_(True)
            (score_gradients,) = torch.autograd.grad(
                memory.compute_weights(hidden, scores).sum(), scores
            )
        samples["scores"] = (gradients @ memory.values.t()) * score_gradients * mask
    return samples


@torch.no_grad()
def compute_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the last hidden states `(windows, time, width)` of token ids `(windows, time)`."""
    return forward_with_activations(model, tokens.to(_device(model))).hidden


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
