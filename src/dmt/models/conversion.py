"""Clone a teacher, put memories where its feed-forward blocks were, and account for every tensor.

Fewer or more slots than a feed-forward block has neurons, losing as little of the block as can be.

Parts are a memory's parameters by name, as `Architecture.read` gives them; `weights` are what the block's neurons answer
to calibration text, `(tokens, neurons)`. More slots give the same sum; fewer give it as far as the kept ones can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import AssociativeConfig, FeaturalConfig, MemoryConfig
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.slot_table import ACTIVATIONS
from dmt.models.architectures import Architecture, get_architecture
from dmt.models.modeling import build_student
from dmt.validation import ARG, ArgumentError

NOISE_SCALE = 0.1
"""How far the copies of a split slot differ, as a share of the value's size; small values of new slots, of the mean one's."""
SLOT_PARAMETERS = ("keys", "key_bias", "gains", "gain_bias", "values")

BlockTensors = dict[str, Tensor]


def resize_neurons(
    tensors: Mapping[str, Tensor], activations: Tensor, num_slots: int, seed: int = 0
) -> BlockTensors:
    """Return the tensors of a block with `num_slots` neurons.

    Fewer: the least important are left out, and the output bias takes over their mean. More:
    pairs of random neurons are added whose values cancel out.

    Args:
        tensors: the block's tensors by parameter of a memory.
        activations: of its neurons on calibration text, `(tokens, neurons)`.
        num_slots: neurons wanted.
        seed: of the random neurons.
    """
    if num_slots < len(tensors["keys"]):
        return _drop_neurons(tensors, activations, num_slots)
    if num_slots > len(tensors["keys"]):
        return _add_neurons(tensors, num_slots, torch.Generator().manual_seed(seed))
    return dict(tensors)


def neuron_importance(tensors: Mapping[str, Tensor], activations: Tensor) -> Tensor:
    """Mean squared length of what each neuron adds to the answer beyond its mean, `(neurons,)`."""
    return activations.var(0, correction=0) * tensors["values"].square().sum(-1)


def _select_neurons(tensors: Mapping[str, Tensor], indices: Tensor) -> BlockTensors:
    return {
        name: tensor[indices] if name in SLOT_PARAMETERS else tensor.clone()
        for name, tensor in tensors.items()
    }


def _output_bias(tensors: Mapping[str, Tensor]) -> Tensor:
    return (
        tensors["output_bias"]
        if "output_bias" in tensors
        else tensors["values"].new_zeros(tensors["values"].shape[1])
    )


def _drop_neurons(
    tensors: Mapping[str, Tensor], activations: Tensor, num_slots: int
) -> BlockTensors:
    order = neuron_importance(tensors, activations).argsort(descending=True)
    retained_ids, dropped_ids = order[:num_slots].sort().values, order[num_slots:]
    result = _select_neurons(tensors, retained_ids)
    dropped_mean = activations.mean(0)[dropped_ids] @ tensors["values"][dropped_ids]
    return result | {"output_bias": _output_bias(tensors) + dropped_mean}


def _add_neurons(
    tensors: Mapping[str, Tensor], num_slots: int, generator: torch.Generator
) -> BlockTensors:
    """The block's neurons and pairs of random ones whose small values cancel out, until training moves them apart."""
    count = num_slots - len(tensors["keys"])
    pairs = torch.arange(count) // 2
    result = dict(tensors)
    for name in SLOT_PARAMETERS:
        if name not in tensors:
            continue
        existing = tensors[name]
        scale = existing.std() * (NOISE_SCALE if name == "values" else 1)
        noise = (
            torch.randn((count + 1) // 2, *existing.shape[1:], generator=generator).to(existing)
            * scale
        )[pairs]
        if name == "values":
            signs = (
                torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)[:count].unsqueeze(-1).to(existing)
            )
            noise = (
                noise * signs * (pairs.bincount()[pairs] == 2).unsqueeze(-1)
            )  # an odd one out adds nothing
        result[name] = torch.cat([existing, noise])
    return result


DEFAULT_K_DIVISOR = 16
"""k = slots / 16 where the config leaves k empty."""


@dataclass(frozen=True)
class Transfer:
    """What became of one tensor: `copied`, `memory` (a slot's part), `dropped` (teacher only) or `new` (student only)."""

    source: str
    status: str
    target: str
    elements: int


@dataclass(frozen=True)
class TransferReport:
    """Every tensor of teacher and student, once."""

    transfers: list[Transfer]

    def summary(self) -> str:
        """One line: tensors and their elements by fate; a tied matrix counts under each of its names."""
        tensor_counts: Counter[str] = Counter()
        weight_counts: Counter[str] = Counter()
        for transfer in self.transfers:
            tensor_counts[transfer.status] += 1
            weight_counts[transfer.status] += transfer.elements
        return ", ".join(
            f"{tensor_counts[status]} {status} ({weight_counts[status]:,} weights)"
            for status in ("copied", "memory", "new", "dropped")
        )

    def format_table(self) -> str:
        """One line per tensor."""
        return "\n".join(
            f"{transfer.status:8} {transfer.source:40} {transfer.target:48} {transfer.elements:>12,}"
            for transfer in self.transfers
        )


def convert(
    teacher: PreTrainedModel,
    memory_configs: list[MemoryConfig],
    block_inputs: Sequence[Tensor] | None = None,
) -> tuple[PreTrainedModel, TransferReport]:
    """A student equal to `teacher` but for the blocks that `memories` (one entry per layer) turns into memories.

    With `init: ff`, activation weighting and k = slots its logits are the teacher's up to rounding, unless there are
    fewer slots than neurons.

    Args:
        block_inputs: what the teacher's blocks are given on calibration text, `(..., width)` a layer; needed where
            `slots` is not the block's number of neurons.

    Raises:
        UserError: a memory does not fit the block it replaces.
        RuntimeError: a tensor of either model is not accounted for.
    """
    arch = get_architecture(teacher.config.model_type)
    blocks = arch.blocks(teacher)
    assert len(blocks) == len(memory_configs), "one memory setting per layer"
    replaced = {
        layer: memory_config
        for layer, memory_config in enumerate(memory_configs)
        if memory_config.kind != "dense"
    }
    slot_arguments = {
        layer: _slot_arguments(layer, memory_config, arch, teacher)
        for layer, memory_config in replaced.items()
        if memory_config.has_slots
    }
    memory_arguments = {
        str(layer): {"rows": _row_arguments(memory_config), "base": slot_arguments.get(layer)}
        if isinstance(memory_config, AssociativeConfig)
        else slot_arguments[layer]
        for layer, memory_config in replaced.items()
    }
    student = build_student(teacher.config, memory_arguments, arch.no_dropout)
    block_tensors = {
        layer: _read_block_tensors(
            layer, replaced[layer], arch, teacher, slot_arguments[layer], block_inputs
        )
        for layer in slot_arguments
    }
    report = _transfer_weights(teacher, student, arch, replaced, block_tensors)
    return student.eval(), report


def get_memories(student: PreTrainedModel) -> dict[int, FeaturalMemory | AssociativeMemory]:
    """The memories of a student, of either kind, by layer."""
    blocks = get_architecture(student.config.model_type).blocks(student)
    return {
        layer: block
        for layer, block in enumerate(blocks)
        if isinstance(block, FeaturalMemory | AssociativeMemory)
    }


def get_featural_memories(student: PreTrainedModel) -> dict[int, FeaturalMemory]:
    """The featural memories of a student by layer, those that are the base of an associative one included."""
    memories = {
        layer: memory.base if isinstance(memory, AssociativeMemory) else memory
        for layer, memory in get_memories(student).items()
    }
    return {
        layer: memory for layer, memory in memories.items() if isinstance(memory, FeaturalMemory)
    }


def get_associative_memories(student: PreTrainedModel) -> dict[int, AssociativeMemory]:
    """The associative memories of a student by layer."""
    return {
        layer: memory
        for layer, memory in get_memories(student).items()
        if isinstance(memory, AssociativeMemory)
    }


def _slot_arguments(
    layer: int, memory_config: FeaturalConfig, arch: Architecture, teacher: PreTrainedModel
) -> dict[str, Any]:
    activation = getattr(teacher.config, arch.activation)
    num_neurons = len(arch.read_tensors(arch.blocks(teacher)[layer])["keys"])
    if memory_config.activation == "block" and activation not in ACTIVATIONS:
        raise ArgumentError(
            f"the blocks of this model use {activation!r}; memories have "
            f"{', '.join(ACTIVATIONS)}; set {ARG}activation=relu"
        )
    memory_config.check_block(num_neurons, gated=arch.gated)
    num_slots, heads = memory_config.num_slots or num_neurons, memory_config.heads
    auto_k = memory_config.k == "auto"
    requested_k = memory_config.mean_k if memory_config.k == "auto" else memory_config.k
    k = requested_k or max(heads, num_slots // DEFAULT_K_DIVISOR // heads * heads)
    return {
        "num_slots": num_slots,
        "k": k,
        "heads": memory_config.heads,
        "activation": memory_config.activation,
        "activation_function": activation,
        "selection": memory_config.selection,
        "metric": "euclidean" if memory_config.selection == "score" else memory_config.metric,
        "k_mode": "threshold" if auto_k else "top",
        "gradient": memory_config.gradient,
        "projections": memory_config.projections,
        "skip_connection": memory_config.skip_connection,
        "search": memory_config.search,
        "value_dtype": memory_config.value_dtype,
        "offload": memory_config.offload,
    }


def _row_arguments(memory_config: AssociativeConfig) -> dict[str, Any]:
    """Arguments of an `AssociativeMemory` but for its width and base, as they stand in a student's config."""
    policy = {
        "min_distance": memory_config.min_distance,
        "merge_distance": memory_config.merge_distance,
        "capacity": memory_config.capacity,
        "decay": memory_config.lrfu_decay,
    }
    return {
        "k": memory_config.knn_k,
        "value_target": memory_config.value_target,
        "insert_policy": policy,
        "allocated_rows": 0,
        "index": memory_config.index,
        "write_start": memory_config.write_start,
    }


@torch.no_grad()
def _read_block_tensors(
    layer: int,
    memory_config: FeaturalConfig,
    arch: Architecture,
    teacher: PreTrainedModel,
    arguments: dict[str, Any],
    block_inputs: Sequence[Tensor] | None,
) -> dict[str, Tensor]:
    """What the block of `layer` gives to its memory, resized where the memory has fewer or more slots."""
    tensors = arch.read_tensors(arch.blocks(teacher)[layer])
    num_neurons, width = tensors["keys"].shape
    if memory_config.init != "ff" or arguments["num_slots"] == num_neurons:
        return tensors
    if block_inputs is None:
        raise ValueError(
            f"{arguments['num_slots']} slots for {num_neurons} neurons need block_inputs: what the blocks are given"
        )
    full_memory = FeaturalMemory(
        width,
        num_neurons,
        num_neurons,
        activation_function=arguments["activation_function"],
        gated=arch.gated,
        selection="score",
    )
    full_memory.load_feedforward(tensors)
    hidden = block_inputs[layer].reshape(-1, width).to(tensors["keys"].device)
    full_memory.to(hidden)
    activations = full_memory.compute_weights(hidden, full_memory.compute_scores(hidden))
    return resize_neurons(
        tensors,
        activations,
        arguments["num_slots"],
        seed=layer,
    )


@torch.no_grad()
def _transfer_weights(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    arch: Architecture,
    memory_configs: dict[int, MemoryConfig],
    block_tensors: dict[int, dict[str, Tensor]],
) -> TransferReport:
    teacher_state, student_state = teacher.state_dict(), student.state_dict()
    transfers: list[Transfer] = []
    filled: set[str] = set()
    for layer, memory_config in memory_configs.items():
        name = arch.block_name(layer)
        teacher_block, student_block = arch.blocks(teacher)[layer], arch.blocks(student)[layer]
        slot_memory = (
            student_block.base if isinstance(student_block, AssociativeMemory) else student_block
        )
        copies_block = isinstance(slot_memory, FeaturalMemory) and memory_config.init == "ff"
        slots_name = f"{name}.base" if isinstance(student_block, AssociativeMemory) else name
        if copies_block:
            slot_memory.load_feedforward(block_tensors[layer])  # type: ignore[union-attr,operator]
        for parameter, source_tensor in arch.read_tensors(teacher_block).items():
            source = f"{name}.{arch.tensor_names[parameter]}"
            if copies_block:
                transfers.append(
                    Transfer(source, "memory", f"{slots_name}.{parameter}", source_tensor.numel())
                )
                filled.add(f"{slots_name}.{parameter}")
            else:
                transfers.append(Transfer(source, "dropped", "-", source_tensor.numel()))
        for parameter in student_block.state_dict():
            if f"{name}.{parameter}" not in filled:
                transfers.append(
                    Transfer(
                        "-",
                        "new",
                        f"{name}.{parameter}",
                        student_state[f"{name}.{parameter}"].numel(),
                    )
                )
                filled.add(f"{name}.{parameter}")
    accounted = {transfer.source for transfer in transfers}
    for tensor_name, value in teacher_state.items():
        if tensor_name in accounted:
            continue
        if tensor_name not in student_state or student_state[tensor_name].shape != value.shape:
            raise RuntimeError(
                f"surgery: teacher tensor {tensor_name} {tuple(value.shape)} has no place in the student"
            )
        student_state[tensor_name].copy_(value)  # a view of the student's parameter
        transfers.append(Transfer(tensor_name, "copied", tensor_name, value.numel()))
        filled.add(tensor_name)
    if missing := sorted(set(student_state) - filled):
        raise RuntimeError(f"surgery: student tensors were given nothing: {', '.join(missing)}")
    return TransferReport(transfers)
