"""Register saved students with transformers' Auto classes, without importing transformers.

`import dmt` has to be enough for `AutoModelForCausalLM.from_pretrained(".../student")`, and it must
not cost the seconds that torch and transformers take. So dmt's model classes are imported, and
register themselves, right after transformers has been imported by anybody.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER_MODULE, MODELING_MODULE = "transformers", "dmt.models.modeling"
PEFT_MODULE = "peft.utils.constants"  # has peft's defaults for each family
# What dmt.models.modeling is built on and what imports transformers. Each of these is imported
# after transformers, or the import of the model classes would meet it half imported.
FOUNDATIONS = (
    "dmt.data.tokenizer",
    "dmt.matching.relations",
    "dmt.memory",
    "dmt.models",
    "dmt.ops",
)


class _RegisteringFinder(MetaPathFinder):
    """Finds transformers as usual and imports dmt's model classes once it is complete.

    Likewise peft's defaults, to which it adds those of students.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in FOUNDATIONS and TRIGGER_MODULE not in sys.modules:
            import_module(TRIGGER_MODULE)
        is_trigger = name in (TRIGGER_MODULE, PEFT_MODULE)
        spec = PathFinder.find_spec(name, path) if is_trigger else None
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            exec_module(module)
            if name == TRIGGER_MODULE:
                import_module(MODELING_MODULE)
            else:
                import_module("dmt.models.adapters").register_target_modules()

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


def register_auto_classes() -> None:
    """Register now where transformers or peft is imported already, else as soon as it is."""
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
    if TRIGGER_MODULE in sys.modules:
        import_module(MODELING_MODULE)
