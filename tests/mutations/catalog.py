"""The lines that are broken (`chosen.toml`), read and held against the product and its tests."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT, TESTS = Path("src/dmt"), Path("tests")
LEAST, FILES = 30, 20
"""Lines, and files that they are in, at least."""


@dataclass(frozen=True)
class Mutant:
    """One line of the product, and what it becomes; attributes as `chosen.toml` describes them."""

    name: str
    file: str
    what: str
    line: str
    mutant: str
    tests: tuple[str, ...]

    @property
    def place(self) -> Path:
        """Its file, from the root."""
        return PRODUCT / self.file

    @property
    def nodes(self) -> list[str]:
        """Node ids of its tests, from the root."""
        return [str(TESTS / test) for test in self.tests]

    def applied(self, source: str) -> str:
        """`source` of its file with the mistake in it."""
        return source.replace(self.line, self.mutant, 1)


def chosen() -> list[Mutant]:
    """All of them, in the order of the file."""
    found = tomllib.loads((Path(__file__).parent / "mutations.toml").read_text(encoding="utf-8"))
    return [
        Mutant(name, **(about | {"tests": tuple(about["tests"])})) for name, about in found.items()
    ]


def stale(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the list by now, a line each: lines that moved, replacements that are none, tests that are gone."""
    wrong = []
    for each in mutants:
        source = (
            (root / each.place).read_text(encoding="utf-8") if (root / each.place).is_file() else ""
        )
        if (times := source.count(each.line)) != 1:
            wrong.append(f"{each.name}: its line is in {each.file} {times} times, not once")
            continue
        try:
            if ast.dump(ast.parse(each.applied(source))) == ast.dump(ast.parse(source)):
                wrong.append(f"{each.name}: its replacement means the same")
        except SyntaxError as error:
            wrong.append(f"{each.name}: its replacement does not compile ({error.msg})")
        if not each.tests:
            wrong.append(f"{each.name}: it names no test")
        wrong += [
            f"{each.name}: there is no test {node}"
            for node in each.nodes
            if not _is_test(root, node)
        ]
    return wrong


def _is_test(root: Path, node: str) -> bool:
    file, _, name = node.partition("[")[0].partition("::")
    return name.startswith("test_") and name in _functions(root / file)


@cache
def _functions(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
