"""The file beside a saved student that holds tensors of its memories instead of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.files import atomic_path, disk_error_class
from dmt.memory.mmap_tensors import (
    ExternalTensorsMixin,
    MmapTensorFile,
    TensorSpec,
    gather_rows,
    make_spec,
    raise_not_attached,
    write_tensor_file,
)
from dmt.models.architectures import get_architecture

# Name of the file in a student's folder.
SLOTS_FILE = "slots.safetensors"


class MmapEmbedding(nn.Module):
    """An embedding whose table is in the file: each id reads its row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.empty(0, 0)
        self._attached_file: tuple[MmapTensorFile, str] | None = None
        self.like: Tensor
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the model's dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids `(...)` to rows `(..., width)`."""
        if not len(self.table):
            raise_not_attached()
        return gather_rows(self.table, ids).to(self.like.dtype)

    def attach_file(self, file: MmapTensorFile, name: str) -> None:
        """Read the tensor `name` of a file."""
        self.table, self._attached_file = file[name], (file, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"table": torch.empty(0, 0)}  # copies map the file again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._attached_file is not None:
            self.attach_file(*self._attached_file)


def find_external_modules(model: nn.Module) -> dict[str, ExternalTensorsMixin]:
    """Return the modules of `model` that save tensors to the file, by name in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExternalTensorsMixin) and module.has_external_tensors
    }


def position_embedding_path(model: Any) -> str:
    """Return the name in `model` of the position embedding where it goes into the file, else "".

    It does with `offload="slots"`, so that everything read row by row is in the file.
    """
    arch = get_architecture(model.config.model_type)
    has_mmap_slots = any(
        module.offload == "slots" for module in find_external_modules(model).values()
    )
    if not has_mmap_slots or not arch.position_embedding:
        return ""
    return arch.local_name(model, arch.position_embedding)


def external_tensor_names(model: nn.Module) -> set[str]:
    """Return the names of the tensors that are in the file instead of among the weights."""
    names = {
        f"{name}.{tensor_name}"
        for name, module in find_external_modules(model).items()
        for tensor_name in module.external_names
    }
    return names | ({f"{path}.weight"} if (path := position_embedding_path(model)) else set())


def measure_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of weights and buffers in `ram` and left on `disk`."""
    resident = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    external_sizes = [module.external_sizes() for module in find_external_modules(model).values()]
    embedding_bytes = sum(
        module.table.nbytes for module in model.modules() if isinstance(module, MmapEmbedding)
    )
    return {
        "ram": sum(resident.values()) + sum(size["ram"] for size in external_sizes),
        "disk": embedding_bytes + sum(size["disk"] for size in external_sizes),
    }


def save_model_tensors(model: Any, folder: Path) -> str | None:
    """Write the file of a model into `folder`, or copy the file that the model reads.

    Names in the file begin at the language model, whichever class of the family is saved.

    Returns:
        The file's digest; None where the model has no external tensors.

    Raises:
        UserError: there is no space, or the file that the model reads is gone or another one.
    """
    modules, path = find_external_modules(model), folder / SLOTS_FILE
    if not modules:
        return None
    mapped: MmapTensorFile | None = getattr(model, "slots_file", None)
    folder.mkdir(parents=True, exist_ok=True)
    if mapped is None:
        arch = get_architecture(model.config.model_type)
        specs = {
            f"{arch.global_name(model, name)}.{tensor_name}": spec
            for name, module in modules.items()
            for tensor_name, spec in module.export_specs().items()
        }
        return write_tensor_file(path, specs | _position_specs(model))
    if not path.exists() or not path.samefile(mapped.path):
        _copy_mapped_file(mapped, path)
    return mapped.digest


def _position_specs(model: Any) -> dict[str, TensorSpec]:
    if not (path := position_embedding_path(model)):
        return {}
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor), "an embedding has one weight"
    name = get_architecture(model.config.model_type).position_embedding
    return {f"{name}.weight": make_spec(weight.float())}


def _copy_mapped_file(mapped: MmapTensorFile, path: Path) -> None:
    try:
        with atomic_path(path, fsync=False) as partial_path:
            shutil.copyfile(mapped.path, partial_path)
            if MmapTensorFile(partial_path).digest != mapped.digest:
                raise UserError(
                    f"{mapped.path} is no longer the file that this student was loaded from; load "
                    "the student again to save it"
                )
    except OSError as error:
        raise disk_error_class(error)(
            f"cannot copy {mapped.path} to {path} ({error.strerror}); load the student again to "
            "save it"
        ) from None


def release_model_tensors(model: nn.Module) -> None:
    """Drop the tensors that are in the file, before weights are loaded."""
    for module in find_external_modules(model).values():
        module.release_tensors()
    if path := position_embedding_path(model):
        model.set_submodule(path, MmapEmbedding())


def attach_model_file(model: Any, path: Path, digest: str) -> None:
    """Make a model that was just loaded read its slots from a file.

    Args:
        model: loaded after `release_model_tensors`.
        path: the file.
        digest: that the file has to have.

    Raises:
        UserError: the file is missing, incomplete, or belongs to another student.
    """
    mapped = MmapTensorFile(path)
    if mapped.digest != digest:
        raise UserError(
            f"{path} belongs to another student than the weights beside it; replace it with this "
            "student's file"
        )
    arch = get_architecture(model.config.model_type)
    for name, module in find_external_modules(model).items():
        module.attach_file(mapped, arch.global_name(model, name))
    if embedding_path := position_embedding_path(model):
        embedding = model.get_submodule(embedding_path)
        assert isinstance(embedding, MmapEmbedding), "set by release_model_tensors"
        embedding.attach_file(mapped, f"{arch.position_embedding}.weight")
    for owner in (model, model.base_model):  # either may be saved
        object.__setattr__(owner, "slots_file", mapped)  # not an attribute that nn.Module checks
