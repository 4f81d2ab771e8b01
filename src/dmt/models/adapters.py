"""Defaults of peft for students: the modules that an adapter without `target_modules` trains."""

from __future__ import annotations

import sys

from dmt.models.architectures import ARCHITECTURES

CONSTANTS_MODULE = "peft.utils.constants"


def register_target_modules() -> None:
    """Give students their family's defaults, less what memories replace; nothing without peft."""
    if CONSTANTS_MODULE not in sys.modules:
        return
    tables = [
        table
        for name, table in vars(sys.modules[CONSTANTS_MODULE]).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict)
    ]
    for family, architecture in ARCHITECTURES.items():
        projections = {name.split(".")[0] for name in architecture.tensor_names.values()}
        for table in tables:
            default = table.get(family)
            if isinstance(default, list):
                names = [name for name in default if name.split(".")[-1] not in projections]
                if names:
                    table.setdefault(f"dmt_{family}", names)
