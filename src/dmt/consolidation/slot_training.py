"""One night: slots learn to say what rows say, while prose and what earlier nights have learnt stay what they are.

Slots are moved where it costs least: in directions of which unrelated text, and what is known already, takes no notice.

Rows of an associative memory as states: where each is read, and what is said there with it and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.consolidation.replay import ReplayExample, batch_examples
from dmt.errors import UserError
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.forward import capture, forward_with_activations, pad_token_ids
from dmt.ops import inverse_sqrt, kl

DAMPING = 0.001
"""Added to every direction's share of what text notices, mean 1: none is taken to be free."""


@dataclass
class _KFACParameter:
    """One matrix of a memory, or two side by side, and the step from where it was: `start + left @ step @ right`."""

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
    """Steps that keys and values of `memories` take, measured so that a step of length 1 costs text the same in any direction.

    How much text would notice is the Fisher information of the model's answers, as a product of what enters a matrix and of
    what its answer changes.

    Args:
        memories: of `model`, by layer; nothing else of it changes.
        noticed: token ids `(batch, time)`, which of them count, and how much a batch does: text that should notice nothing.

    Source: Martens and Grosse 2015, arXiv 1503.05671 (the product); here as coordinates in which plain momentum descends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memories: dict[int, FeaturalMemory],
        reference_batches: Iterable[tuple[Tensor, Tensor, float]],
    ) -> None:
        factors_by_layer = _estimate_fisher_factors(model, memories, reference_batches)
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
            torch.eye(dim, device=initial.device) if factor is None else _inverse_sqrt(factor)
            for factor, dim in zip((left_factor, right_factor), initial.shape, strict=True)
        ]
        self._parameters.append(
            _KFACParameter(tensors, initial, torch.zeros_like(initial, requires_grad=True), *roots)
        )

    @property
    def model_tensors(self) -> list[Tensor]:
        """What of the model changes, which is what needs a gradient."""
        return [tensor for parameter in self._parameters for tensor in parameter.tensors]

    @property
    def deltas(self) -> list[Tensor]:
        """What an optimiser is to change."""
        return [parameter.delta for parameter in self._parameters]

    def transfer_gradients(self) -> None:
        """Give the gradients of what changes in the model to the steps."""
        for parameter in self._parameters:
            parameter.delta.grad = (
                parameter.left_root @ parameter.gradients() @ parameter.right_root
            )
            for tensor in parameter.tensors:
                tensor.grad = None

    @torch.no_grad()
    def update_model(self) -> None:
        """Put the model where the steps lead."""
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
    return (
        tensors[0].clone()
        if len(tensors) == 1
        else torch.cat([tensors[0], tensors[1].unsqueeze(1)], 1)
    )


def _inverse_sqrt(matrix: Tensor) -> Tensor:
    """Compute the damped inverse square root of a symmetric matrix scaled to a mean diagonal of 1."""
    matrix64 = matrix.double().cpu()
    mean_diagonal = matrix64.diagonal().mean().clamp_min(1e-30)
    return inverse_sqrt(matrix64 / mean_diagonal, DAMPING).to(matrix)


def _estimate_fisher_factors(
    model: PreTrainedModel,
    memories: dict[int, FeaturalMemory],
    reference_batches: Iterable[tuple[Tensor, Tensor, float]],
) -> dict[int, dict[str, Tensor]]:
    """Mean squares, `(n, n)` each, of what matrices of each layer's memory are given and of slopes of the model's answers."""
    factors: dict[int, dict[str, Tensor]] = {layer: {} for layer in memories}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for tokens, mask, weight in reference_batches:
        tokens, flat_mask = tokens.to(device), mask.to(device).flatten()
        inputs, gradients = _collect_inputs_and_gradients(
            model, memories, tokens, flat_mask, generator
        )
        for layer, memory in memories.items():
            for name, samples in _collect_factor_samples(
                memory,
                inputs[layer].flatten(0, 1)[flat_mask],
                gradients[layer].flatten(0, 1)[flat_mask],
            ).items():
                second_moment = samples.t() @ samples * (weight / max(1, len(samples)))
                factors[layer][name] = factors[layer].get(name, 0) + second_moment
    return factors


def _collect_inputs_and_gradients(
    model: PreTrainedModel,
    memories: dict[int, FeaturalMemory],
    tokens: Tensor,
    flat_mask: Tensor,
    generator: torch.Generator,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What each memory is given, and how its answer changes the log-probability of a word the model might say."""
    perturbations: dict[int, Tensor] = {}

    def add_perturbation(layer: int, output: Tensor) -> Tensor:
        perturbations[layer] = torch.zeros_like(output, requires_grad=True)
        return output + perturbations[layer]

    with torch.enable_grad(), capture(memories, on_output=add_perturbation) as activations:
        logits = forward_with_activations(model, tokens).logits.float().flatten(0, 1)[flat_mask]
        sampled_ids = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        loss = F.cross_entropy(logits, sampled_ids.squeeze(1), reduction="sum")
        gradients = torch.autograd.grad(loss, [perturbations[layer] for layer in memories])
    inputs = {layer: hidden.detach() for layer, hidden in activations.inputs.items()}
    return inputs, dict(zip(memories, gradients, strict=True))


@torch.no_grad()
def _collect_factor_samples(
    memory: FeaturalMemory, hidden: Tensor, gradients: Tensor
) -> dict[str, Tensor]:
    """For tokens `(n, width)` what values, keys and gains are given, and slopes of what they answer."""
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


ROWS_PER_STEP = 64
"""Rows in a step."""
NOISE_SCALE = 0.1
"""How far from a row's own state it is asked for, as a share of what states are apart."""


class RowQueries:
    """Hidden states in which rows of one memory answer, made from their keys; no text is needed that wrote them.

    Args:
        teacher: the memory with the rows.
        student: the memory without them, whose base is to say what they say.
        ids: numbers of the rows.
        hidden: states `(n, width)` that the memory is given by prose, for how long and how far apart states are.
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
        """Hidden states whose keys are `keys` `(n, width)`, as long as those of prose are."""
        return (keys * self._mean_key_norm - self.teacher.key.bias) @ self._key_pinv.t()

    def compute_loss(self, generator: torch.Generator) -> Tensor:
        """Of what some of the rows say near to where they were written, the share (of squares) that the student does not."""
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
        return (self.student(states + noise) - targets).square().sum(
            -1
        ).mean() / self._initial_error

    @torch.no_grad()
    def explained_share(self) -> float:
        """Of what all rows say where they were written, the share (of squares) that the student says; 1 is all."""
        states = self.reconstruct_states(self.keys)
        error = (self.student(states) - self.teacher(states)).square().sum(-1).mean()
        return 1 - float(error) / self._initial_error


EXAMPLES_PER_STEP = 64
"""Tellings in a step of what is new, and half as many of what earlier nights have learnt."""
WINDOWS_PER_STEP = 6
"""Windows of prose in a step."""
PROSE_WEIGHT = 58.0
"""What a nat of prose counts beside one of what is told."""
SHARED_FACT_WEIGHT = 1 / 3
"""What a nat of what is new counts, and one of what is known, where there is both; prose pays for them together."""
FISHER_WINDOWS = 64
"""Windows of prose by which it is measured what prose would notice."""
KL_TOLERANCE = 0.1
"""Nats a position of what is new may lack: it is not pushed further, which would cost prose more than it gives."""
SAMPLING_FLOOR = 0.05
"""Nats added to what a telling lacks, for what lacks nothing to be told now and then too."""
MOMENTUM, GRAD_CLIP, WARMUP_STEPS = 0.9, 1.0, 10


@dataclass(frozen=True)
class TransferData:
    """What a night is about.

    Attributes:
        new: tellings of what is to be learnt.
        known: tellings of what earlier nights have learnt.
        prose: windows of training text, token ids `(windows, time)`.
        rows: states in which rows of associative memories answer, by layer.
    """

    new_examples: Sequence[ReplayExample]
    retained_examples: Sequence[ReplayExample]
    prose: Tensor
    row_queries: dict[int, RowQueries]


class _ReplayLoss:
    """Tellings, what the teacher says of them, and how far from it the student was when it was last asked."""

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
            with torch.no_grad():
                hidden = forward_with_activations(teacher, tokens.to(_device(teacher))).hidden
            for row, index in enumerate(batch):
                self._teacher_hidden[index] = hidden[row, : len(examples[index].ids)].clone()

    def compute_loss(
        self, student: PreTrainedModel, num_examples: int, generator: torch.Generator
    ) -> Tensor:
        """KL of some of them per position that counts, those most often that lack most."""
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
        token_kls = (
            kl(student_logits, head(torch.cat([self._teacher_hidden[index] for index in indices])))
            * weights[mask]
        )
        mean_kls = torch.zeros_like(weights).masked_scatter(mask, token_kls.detach()).sum(
            1
        ) / weights.sum(1)
        self.example_kls[indices] = mean_kls.cpu()
        return (token_kls - self.tolerance * weights[mask]).clamp_min(0).sum() / weights.sum()


def train_slots(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    memories: dict[int, FeaturalMemory],
    data: TransferData,
    steps: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, found: None,
) -> None:
    """Change the slots of `memories` until `student` says what `teacher` says.

    Args:
        teacher: has the rows, speaks; in eval mode like `student`, which does not have them.
        lr: length of the longest step, see `Moves`.
        heard: is told what the loss was at each step, in its parts.

    Raises:
        UserError: a loss or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    new_loss, retained_loss = (
        _ReplayLoss(teacher, data.new_examples, 5.0, KL_TOLERANCE),
        _ReplayLoss(teacher, data.retained_examples, 0.0, 0.0),
    )
    hidden_chunks = [compute_hidden(teacher, tensor) for tensor in data.prose.split(8)]
    teacher_hidden = torch.cat(hidden_chunks)
    parameters = KFACParameters(student, memories, _reference_batches(data))
    for tensor in parameters.model_tensors:
        tensor.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters.deltas, lr=lr, momentum=MOMENTUM)
    head, fact_weight = (
        student.get_output_embeddings(),
        SHARED_FACT_WEIGHT if data.new_examples and data.retained_examples else 1.0,
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr
                * min(1, (step + 1) / WARMUP_STEPS)
                * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
        losses: dict[str, float] = {}
        for name, loss, weight in (
            *(
                (
                    (
                        "new",
                        new_loss.compute_loss(student, EXAMPLES_PER_STEP, generator),
                        fact_weight,
                    ),
                )
                if data.new_examples
                else ()
            ),
            *(
                (
                    (
                        "known",
                        retained_loss.compute_loss(student, EXAMPLES_PER_STEP // 2, generator),
                        fact_weight,
                    ),
                )
                if data.retained_examples
                else ()
            ),
            *(
                (f"rows_{layer}", queries.compute_loss(generator), 1.0)
                for layer, queries in data.row_queries.items()
            ),
        ):
            (weight * loss).backward()
            losses[name] = float(loss.detach())
        indices = torch.randperm(len(data.prose), generator=generator)[:WINDOWS_PER_STEP]
        student_hidden = forward_with_activations(
            student, data.prose[indices].to(_device(student))
        ).hidden
        prose_kl = kl(head(student_hidden), head(teacher_hidden[indices])).mean()
        (PROSE_WEIGHT * prose_kl).backward()
        parameters.transfer_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.deltas, GRAD_CLIP)
        if not math.isfinite(float(prose_kl.detach() + grad_norm) + sum(losses.values())):
            nonfinite_name = next(
                (
                    name
                    for name, loss in {**losses, "prose": float(prose_kl.detach())}.items()
                    if not math.isfinite(loss)
                ),
                None,
            )
            nonfinite_source = (
                "the gradient" if nonfinite_name is None else f"the loss of {nonfinite_name}"
            )
            raise UserError(
                f"step {step + 1} of the night: {nonfinite_source} is not finite; nothing was kept; sleep with a lower --lr than {lr:g}"
            )
        optimizer.step()
        parameters.update_model()
        on_step(step, losses | {"prose": float(prose_kl.detach())})
    student.requires_grad_(False)


@torch.no_grad()
def compute_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Last hidden states `(windows, time, width)`."""
    return forward_with_activations(model, tokens.to(_device(model))).hidden


def _reference_batches(data: TransferData) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Prose, which should notice nothing. What earlier nights have learnt is no part of it: of facts so much more is at stake
    that beside them prose would be free (EXPERIMENTS.md); they are told again instead."""
    chunks = data.prose[:FISHER_WINDOWS].split(8)
    for tokens in chunks:
        yield tokens, torch.ones_like(tokens, dtype=torch.bool), 1 / len(chunks)


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
