"""Convert a model: clone it with memories in place of feed-forward blocks.

Every tensor of both models is accounted for in a `TransferReport`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import DenseConfig, FeaturalConfig, MemoryConfig
from dmt.config_io import check_shared_budget, select_layers
from dmt.errors import UserError
from dmt.memory import FeaturalMemory, NgramMemory, SumMemory, TokenMemory
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.registry import get_memory_class
from dmt.memory.slot_table import ACTIVATIONS, NEURON_PARAMETERS, take_neurons
from dmt.models.architectures import Architecture, get_architecture
from dmt.models.calibration import calibrate_memories
from dmt.models.equivalence import check_equivalence, has_tied_head
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_featural_memories, get_memories
from dmt.models.modeling import build_student

NEW_VALUE_SCALE = 0.1  # size of the values of new slots, as a fraction of the block's

BlockTensors = dict[str, Tensor]


@dataclass(frozen=True)
class Transfer:
    """The fate of one tensor.

    Attributes:
        source: its name in the teacher, or `-`.
        status: `copied`, `memory` (now part of a memory), `dropped` (teacher only) or `new`
            (student only).
        target: its name in the student, or `-`.
        elements: numbers in it.
    """

    source: str
    status: str
    target: str
    elements: int


@dataclass(frozen=True)
class TransferReport:
    """The fate of every tensor of teacher and student, each once."""

    transfers: list[Transfer]

    def __repr__(self) -> str:
        return f"TransferReport({self.summary()})"

    def summary(self) -> str:
        """Return one line: tensors and weights by status; a tied matrix counts under each name."""
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
        """Return one line per tensor."""
        return "\n".join(
            f"{row.status:8} {row.source:40} {row.target:48} {row.elements:>12,}"
            for row in self.transfers
        )


def convert(
    model: PreTrainedModel,
    config: MemoryConfig | Sequence[MemoryConfig] | None = None,
    *,
    layers: str | int | Sequence[int] | None = None,
    calibration: Tensor | Sequence[Sequence[int]] | None = None,
) -> PreTrainedModel:
    """Return a copy of a model with memories in place of its feed-forward blocks.

    Without training the copy computes what the model does as far as its memories can: with
    `k = num_slots` its logits are equal. `student.transfer_report` has the fate of every tensor.

    ```python
    student = dmt.convert(model, dmt.FeaturalConfig(k=32), calibration=token_ids)
    ```

    Args:
        model: a GPT-2 or Llama language model; it stays as it is.
        config: settings of the memories, or a list with those of each layer; featural memories
            where None.
        layers: layers that get a memory: `all`, `last`, `0-2`, a number or a list of them; all
            where None. The others keep their block.
        calibration: token ids `(windows, time)` of text, from which the memories are calibrated.
            Needed with fewer slots than the block has neurons, and with `k="auto"`.

    Raises:
        UserError: the family is not supported, the model has memories already, a memory does not
            fit its block, or calibration text is needed.
    """
    arch = get_architecture(model.config.model_type)
    if model.config.model_type.startswith("dmt_"):
        raise UserError("model is a student already: convert the model that it was made from")
    memory_configs = _list_configs(config, layers, len(arch.blocks(model)))
    windows = None if calibration is None else _check_windows(calibration, model)
    featural = [
        part
        for memory in memory_configs
        for part in memory.list_parts()
        if isinstance(part, FeaturalConfig)
    ]
    if windows is None and any(memory.has_slots and memory.k == "auto" for memory in featural):
        raise UserError(
            "k=auto is set from text: give calibration token ids (windows, time), or set k to a "
            "number"
        )
    block_inputs = None
    if windows is not None:
        block_inputs = forward_teacher(model, windows, capture_blocks=True).block_inputs
    student, report = convert_blocks(model, memory_configs, block_inputs)
    if windows is not None:
        calibrate_memories(student, model, windows)
    student.transfer_report = report  # type: ignore[assignment]
    return student


def _list_configs(
    config: MemoryConfig | Sequence[MemoryConfig] | None,
    layers: str | int | Sequence[int] | None,
    num_layers: int,
) -> list[MemoryConfig]:
    if config is None or isinstance(config, MemoryConfig):
        configs: list[MemoryConfig] = [config or FeaturalConfig()] * num_layers
    else:
        configs = list(config)
        if len(configs) != num_layers or not all(isinstance(c, MemoryConfig) for c in configs):
            raise UserError(
                f"config must be a MemoryConfig or a list of {num_layers}, one for each layer, got "
                f"{len(configs)}"
            )
    if layers is None:
        return configs
    selector = layers if isinstance(layers, str) else _join_layers(layers)
    selected = set(select_layers(selector, num_layers, "layers"))
    return [memory if layer in selected else DenseConfig() for layer, memory in enumerate(configs)]


def _join_layers(layers: int | Sequence[int]) -> str:
    return str(layers) if isinstance(layers, int) else ",".join(map(str, layers))


def _check_windows(calibration: Any, model: PreTrainedModel) -> Tensor:
    windows = torch.as_tensor(calibration)
    if windows.dim() == 1:
        windows = windows.unsqueeze(0)
    if windows.dim() != 2 or windows.is_floating_point() or not windows.numel():
        raise UserError(
            f"calibration must be token ids (windows, time), got {windows.dtype} of shape "
            f"{tuple(windows.shape)}"
        )
    if int(windows.min()) < 0 or int(windows.max()) >= model.config.vocab_size:
        raise UserError(
            f"calibration must have token ids in [0, {model.config.vocab_size - 1}], got "
            f"{int(windows.min())} to {int(windows.max())}"
        )
    return windows.to(model.device)


def convert_blocks(
    teacher: PreTrainedModel,
    memory_configs: Sequence[MemoryConfig],
    block_inputs: Sequence[Tensor] | None = None,
) -> tuple[PreTrainedModel, TransferReport]:
    """Return a student without calibration, and the fate of every tensor.

    With `init: ff`, `activation: block` and k = num_slots its logits are the teacher's up to
    rounding, unless there are fewer slots than neurons; this is checked on one window. The head is
    tied to the embeddings where it is in `teacher`, whatever its config says, and the generation
    settings are the teacher's.

    Args:
        teacher: the model to clone.
        memory_configs: settings of each layer.
        block_inputs: inputs of the teacher's blocks on calibration text, `(..., width)` a layer;
            needed where a memory has fewer slots than its block has neurons.

    Raises:
        ArgumentError: a memory does not fit the block that it replaces.
        UserError: the clone does not compute what the teacher does.
        RuntimeError: a tensor of either model is not accounted for.
    """
    arch = get_architecture(teacher.config.model_type)
    blocks = arch.blocks(teacher)
    assert len(blocks) == len(memory_configs), "one memory config per layer"
    check_shared_budget(memory_configs)
    replaced = {
        layer: memory_config
        for layer, memory_config in enumerate(memory_configs)
        if not isinstance(memory_config, DenseConfig)
    }
    arguments = {
        str(layer): {
            "kind": memory_config.kind,
            **get_memory_class(memory_config.kind).make_arguments(
                memory_config, _block_shape(arch, teacher, layer)
            ),
        }
        for layer, memory_config in replaced.items()
    }
    student_config = copy.deepcopy(teacher.config)
    student_config.tie_word_embeddings = has_tied_head(teacher)
    student = build_student(student_config, arguments, arch.no_dropout)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    block_tensors = {
        layer: _read_block_tensors(layer, memory, arch, teacher, block_inputs)
        for layer, memory in get_memories(student).items()
        if replaced[layer].copies_block
    }
    report, tensor_pairs = _transfer_weights(teacher, student, arch, block_tensors)
    activation_fn = ACTIVATIONS.get(arch.read_activation(teacher.config))
    whole_memories = {
        layer: memory
        for layer, memory in get_featural_memories(student).items()
        if layer in block_tensors
        and _adds_nothing_else(get_memories(student)[layer])
        and memory.activation_fn is activation_fn
        and (memory.gains is not None) == arch.gated
        and memory.num_slots >= len(arch.read_tensors(arch.blocks(teacher)[layer])["keys"])
    }
    check_equivalence(teacher, student.eval(), whole_memories, tensor_pairs)
    return student, report


def _adds_nothing_else(memory: MemoryLayer) -> bool:
    """Check whether what stands beside the copy of a block begins as zero, as lookups do."""
    if not isinstance(memory, SumMemory):
        return True
    return all(
        isinstance(part, NgramMemory | TokenMemory)
        for index, part in enumerate(memory.list_parts())
        if index != memory.block_part
    )


def _block_shape(arch: Architecture, teacher: PreTrainedModel, layer: int) -> BlockShape:
    num_neurons, width = arch.read_tensors(arch.blocks(teacher)[layer])["keys"].shape
    return BlockShape(
        width,
        num_neurons,
        arch.gated,
        arch.read_activation(teacher.config),
        teacher.config.vocab_size,
    )


@torch.no_grad()
def _read_block_tensors(
    layer: int,
    memory: MemoryLayer,
    arch: Architecture,
    teacher: PreTrainedModel,
    block_inputs: Sequence[Tensor] | None,
) -> BlockTensors:
    """Return the tensors of a teacher's block, resized to the slots of its memory."""
    tensors = arch.read_tensors(arch.blocks(teacher)[layer])
    num_neurons, width = tensors["keys"].shape
    num_slots = memory.block_slots
    if num_slots is None or num_slots == num_neurons:
        return tensors
    if num_slots > num_neurons:
        return resize_neurons(tensors, None, num_slots, seed=layer)
    if block_inputs is None:
        raise UserError(
            f"num_slots={num_slots} for {num_neurons} neurons need calibration text: give "
            "calibration (convert) or block_inputs (convert_blocks)"
        )
    block = FeaturalMemory(
        width,
        num_neurons,
        num_neurons,
        activation="block",
        activation_function=arch.read_activation(teacher.config),
        gated=arch.gated,
        selection="score",
    )
    block.load_feedforward(tensors)
    hidden = block_inputs[layer].reshape(-1, width).to(tensors["keys"].device)
    block.to(hidden)
    activations = block.compute_weights(hidden, block.compute_scores(hidden))
    return resize_neurons(tensors, activations, num_slots, seed=layer)


@torch.no_grad()
def _transfer_weights(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    arch: Architecture,
    block_tensors: Mapping[int, BlockTensors],
) -> tuple[TransferReport, dict[str, tuple[Tensor, Tensor]]]:
    """Copy the weights; return the fate of every tensor, and the pairs that have to be equal."""
    teacher_state, student_state = teacher.state_dict(), student.state_dict()
    transfers: list[Transfer] = []
    filled: set[str] = set()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, memory in get_memories(student).items():
        name = arch.block_name(layer)
        targets = memory.load_block(block_tensors[layer]) if layer in block_tensors else {}
        for parameter, source_tensor in arch.read_tensors(arch.blocks(teacher)[layer]).items():
            source, elements = f"{name}.{arch.tensor_names[parameter]}", source_tensor.numel()
            if parameter in targets:
                target = f"{name}.{targets[parameter]}"
                transfers.append(Transfer(source, "memory", target, elements))
                pairs[source] = block_tensors[layer][parameter], student_state[target]
                filled.add(target)
            else:
                transfers.append(Transfer(source, "dropped", "-", elements))
        for parameter, tensor in memory.state_dict().items():
            target = f"{name}.{parameter}"
            if target not in filled:
                elements = tensor.numel() if isinstance(tensor, Tensor) else 0
                transfers.append(Transfer("-", "new", target, elements))
                filled.add(target)
    accounted = {transfer.source for transfer in transfers}
    for tensor_name, value in teacher_state.items():
        if tensor_name in accounted:
            continue
        if tensor_name not in student_state or student_state[tensor_name].shape != value.shape:
            raise RuntimeError(
                f"conversion: the student has no tensor for {tensor_name} {tuple(value.shape)} of "
                "the teacher"
            )
        student_state[tensor_name].copy_(value)  # a view of the student's parameter
        transfers.append(Transfer(tensor_name, "copied", tensor_name, value.numel()))
        pairs[tensor_name] = value, student_state[tensor_name]
        filled.add(tensor_name)
    if missing := sorted(set(student_state) - filled):
        raise RuntimeError(f"conversion: student tensors were not set: {', '.join(missing)}")
    return TransferReport(transfers), pairs


def resize_neurons(
    tensors: Mapping[str, Tensor], activations: Tensor | None, num_slots: int, seed: int = 0
) -> BlockTensors:
    """Return the tensors of a block with `num_slots` neurons.

    Fewer: the least important are left out, and the output bias takes over their mean. More:
    pairs of random neurons are added whose values cancel out.

    Args:
        tensors: the block's tensors by parameter of a memory.
        activations: of its neurons on calibration text, `(tokens, neurons)`; needed for fewer.
        num_slots: neurons wanted.
        seed: of the random neurons.
    """
    if num_slots < len(tensors["keys"]):
        assert activations is not None, "the least important neurons are found from text"
        return _drop_neurons(tensors, activations, num_slots)
    if num_slots > len(tensors["keys"]):
        return _add_neurons(tensors, num_slots, torch.Generator().manual_seed(seed))
    return dict(tensors)


def neuron_importance(tensors: Mapping[str, Tensor], activations: Tensor) -> Tensor:
    """Return the mean squared deviation of each neuron's output from its mean, `(neurons,)`."""
    return activations.var(0, correction=0) * tensors["values"].square().sum(-1)


def _drop_neurons(
    tensors: Mapping[str, Tensor], activations: Tensor, num_slots: int
) -> BlockTensors:
    order = neuron_importance(tensors, activations).argsort(descending=True)
    retained_ids, dropped_ids = order[:num_slots].sort().values, order[num_slots:]
    result = take_neurons(tensors, retained_ids)
    values = tensors["values"]
    output_bias = tensors.get("output_bias", values.new_zeros(values.shape[1]))
    dropped_mean = activations.mean(0)[dropped_ids] @ values[dropped_ids]
    return result | {"output_bias": output_bias + dropped_mean}


def _add_neurons(
    tensors: Mapping[str, Tensor], num_slots: int, generator: torch.Generator
) -> BlockTensors:
    """Add pairs of random neurons whose small values cancel out until training moves them."""
    count = num_slots - len(tensors["keys"])
    pairs = torch.arange(count) // 2
    result = dict(tensors)
    for name in NEURON_PARAMETERS:
        if name not in tensors:
            continue
        existing = tensors[name]
        scale = existing.std() * (NEW_VALUE_SCALE if name == "values" else 1)
        noise = torch.randn((count + 1) // 2, *existing.shape[1:], generator=generator)
        new = (noise.to(existing) * scale)[pairs]
        if name == "values":
            signs = torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)[:count].to(existing)
            is_paired = pairs.bincount()[pairs] == 2  # an odd one out adds nothing
            new = new * (signs * is_paired.to(existing)).unsqueeze(-1)
        result[name] = torch.cat([existing, new])
    return result
