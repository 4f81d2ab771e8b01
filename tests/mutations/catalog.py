"""The lines that are broken (`mutations.toml`), compared with the product and its tests."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT, TESTS = Path("src/dmt"), Path("tests")
MIN_MUTATIONS, MIN_FILES = 80, 40  # entries, and files that they are in


@dataclass(frozen=True)
class Mutation:
    """A line of the product, and what replaces it.

    Attributes:
        name: of the entry.
        file: in `src/dmt`.
        what: the mistake, in words.
        line: text that the file has exactly once.
        mutant: what replaces it.
        tests: node ids in `tests/` that should notice.
    """

    name: str
    file: str
    what: str
    line: str
    mutant: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, relative to the root of the checkout."""
        return PRODUCT / self.file

    @property
    def node_ids(self) -> list[str]:
        """Node ids of the tests, relative to the root of the checkout."""
        return [str(TESTS / test) for test in self.tests]

    def apply(self, source: str) -> str:
        """Return the `source` of the file with the mistake in it."""
        return source.replace(self.line, self.mutant, 1)


def load_mutations() -> list[Mutation]:
    """Return all mutations, in the order of the file."""
    catalog = (Path(__file__).parent / "mutations.toml").read_text(encoding="utf-8")
    return [
        Mutation(name, **(entry | {"tests": tuple(entry["tests"])}))
        for name, entry in tomllib.loads(catalog).items()
    ]


def find_outdated(mutations: list[Mutation], root: Path = ROOT) -> list[str]:
    """Return what is outdated, one line per problem: the line, its replacement or a test."""
    problems = []
    for mutation in mutations:
        path = root / mutation.path
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := source.count(mutation.line)) != 1:
            problems.append(
                f"{mutation.name}: its line is in {mutation.file} {count} times, not once"
            )
            continue
        try:
            if ast.dump(ast.parse(mutation.apply(source))) == ast.dump(ast.parse(source)):
                problems.append(f"{mutation.name}: its replacement means the same")
        except SyntaxError as error:
            problems.append(f"{mutation.name}: its replacement does not compile ({error.msg})")
        if not mutation.tests:
            problems.append(f"{mutation.name}: it names no test")
        problems += [
            f"{mutation.name}: there is no test {node_id}"
            for node_id in mutation.node_ids
            if not _test_exists(root, node_id)
        ]
    return problems


def _test_exists(root: Path, node_id: str) -> bool:
    file, _, name = node_id.partition("[")[0].partition("::")
    return name.startswith("test_") and name in _function_names(root / file)


@cache
def _function_names(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
