"""Check the fields of a settings dataclass against their annotations and ranges.

A dataclass calls `check_fields(self)` in its `__post_init__`. Messages name arguments; whoever
reads settings from a file or a command line turns them into dotted keys with
`ArgumentError.with_prefix`. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import Field, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dmt.errors import UserError, format_value

ARG = "\0"  # stands before the name of an argument in the message of an `ArgumentError`
UNION_TYPES = (Union, UnionType)
_FIELD_TYPES: dict[Any, dict[str, Any]] = {}  # evaluated annotations by class

_TYPE_DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list such as [speeches, biographies]",
    list[float]: "a list of numbers such as [3, 1]",
    dict[str, float]: "weights by name such as {my_loss: 0.5}",
    list[dict[str, Any]]: "a list of rules such as [{layers: 0-1, memory: {k: 64}}]",
    dict[str, Any]: "a rule such as {layers: 0-1, memory: {k: 64}}",
}


class ArgumentError(UserError):
    """An argument of a library call is wrong.

    Args:
        message: one line in which each argument's name follows the marker `ARG`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.replace(ARG, ""))
        self.message = message

    def with_prefix(self, prefix: str) -> UserError:
        """Return the error in the words of settings: `k` becomes `memory.k` with `memory.`."""
        return UserError(self.message.replace(ARG, prefix))


def bounded(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    limit: int | None = None,
) -> Any:
    """Make a dataclass field with a range.

    Args:
        default: value where the caller gives none.
        minimum: least value accepted.
        maximum: greatest value accepted.
        above: a value that has to be exceeded.
        below: a value that must not be reached.
        limit: greatest value that a machine can take; a message shows it only to who exceeds it.
    """
    bounds = {
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "limit": limit,
    }
    return field(
        default=default,
        metadata={name: bound for name, bound in bounds.items() if bound is not None},
    )


def check_fields(config: Any) -> None:
    """Convert each field of a frozen dataclass to its annotated type and check its range.

    Raises:
        ArgumentError: a value has another type, is not one of the choices or is out of range.
    """
    annotations = field_types(type(config))
    for config_field in fields(config):
        value = getattr(config, config_field.name)
        if not config_field.init or is_dataclass(value):
            continue
        value = coerce(
            annotations[config_field.name],
            value,
            f"{ARG}{config_field.name}",
            multiline=config_field.metadata.get("multiline", False),
        )
        object.__setattr__(config, config_field.name, value)
        _check_range(config_field, value)


def field_types(cls: Any) -> dict[str, Any]:
    """Return the evaluated annotations of a dataclass by field name."""
    if cls in _FIELD_TYPES:
        return _FIELD_TYPES[cls]
    annotations = get_type_hints(cls)
    _FIELD_TYPES[cls] = {item.name: annotations[item.name] for item in fields(cls)}
    return _FIELD_TYPES[cls]


def _check_range(config_field: Field[Any], value: Any) -> None:
    bounds = config_field.metadata
    if not bounds or isinstance(value, bool) or not isinstance(value, int | float):
        return
    name = f"{ARG}{config_field.name}"
    if "above" in bounds and not value > bounds["above"]:
        wording = "a positive number" if bounds["above"] == 0 else f"above {bounds['above']}"
        raise ArgumentError(f"{name} must be {wording}, got {value}")
    minimum = bounds.get("minimum")
    interval = None
    if "maximum" in bounds:
        low = f"({bounds['above']}" if "above" in bounds else f"[{minimum}"
        interval = f"{low}, {bounds['maximum']}]"
    elif "below" in bounds:
        interval = f"[{minimum}, {bounds['below']})"
    if (
        (minimum is not None and not value >= minimum)
        or ("maximum" in bounds and not value <= bounds["maximum"])
        or ("below" in bounds and not value < bounds["below"])
    ):
        raise ArgumentError(
            f"{name} must be {f'in {interval}' if interval else f'at least {minimum}'}, got {value}"
        )
    if "limit" in bounds and value > bounds["limit"]:
        raise ArgumentError(f"{name} must be in [{minimum}, {bounds['limit']}], got {value}")


def coerce(annotation: Any, value: Any, name: str, multiline: bool = False) -> Any:
    """Return `value` as the annotation of the setting `name` wants it.

    Args:
        annotation: the annotation of the setting's field.
        value: the value.
        name: how a message calls the setting.
        multiline: whether text may have line breaks and tabs.

    Raises:
        ArgumentError: it is of another type, not one of the choices, not finite or too large.
    """
    if get_origin(annotation) is list and isinstance(value, list | tuple):
        item_type = get_args(annotation)[0]
        return [coerce(item_type, item, f"{name}[{index}]") for index, item in enumerate(value)]
    base_type = annotation
    if get_origin(annotation) in UNION_TYPES:
        # A number, a choice or None: the first that is not None names the mistake.
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        if value is None and len(choices) < len(get_args(annotation)):
            return None
        for choice in choices[1:]:
            if isinstance(value, str) and value in get_args(choice):
                return value
        base_type = choices[0]
    if base_type is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if multiline and isinstance(value, str) and _is_instance(base_type, " ".join(value.split())):
        return value
    if _is_instance(base_type, value):
        if base_type is float:
            return float(value)
        return str(value) if base_type is str else value
    raise ArgumentError(
        f"{name} must be {describe_type(annotation)}, got {format_value(value)}"
        f"{_get_hint(base_type, value, name)}"
    )


def _is_instance(base_type: Any, value: Any) -> bool:
    if get_origin(base_type) is Literal:
        return isinstance(value, str) and value in get_args(base_type)
    if base_type is bool:
        return isinstance(value, bool)
    if base_type is int:
        return type(value) is int and abs(value) < 2**63
    if base_type is float:  # neither nan nor infinite
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if base_type is str:
        text = str(value)
        is_text = type(value) in (int, str) and bool(text.strip()) and text.isprintable()
        return is_text and "${" not in text
    container = get_origin(base_type) or base_type
    return not isinstance(container, type) or isinstance(value, container)


def describe_type(annotation: Any) -> str:
    """Describe what a setting of this annotation may be, as words that follow `must be`."""
    if get_origin(annotation) in UNION_TYPES:
        choices = [
            describe_type(choice).removeprefix("one of ")
            for choice in get_args(annotation)
            if choice is not type(None)
        ]
        last = f"{choices[-1]} or empty" if type(None) in get_args(annotation) else choices[-1]
        return ", ".join([*choices[:-1], last])
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    return _TYPE_DESCRIPTIONS.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _get_hint(annotation: Any, value: Any, name: str) -> str:
    if isinstance(value, str) and "${" in value:
        return "; ${...} is not filled in here, write the value itself"
    if get_origin(annotation) is list and isinstance(value, str):
        return f"; write {name}=[{format_value(value)}]"
    if annotation is str and isinstance(value, float | bool):
        return "; put it in quotes"
    if annotation is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f"; write {int(value)}"
    if annotation is float and str(value).lower().strip("+-.") in ("inf", "infinity", "nan"):
        return "; it must be finite"
    if annotation in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return "; it is too large"
    return ""
