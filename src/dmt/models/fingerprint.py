"""What tells one model from another."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory
from dmt.models.architectures import architecture_of


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's blocks' function, of what its memories read and of all its weights, wherever it lies.

    Stored rows are none of them: they come and go while the model stays what it is.
    """
    architecture = architecture_of(model.config.model_type)
    digest = hashlib.sha256(f"{model.config.model_type} {getattr(model.config, architecture.activation)}".encode())
    for layer, memory in sorted((getattr(model.config, "memory", None) or {}).items()):
        told = {**memory, "rows": {**memory["rows"], "places": 0}} if "rows" in memory else memory
        digest.update(f" {layer} {json.dumps(told, sort_keys=True)}".encode())
    if slots := getattr(model.config, "slots", None):  # those that are in a file, by its digest
        digest.update(f" slots {slots}".encode())
    stored = tuple(f"{name}.rows." for name, part in model.named_modules() if isinstance(part, AssociativeMemory))
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(stored):
            continue
        digest.update(f" {name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
