"""Load a model with the packs of facts that are plugged in: `dmt.load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dmt.editing.fact_store import FactStore, find_student_folder
from dmt.editing.packs import FactPack, plug_packs
from dmt.models import loading
from dmt.models.fact_hooks import get_fact_hooks


def load(
    path_or_name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    label: str | None = None,
    packs: Sequence[str | Path | FactPack] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode and without gradients, and its tokenizer.

    Args:
        path_or_name: a run's folder (its student), a folder made by `save_pretrained`, `embedded`,
            `reader`, `smollm2`, or a hub name; None is the student of the newest run.
        device: where to put the model; the CPU where it is None.
        dtype: of the weights; float32 where it is None.
        label: name of the model in messages; `model` and the path where it is None.
        packs: packs of facts to plug in, in place of the knowledge that a run took out of its
            student, which is plugged in where it is None; an empty list plugs in nothing.

    Returns:
        The model, a student with the facts and rows that were stored beside it, and its tokenizer.

    Raises:
        UserError: there is no such model, its files do not belong together, its family is not
            supported, or a pack does not fit.
    """
    model, tokenizer = loading.load(path_or_name, label=label)
    fact_store = FactStore(model, tokenizer, None, get_fact_hooks(model))
    plug_packs(fact_store, find_student_folder(path_or_name), packs)
    return loading.prepare_for_inference(model, device, dtype), tokenizer
