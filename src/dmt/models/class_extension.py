"""Extend the class of one object, which stays an instance of its own class, in copies too."""

from __future__ import annotations

from functools import cache
from typing import Any


def extend_class(instance: Any, extension: Any) -> None:
    """Let a class override methods of an object; once is enough.

    Args:
        instance: the object.
        extension: the class, derived from a base of the object's. Its `__reduce__` is
            `reduce_extended`.
    """
    if not isinstance(instance, extension):
        base: Any = type(instance)
        instance.__class__ = _combine(extension, base)


def reduce_extended(instance: Any) -> tuple[Any, ...]:
    """Return what copies and pickles an object whose class was extended."""
    extension, base = type(instance).__bases__
    return _restore, (extension, base, vars(instance))


@cache
def _combine(extension: Any, base: Any) -> Any:
    return type(base.__name__, (extension, base), {})


def _restore(extension: type, base: type, state: dict[str, Any]) -> Any:
    cls = _combine(extension, base)
    instance = cls.__new__(cls)
    vars(instance).update(state)
    return instance
