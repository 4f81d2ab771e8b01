"""A value against the annotation of its field, and what to say when it does not fit, in the words a person types."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import dmt.config as schema
from dmt.config import Config
from dmt.errors import UserError

UNIONS = (Union, UnionType)
LONGEST = 100
"""Characters of a given value that are shown."""
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list such as [speeches, biographies]",
    list[float]: "a list of numbers such as [3, 1]",
    list[dict[str, Any]]: "a list of rules such as [{layers: 0-1, memory: {k: 64}}]",
    dict[str, Any]: "a rule such as {layers: 0-1, memory: {k: 64}}",
}


def fit(kind: Any, value: Any, name: str) -> Any:
    """`value`, parsed from YAML, as the annotation `kind` of the setting `name` wants it.

    Raises:
        UserError: it is of another type, not one of the choices, not finite or too large.
    """
    if get_origin(kind) is list and isinstance(value, list):
        return [fit(get_args(kind)[0], item, f"{name}[{number}]") for number, item in enumerate(value)]
    if get_origin(kind) in UNIONS:  # a number, a word or nothing: the first that is not nothing names the mistake
        choices = [choice for choice in get_args(kind) if choice is not type(None)]
        if value is None and len(choices) < len(get_args(kind)):
            return None
        for choice in choices[1:]:
            if isinstance(value, str) and value in get_args(choice):
                return value
        plain = choices[0]
    else:
        plain = kind
    if get_origin(plain) is Literal and isinstance(value, str) and value in get_args(plain):
        return value
    if plain is bool and isinstance(value, bool):
        return value
    if plain is int and type(value) is int and abs(value) < 2**63:
        return value
    if plain is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # neither nan nor infinite
        return float(value)
    if plain is str and type(value) in (int, str) and str(value).strip() and str(value).isprintable() and "${" not in str(value):
        return str(value)
    if get_origin(plain) is dict and isinstance(value, dict):
        return value
    raise UserError(f"{name} must be {accepted(kind)}, got {shown(value)}{_advice(plain, value, name)}")


def accepted(kind: Any) -> str:
    """What a setting of this annotation may be, as words that follow `must be`."""
    if get_origin(kind) in UNIONS:
        choices = [accepted(choice).removeprefix("one of ") for choice in get_args(kind) if choice is not type(None)]
        return ", ".join([*choices[:-1], f"{choices[-1]} or empty"] if len(choices) > 1 else [f"{choices[0]} or empty"])
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(get_args(kind))
    return _KINDS[kind]


def shown(value: Any) -> str:
    """`value` on one line as a person would type it; `nothing` for None, cut short where it is long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    elif isinstance(value, int) and abs(value) >= 10**LONGEST:
        text = "a number of more than 100 digits"  # Python refuses to write out very long ones
    else:
        text = str(value) if str(value).strip() and str(value).isprintable() else repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def unknown(name: str, near: Iterable[str], others: Iterable[str]) -> UserError:
    """The error for a key that is not there: the closest of `near`, failing that of `others`, are proposed."""
    near, others = list(near), list(others)
    leaf = name.rpartition(".")[2]
    meant = get_close_matches(name, near, 1, 0.8)
    meant = meant or [other for other in others if other.rpartition(".")[2] == leaf] or get_close_matches(name, others, 3, 0.7)
    advice = f"did you mean {' or '.join(meant)}?" if meant else "--help lists them"
    return UserError(f"{shown(name)} is not a setting; {advice}")


def names() -> list[str]:
    """Every setting and every group as typed."""
    found = []
    for item in fields(Config):
        value = getattr(Config(), item.name)
        found += [item.name, *(f"{item.name}.{member.name}" for member in (fields(value) if is_dataclass(value) else ()))]
    return found


def field_notes() -> dict[tuple[str, ...], str]:
    """The docstring under each field by (class, field), and its choices by (class, field, "choices")."""
    notes: dict[tuple[str, ...], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                assert isinstance(item.target, ast.Name), "settings are plain names"
                notes[node.name, item.target.id] = str(following.value.value)
                kind = ast.unparse(item.annotation)
                if kind.startswith("Literal["):
                    notes[node.name, item.target.id, "choices"] = ", ".join(ast.literal_eval(f"({kind[8:-1]},)"))
    return notes


def _advice(kind: Any, value: Any, name: str) -> str:
    if isinstance(value, str) and "${" in value:
        return "; ${...} is not filled in here, write the value itself"
    if get_origin(kind) is list and isinstance(value, str):
        return f"; write {name}=[{shown(value)}]"
    if kind is str and isinstance(value, float | bool):
        return "; put it in quotes"
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f"; write {int(value)}"
    if kind is float and str(value).lower().strip("+-.") in ("inf", "infinity", "nan"):
        return "; it must be finite"
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return "; it is too large"
    return ""


def changed(base: Any, change: dict[Any, Any], prefix: str = "") -> Any:
    """The dataclass `base` with the differences in `change`, each fitted to its field."""
    kinds, fitted = get_type_hints(type(base)), {}
    for key, value in change.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            if not prefix and key in names():
                group, _, leaf = key.partition(".")
                raise UserError(f"{name} with a dot is for the command line; in a file write {group}: {{{leaf}: {shown(value)}}}")
            raise unknown(name, [prefix + sibling for sibling in kinds], names())
        old = getattr(base, key)
        if is_dataclass(old):
            if not isinstance(value, dict):
                first = f"{name}.{fields(old)[0].name}"
                raise UserError(f"{name} is a group of settings such as {first}, got {shown(value)}; --help lists them")
            fitted[key] = changed(old, value, f"{name}.")
        else:
            fitted[key] = fit(kinds[key], value, name)
    return replace(base, **fitted)
