"""What stored rows are taught: what each block of the student should have said."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.distill.signals import Signals, observe, observe_teacher
from dmt.models.architectures import architecture_of
from dmt.models.surgery import associative_of


@torch.no_grad()
def teach(student: PreTrainedModel, teacher: PreTrainedModel, seen: Signals, wanted: Signals) -> None:
    """Tell the memories that wrote in the student's last pass what they should have answered.

    A memory should say what the teacher's own block says of what the student gives it. The topmost one has nobody above it
    that mends what went wrong below, or has learnt to live with it: it should say what makes the state after its layer
    the teacher's.

    Args:
        student, teacher: the models.
        seen, wanted: what they made of the same tokens, with blocks.
    """
    writing = {layer: memory for layer, memory in associative_of(student).items() if memory.writing}
    if not writing:
        return
    blocks = architecture_of(teacher.config.model_type).blocks(teacher)
    top = max(associative_of(student))
    for layer, memory in writing.items():
        if layer == top:
            before = seen.streams[layer] - seen.block_outputs[layer]
            memory.teach(wanted.streams[layer] - before)
        else:
            memory.teach(blocks[layer](seen.block_inputs[layer]))


@torch.no_grad()
def read(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> None:
    """Let the student's memories offer rows for token ids `(batch, time)`, without a gradient; `settle` takes them in.

    How much rows count beside the base is set by what they would have said of this text (`AssociativeMemory.weigh`).
    """
    memories = associative_of(student).values()
    for memory in memories:
        memory.writing = True
    try:
        wanted = observe_teacher(teacher, tokens, blocks=True)
        teach(student, teacher, observe(student, tokens, blocks=True), wanted)
        for memory in memories:
            memory.weigh()
    except BaseException:
        for memory in memories:
            memory.discard()
        raise
    finally:
        for memory in memories:
            memory.writing = False
