"""What tells one model from another."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory
from dmt.models.architectures import get_architecture


def hash_model(model: PreTrainedModel) -> str:
    """A digest of a model's blocks' function, of what its memories read and of all its weights, wherever it lies.

    Stored rows are none of them: they come and go while the model stays what it is.
    """
    architecture = get_architecture(model.config.model_type)
    digest = hashlib.sha256(
        f"{model.config.model_type} {getattr(model.config, architecture.activation)}".encode()
    )
    for layer, memory in sorted((getattr(model.config, "memory", None) or {}).items()):
        arguments = {**memory, "allocated_rows": 0} if "allocated_rows" in memory else memory
        digest.update(f" {layer} {json.dumps(arguments, sort_keys=True)}".encode())
    if slots_digest := getattr(
        model.config, "external_tensors", None
    ):  # those that are in a file, by its digest
        digest.update(f" slots {slots_digest}".encode())
    row_prefixes = tuple(
        f"{name}.rows."
        for name, module in model.named_modules()
        if isinstance(module, AssociativeMemory)
    )
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(row_prefixes):
            continue
        digest.update(f" {name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
