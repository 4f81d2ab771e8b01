"""Calibration without training: variances, slot means, biases, thresholds, the Fisher metric."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.memory.sparsity_budget import (
    initialize_threshold,
    reset_counts,
    select_thresholded,
    update_threshold,
)
from dmt.memory.token_context import use_contexts
from dmt.models.architectures import get_architecture
from dmt.models.forward import (
    MAX_BATCH_TOKENS,
    ForwardOutputs,
    capture,
    forward_teacher,
    forward_with_activations,
)
from dmt.models.memories import (
    get_associative_memories,
    get_featural_memories,
    get_memories,
    get_slot_memories,
    list_student_contexts,
)
from dmt.ops import inlier_mask, symmetric_root
from dmt.progress import ProgressLog

BUDGET_PASSES = 3  # passes over the calibration text that move the shared threshold to its budget


def measure_fisher(model: PreTrainedModel, windows: Tensor, batch_size: int = 4) -> Tensor:
    """Measure the Fisher information of each block's output, `(layers, width, width)`.

    A small change d of a block's output at one token changes the model's distributions, at that
    token and later ones, by a total KL of about `d F d / 2` nats. F is the mean outer product of
    the gradients of the log-probability of next tokens that are sampled from the model.

    Args:
        model: the model.
        windows: token ids `(windows, time)`.
        batch_size: windows computed at once.

    Source: Amari 1998, section 4 (the metric); Kunstner et al. 2019, arXiv 1905.12558 (why sampled
        tokens and not those of the text).
    """
    blocks = dict(enumerate(get_architecture(model.config.model_type).blocks(model)))
    total, num_tokens = torch.zeros(()), 0
    generator = torch.Generator().manual_seed(0)
    for tokens in windows.split(batch_size):
        _, output_gradients = sample_output_gradients(model, blocks, tokens, generator)
        gradients = output_gradients.values()
        flat_grads = torch.stack([gradient.flatten(0, -2).float() for gradient in gradients])
        total, num_tokens = (
            total.to(flat_grads) + flat_grads.transpose(1, 2) @ flat_grads,
            num_tokens + tokens.numel(),
        )
    return total / num_tokens


def sample_output_gradients(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    tokens: Tensor,
    generator: torch.Generator,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return inputs of modules, and gradients of the model's NLL in their outputs.

    The NLL is that of next tokens sampled from the model itself, summed over all tokens.

    Args:
        model: the model that `modules` are part of.
        modules: modules by layer.
        tokens: token ids `(batch, time)`.
        generator: on the CPU, so that a seed samples the same tokens on every device.
    """
    perturbations: dict[int, Tensor] = {}

    def perturb(layer: int, output: Tensor) -> Tensor:
        perturbations[layer] = torch.zeros_like(output, requires_grad=True)
        return output + perturbations[layer]

    with torch.enable_grad(), capture(modules, on_output=perturb) as activations:
        logits = forward_with_activations(model, tokens).logits.flatten(0, 1).float()
        probs = logits.detach().softmax(-1).cpu()
        sampled = torch.multinomial(probs, 1, generator=generator).to(logits.device)
        loss = F.cross_entropy(logits, sampled.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [perturbations[layer] for layer in modules])
    inputs = {layer: hidden.detach() for layer, hidden in activations.inputs.items()}
    return inputs, dict(zip(modules, gradients, strict=True))


@torch.no_grad()
def calibrate_memories(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> None:
    """Set from text what memories need no gradient for, such as output biases and linear maps.

    First what tokens read is set from the teacher's inputs: the metric that ranks slots, the shared
    threshold, routers. Then the student reads the text: each memory is set when its input arrives,
    lowest layer first, so the layers above already read its corrected output.

    Args:
        student: model whose memories are set.
        teacher: model to imitate.
        windows: token ids `(windows, time)`.

    Source: the bias correction of data-free quantization (Nagel et al. 2019, arXiv 1906.04721,
        section 4.2), here for slots that are not read; ranking by deviation from the mean is ours
        (docs/experiments).
    """
    teacher_outputs: ForwardOutputs = forward_teacher(teacher, windows, capture_blocks=True)
    memories = get_featural_memories(student)
    if any(memory.metric is not None for memory in memories.values()):
        for layer, metric in enumerate(measure_fisher(teacher, windows)):
            if layer in memories and memories[layer].metric is not None:
                memories[layer].metric.copy_(symmetric_root(metric))
    block_inputs = [
        teacher_outputs.block_inputs[layer][inlier_mask(teacher_outputs.block_outputs[layer])]
        for layer in memories
    ]
    for memory, hidden in zip(memories.values(), block_inputs, strict=True):
        memory.calibrate_means(hidden)
    contexts = list_student_contexts(student, windows)
    for layer, any_memory in get_memories(student).items():
        target = teacher_outputs.block_outputs[layer]
        inliers = inlier_mask(target)
        with use_contexts(None if contexts is None else contexts[inliers]):
            any_memory.fit_selection(teacher_outputs.block_inputs[layer][inliers], target[inliers])
    for layer, associative in get_associative_memories(student).items():
        associative.center(
            teacher_outputs.block_inputs[layer][inlier_mask(teacher_outputs.block_outputs[layer])]
        )
    initialize_threshold(memories.values(), block_inputs)
    token_outputs = measure_token_outputs(
        teacher,
        windows,
        [layer for layer, memory in get_memories(student).items() if memory.reads_token_outputs],
    )
    _calibrate_outputs(student, teacher_outputs, windows, token_outputs)
    if select_thresholded(memories.values()):
        reset_counts(memories.values())
        for _ in range(BUDGET_PASSES):
            student.train()
            forward_with_activations(student, windows)
            student.eval()
            update_threshold(memories.values(), rate=0.5)
        _calibrate_outputs(student, teacher_outputs, windows, token_outputs)


def _calibrate_outputs(
    student: PreTrainedModel,
    teacher_outputs: ForwardOutputs,
    windows: Tensor,
    token_outputs: Mapping[int, Tensor],
) -> None:
    memories = get_memories(student)
    contexts = list_student_contexts(student, windows)

    def calibrate_memory(layer: int, block_input: Tensor) -> None:
        target = teacher_outputs.block_outputs[layer]
        inliers = inlier_mask(target)
        if layer in token_outputs:
            memories[layer].load_token_outputs(token_outputs[layer])
        with use_contexts(None if contexts is None else contexts[inliers]):
            memories[layer].calibrate(block_input[inliers], target[inliers])

    with capture(memories, on_input=calibrate_memory):
        forward_with_activations(student, windows)


@torch.no_grad()
def set_lookup_rows(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, batch_size: int = 4
) -> None:
    """Set the rows of lookups from what memories lack in a long text, in one pass.

    Memories read the inputs of the teacher's blocks, to which training brings those of the student.

    Args:
        student: model whose memories are calibrated.
        teacher: model to imitate.
        windows: token ids `(windows, time)`.
        batch_size: windows computed at once.
    """
    memories = {
        layer: memory for layer, memory in get_memories(student).items() if memory.observes_text
    }
    progress = ProgressLog("setting rows", len(windows), " windows")
    with ExitStack() as stack:
        for slot_memory in get_slot_memories(student).values():
            stack.enter_context(slot_memory.usage_paused())
        for index, tokens in enumerate(windows.split(batch_size) if memories else (), start=1):
            outputs = forward_teacher(teacher, tokens, capture_blocks=True)
            contexts = list_student_contexts(student, tokens)
            for layer, memory in memories.items():
                target = outputs.block_outputs[layer]
                inliers = inlier_mask(target)
                with use_contexts(None if contexts is None else contexts[inliers]):
                    memory.observe(outputs.block_inputs[layer][inliers], target[inliers])
            progress.update(min(index * batch_size, len(windows)))
    for memory in memories.values():
        memory.set_rows()


@torch.no_grad()
def measure_token_outputs(
    teacher: PreTrainedModel, windows: Tensor, layers: Collection[int]
) -> dict[int, Tensor]:
    """Return what blocks compute for each token `(vocab_size, width)` at the start of a text.

    Args:
        teacher: the model that the blocks are part of.
        windows: token ids `(windows, time)`; without a token that begins a text, their first does.
        layers: whose blocks are measured; nothing is computed without any.
    """
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    if not outputs:
        return {}
    starts = (teacher.config.bos_token_id, teacher.config.eos_token_id, int(windows[0, 0]))
    start = next(token for token in starts if isinstance(token, int))
    token_ids = torch.arange(teacher.config.vocab_size, device=windows.device)
    for ids in token_ids.split(MAX_BATCH_TOKENS // 2):
        texts = torch.stack([torch.full_like(ids, start), ids], 1)
        blocks = forward_teacher(teacher, texts, capture_blocks=True).block_outputs
        for layer, rows in outputs.items():
            rows.append(blocks[layer][:, -1])
    return {layer: torch.cat(rows) for layer, rows in outputs.items()}
