"""Fingerprint of a model, which ties stored rows and facts to the model they were written for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory
from dmt.models.architectures import get_architecture

# Types in which people save a model; rounded to them it is still the same model.
ROUNDED_DTYPES = (torch.bfloat16, torch.float16)


def hash_model(
    model: PreTrainedModel,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> str:
    """Hash a model's family, activation, memory arguments and weights, wherever they are stored.

    Stored rows are left out: they come and go while the model stays the same.

    Args:
        model: in any type; weights that are equal in float32 have the same hash.
        dtype: hash the model as if it was saved in this type.
        state_dict: weights to hash instead of the model's own.
    """
    architecture = get_architecture(model.config.model_type)
    digest = hashlib.sha256(
        f"{model.config.model_type} {getattr(model.config, architecture.activation)}".encode()
    )
    for layer, memory in sorted((getattr(model.config, "memory", None) or {}).items()):
        arguments = {**memory, "allocated_rows": 0} if "allocated_rows" in memory else memory
        digest.update(f" {layer} {json.dumps(arguments, sort_keys=True)}".encode())
    # Slots in a file of their own are represented by its digest.
    if slots_digest := getattr(model.config, "external_tensors", None):
        digest.update(f" slots {slots_digest}".encode())
    for name, tensor in _iterate_weights(model, state_dict):
        rounded = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f" {name} {tuple(tensor.shape)} ".encode())
        digest.update(rounded.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_rounded(model: PreTrainedModel) -> dict[str, str]:
    """Return the hashes of a model saved in each of `ROUNDED_DTYPES`, by the type's name."""
    return {str(dtype).removeprefix("torch."): hash_model(model, dtype) for dtype in ROUNDED_DTYPES}


def _iterate_weights(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    row_prefixes = tuple(
        f"{name}.rows."
        for name, module in model.named_modules()
        if isinstance(module, AssociativeMemory)
    )
    weights = model.state_dict() if state_dict is None else state_dict
    for name, tensor in sorted(weights.items()):
        if not name.startswith(row_prefixes):
            yield name, _load_offloaded(model, name) if tensor.is_meta else tensor


def _load_offloaded(model: PreTrainedModel, name: str) -> Tensor:
    """Return a weight that `device_map` left on the disk."""
    from accelerate.utils import align_module_device  # it offloaded the weight

    module_name, _, weight_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    with align_module_device(module, torch.device("cpu")):
        weight: Tensor = getattr(module, weight_name)
        return weight.detach().clone()
