"""Check that a new student computes what its teacher does, before anything is spent on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.memory import FeaturalMemory
from dmt.models.architectures import get_architecture
from dmt.models.forward import capture

CHECKED_TOKENS = 64  # tokens of the window on which the two are compared, at most
# Largest difference of logits, relative to their norm: float32 in another order of operations, or
# so many rounding errors of a shorter type. Another kind of GELU alone makes 2e-4.
TOLERANCE = 1e-4
TOLERANCE_ROUNDINGS = 32
# Rounding error of float32 products, by torch.set_float32_matmul_precision.
PRODUCT_ROUNDINGS = {"highest": 2**-23, "high": 2**-10, "medium": 2**-7}
MAX_NAMED_TENSORS = 3  # in a message


def has_tied_head(model: PreTrainedModel) -> bool:
    """Return whether the output head is the embedding matrix, whatever the config says."""
    head, embedding = (
        layer.weight for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return head.shape == embedding.shape and head.data_ptr() == embedding.data_ptr()


@torch.no_grad()
def check_equivalence(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    whole_memories: Mapping[int, FeaturalMemory],
    tensor_pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Check on one window that a student with all slots has its teacher's logits.

    Memories that do not begin as their whole block are left out: the teacher's own outputs stand in
    for theirs. Random numbers of the caller are not used up.

    Args:
        teacher: the model that was cloned.
        student: its clone, not trained or calibrated yet, in eval mode.
        whole_memories: by layer, the featural memories that hold every neuron of their block.
        tensor_pairs: by name, tensors of the teacher and what the student has of them.

    Raises:
        UserError: the logits differ; the message names tensors that do.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, teacher.config.max_position_embeddings)
    window = torch.randint(teacher.config.vocab_size, (1, length), generator=generator)
    teacher_blocks, student_blocks = (
        get_architecture(model.config.model_type).blocks(model) for model in (teacher, student)
    )
    with _eval_mode(teacher), capture(dict(enumerate(teacher_blocks))) as blocks:
        target = teacher(window.to(teacher.device)).logits.to(student.device, torch.float32)
    replaced = {
        layer: student_blocks[layer]
        for layer in map(int, student.config.memory or {})
        if layer not in whole_memories
    }
    outputs = {layer: blocks.outputs[layer].to(student.device, student.dtype) for layer in replaced}
    with (
        _all_slots(whole_memories.values()),
        capture(replaced, on_output=lambda layer, _: outputs[layer]),
    ):
        logits = student(window.to(student.device)).logits.float()
    rounding = max(
        PRODUCT_ROUNDINGS[torch.get_float32_matmul_precision()],
        *(torch.finfo(model.dtype).eps for model in (teacher, student)),
    )
    difference = float((logits - target).norm() / target.norm())
    if difference <= max(TOLERANCE, TOLERANCE_ROUNDINGS * rounding):
        return
    buffers = dict(student.named_buffers())
    pairs = dict(tensor_pairs) | {
        name: (buffer, buffers[name]) for name, buffer in teacher.named_buffers() if name in buffers
    }
    differing = [
        name for name, pair in pairs.items() if not torch.equal(pair[0].to(pair[1]), pair[1])
    ]
    cause = (
        f"these tensors differ: {', '.join(differing[:MAX_NAMED_TENSORS])}"
        f"{' ...' if len(differing) > MAX_NAMED_TENSORS else ''}"
        if differing
        else f"all tensors are equal, so {type(teacher).__name__} has code or hooks of its own"
    )
    raise UserError(
        "this model cannot be cloned: the logits of its clone with all slots differ by "
        f"{difference:.2g} of their norm, and {cause}; use a model that transformers loads as a "
        "plain one"
    )


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training_modules:
            module.training = True


@contextmanager
def _all_slots(memories: Iterable[FeaturalMemory]) -> Iterator[None]:
    """Score and read every slot inside the block; no search index is built."""
    with ExitStack() as stack:
        for memory in memories:
            stack.enter_context(memory.temporary_k(memory.num_slots))
            stack.callback(setattr, memory, "search", memory.search)
            memory.search = "exact"
        yield
