"""The slots of a saved student that are not among its weights, and positions with them: the file, written and opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.memory import FeaturalMemory
from dmt.memory.mmap_tensors import MmapTensorFile, TensorSpec, make_spec, write_tensor_file
from dmt.models.architectures import get_architecture

SLOTS_FILE = "slots.safetensors"
"""The file beside a saved student's weights that holds what its memories leave to it."""


class MmapEmbedding(nn.Module):
    """An embedding whose table is in the file: each id reads its row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.empty(0, 0)
        self.register_buffer("like", torch.empty(0), persistent=False)  # its type is the model's
        self.like: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(...)` to rows `(..., width)`."""
        return F.embedding(ids, self.table).to(self.like.dtype)


def find_mmap_memories(model: nn.Module) -> dict[str, FeaturalMemory]:
    """The memories of `model` that, saved, leave tensors to the file, by their names in it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FeaturalMemory) and module.has_external_tensors
    }


def position_embedding_path(model: Any) -> str:
    """Path of the table of positions where it goes into the file too: with slots that are, all that is read row by row."""
    has_mmap_slots = any(memory.offload == "slots" for memory in find_mmap_memories(model).values())
    return get_architecture(model.config.model_type).position_embedding if has_mmap_slots else ""


def external_tensor_names(model: nn.Module) -> set[str]:
    """Names of the tensors that are then not among the weights."""
    names = {
        f"{name}.{tensor}"
        for name, memory in find_mmap_memories(model).items()
        for tensor in memory.external_names
    }
    return names | ({f"{path}.weight"} if (path := position_embedding_path(model)) else set())


def measure_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of weights, buffers included, that a model holds in RAM and that it leaves on the disk."""
    resident = {id(part): part.nbytes for part in (*model.parameters(), *model.buffers())}
    memory_sizes = [memory.external_sizes() for memory in find_mmap_memories(model).values()]
    tables = sum(part.table.nbytes for part in model.modules() if isinstance(part, MmapEmbedding))
    return {
        "ram": sum(resident.values()) + sum(size["ram"] for size in memory_sizes),
        "disk": tables + sum(size["disk"] for size in memory_sizes),
    }


def save_model_tensors(model: nn.Module, folder: Path) -> str | None:
    """Write into `folder` what memories leave to the file, or copy the file they read; its digest, None where there is nothing.

    Raises:
        UserError: there is no room, or the file the memories read is not there any more.
    """
    memories, path = find_mmap_memories(model), folder / SLOTS_FILE
    if not memories:
        return None
    mapped = getattr(model, "slots_file", None)
    folder.mkdir(parents=True, exist_ok=True)
    if mapped is None:
        tables = {
            f"{name}.{tensor_name}": table
            for name, memory in memories.items()
            for tensor_name, table in memory.export_specs().items()
        }
        return write_tensor_file(path, tables | _position_tables(model))
    if not path.exists() or not path.samefile(mapped.file):
        _copy_mapped_file(mapped, path)
    return mapped.digest


def _position_tables(model: nn.Module) -> dict[str, TensorSpec]:
    if not (path := position_embedding_path(model)):
        return {}
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor), "an embedding's table"
    return {f"{path}.weight": make_spec(weight.float())}


def _copy_mapped_file(mapped: MmapTensorFile, path: Path) -> None:
    partial = path.with_name(f"{SLOTS_FILE}.partial")
    try:
        shutil.copyfile(mapped.path, partial)
        if MmapTensorFile(partial).digest != mapped.digest:
            raise UserError(
                f"{mapped.path} is another file than the one this student was loaded from; load it anew to save it"
            )
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{mapped.path} cannot be copied to {path} ({error.strerror}); load the student anew to save it"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def release_model_tensors(model: nn.Module) -> None:
    """Give up what memories leave to the file, before weights are loaded."""
    for memory in find_mmap_memories(model).values():
        memory.release_tensors()
    if path := position_embedding_path(model):
        model.set_submodule(path, MmapEmbedding())


def attach_model_file(model: nn.Module, file: Path, digest: str) -> None:
    """Let a model just loaded read its slots from `file`.

    Raises:
        UserError: it is not there, cut short, or another student's.
    """
    mapped = MmapTensorFile(file)
    if mapped.digest != digest:
        raise UserError(
            f"{file} belongs to another student than the weights beside it; put the right one in its place"
        )
    for name, memory in find_mmap_memories(model).items():
        memory.attach_file(mapped, name)
    if path := position_embedding_path(model):
        positions = model.get_submodule(path)
        assert isinstance(positions, MmapEmbedding), "put there by `leave`"
        positions.table = mapped[f"{path}.weight"]
    object.__setattr__(model, "slots_file", mapped)
