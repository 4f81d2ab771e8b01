"""The kinds of memory, by name. A new kind is a class with `@register_memory`.

```python
@dataclass(frozen=True)
class RowAttentionConfig(dmt.MemoryConfig):
    num_rows: int = 64

@dmt.register_memory("row_attention", config=RowAttentionConfig)
class RowAttention(dmt.MemoryLayer):
    def __init__(self, width, config): ...
    def forward(self, hidden): ...
```

Settings name it `memory.kind=my_package.my_module:RowAttention`, which imports the module, or by
its short name once the module has been imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import reduce
from importlib import import_module
from typing import TypeVar

from dmt.config import MEMORY_CONFIGS, MemoryConfig
from dmt.errors import UserError, format_value
from dmt.memory.base import MemoryLayer

MemoryClass = TypeVar("MemoryClass", bound=type[MemoryLayer])
_MEMORY_CLASSES: dict[str, type[MemoryLayer]] = {}


def register_memory(
    name: str, *, config: type[MemoryConfig]
) -> Callable[[MemoryClass], MemoryClass]:
    """Register a class as a kind of memory.

    Args:
        name: short name of the kind.
        config: dataclass of its settings, a subclass of `MemoryConfig`.

    Returns:
        A decorator that returns the class.

    Raises:
        UserError: the class is no `MemoryLayer`, `config` is no dataclass below `MemoryConfig`, or
            another class has the name.
    """

    def register(cls: MemoryClass) -> MemoryClass:
        if not (isinstance(cls, type) and issubclass(cls, MemoryLayer)):
            raise UserError(f"register_memory: {cls!r} must be a subclass of dmt.MemoryLayer")
        if not (issubclass(config, MemoryConfig) and is_dataclass(config)):
            raise UserError(
                f"register_memory: config={config.__name__} must be a dataclass and a subclass of "
                "dmt.MemoryConfig"
            )
        if not name.isidentifier():
            raise UserError(
                "register_memory: name must be a word such as row_attention, got "
                f"{format_value(name)}"
            )
        registered = _MEMORY_CLASSES.get(name)
        if registered is not None and _import_path(registered) != _import_path(cls):
            raise UserError(
                f"register_memory: {name} is {_import_path(registered)} already; choose another "
                "name"
            )
        importable = "<locals>" not in cls.__qualname__ and cls.__module__ != "__main__"
        is_built_in = cls.__module__.startswith("dmt.memory.")
        # Files name a class of one's own by its path, so that another program can import it.
        kind = name if is_built_in or not importable else _import_path(cls)
        config.kind_name, cls.kind, cls.config_class = kind, kind, config
        MEMORY_CONFIGS[name], _MEMORY_CLASSES[name] = config, cls
        return cls

    return register


def get_memory_class(kind: str) -> type[MemoryLayer]:
    """Return the class of a kind of memory.

    Args:
        kind: its short name, or `my_package.my_module:MyMemory`, which is imported.

    Raises:
        UserError: there is no such kind, or it cannot be imported.
    """
    if kind in _MEMORY_CLASSES:
        return _MEMORY_CLASSES[kind]
    module_name, separator, qualname = kind.partition(":")
    if not separator:
        raise UserError(
            f"unknown kind of memory {format_value(kind)}; there are {', '.join(_MEMORY_CLASSES)}; "
            "import the module that registers it, or name it as my_package.my_module:MyMemory"
        )
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"module {format_value(module_name)} cannot be imported ({error}); install it, or add "
            "its folder to PYTHONPATH"
        ) from None
    try:
        memory_class = reduce(getattr, qualname.split("."), module)
    except AttributeError:
        raise UserError(f"module {module_name} has no {format_value(qualname)}") from None
    if not (isinstance(memory_class, type) and issubclass(memory_class, MemoryLayer)):
        raise UserError(f"{kind} is not a subclass of dmt.MemoryLayer")
    if not memory_class.kind:
        raise UserError(f"{kind} is not registered; put @dmt.register_memory above the class")
    return memory_class


def list_memories() -> list[str]:
    """Return the short names of all registered kinds of memory."""
    return list(_MEMORY_CLASSES)


def _import_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
