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
from dmt.memory.paging import Mapped, Table, whole, write
from dmt.models.architectures import architecture_of

SLOTS = "slots.safetensors"
"""The file beside a saved student's weights that holds what its memories leave to it."""


class FiledEmbedding(nn.Module):
    """An embedding whose table is in the file: each id reads its row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.empty(0, 0)
        self.register_buffer("like", torch.empty(0), persistent=False)  # its type is the model's
        self.like: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(...)` to rows `(..., width)`."""
        return F.embedding(ids, self.table).to(self.like.dtype)


def filed_in(model: nn.Module) -> dict[str, FeaturalMemory]:
    """The memories of `model` that, saved, leave tensors to the file, by their names in it."""
    return {name: part for name, part in model.named_modules() if isinstance(part, FeaturalMemory) and part.is_filed}


def positions_in(model: Any) -> str:
    """Path of the table of positions where it goes into the file too: with slots that are, all that is read row by row."""
    slots = any(memory.disk == "slots" for memory in filed_in(model).values())
    return architecture_of(model.config.model_type).positions if slots else ""


def away(model: nn.Module) -> set[str]:
    """Names of the tensors that are then not among the weights."""
    names = {f"{name}.{tensor}" for name, memory in filed_in(model).items() for tensor in memory.away}
    return names | ({f"{place}.weight"} if (place := positions_in(model)) else set())


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of weights, buffers included, that a model holds in RAM and that it leaves on the disk."""
    held = {id(part): part.nbytes for part in (*model.parameters(), *model.buffers())}
    found = [memory.filed_sizes() for memory in filed_in(model).values()]
    tables = sum(part.table.nbytes for part in model.modules() if isinstance(part, FiledEmbedding))
    return {"ram": sum(held.values()) + sum(each["ram"] for each in found), "disk": tables + sum(each["disk"] for each in found)}


def put(model: nn.Module, folder: Path) -> str | None:
    """Write into `folder` what memories leave to the file, or copy the file they read; its digest, None where there is nothing.

    Raises:
        UserError: there is no room, or the file the memories read is not there any more.
    """
    memories, place = filed_in(model), folder / SLOTS
    if not memories:
        return None
    opened = getattr(model, "slots_file", None)
    folder.mkdir(parents=True, exist_ok=True)
    if opened is None:
        tables = {f"{name}.{part}": table for name, memory in memories.items() for part, table in memory.tables().items()}
        return write(place, tables | _positions(model))
    if not place.exists() or not place.samefile(opened.file):
        _copy(opened, place)
    return opened.digest


def _positions(model: nn.Module) -> dict[str, Table]:
    if not (place := positions_in(model)):
        return {}
    weight = model.get_submodule(place).weight
    assert isinstance(weight, Tensor), "an embedding's table"
    return {f"{place}.weight": whole(weight.float())}


def _copy(opened: Mapped, place: Path) -> None:
    partial = place.with_name(f"{SLOTS}.partial")
    try:
        shutil.copyfile(opened.file, partial)
        if Mapped(partial).digest != opened.digest:
            raise UserError(f"{opened.file} is another file than the one this student was loaded from; load it anew to save it")
        partial.replace(place)
    except OSError as error:
        raise UserError(f"{opened.file} cannot be copied to {place} ({error.strerror}); load the student anew to save it") from None
    finally:
        partial.unlink(missing_ok=True)


def leave(model: nn.Module) -> None:
    """Give up what memories leave to the file, before weights are loaded."""
    for memory in filed_in(model).values():
        memory.leave()
    if place := positions_in(model):
        model.set_submodule(place, FiledEmbedding())


def take(model: nn.Module, file: Path, digest: str) -> None:
    """Let a model just loaded read its slots from `file`.

    Raises:
        UserError: it is not there, cut short, or another student's.
    """
    mapped = Mapped(file)
    if mapped.digest != digest:
        raise UserError(f"{file} belongs to another student than the weights beside it; put the right one in its place")
    for name, memory in filed_in(model).items():
        memory.take(mapped, name)
    if place := positions_in(model):
        positions = model.get_submodule(place)
        assert isinstance(positions, FiledEmbedding), "put there by `leave`"
        positions.table = mapped[f"{place}.weight"]
    object.__setattr__(model, "slots_file", mapped)
