"""Fingerprint of a model, which ties stored rows and facts to the model they were written for."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory
from dmt.models.architectures import get_architecture


def hash_model(model: PreTrainedModel) -> str:
    """Hash a model's family, activation, memory arguments and weights, wherever they are stored.

    Stored rows are left out: they come and go while the model stays the same.
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
