"""`dmt compare RUN RUN ...`: runs side by side, as a table, for programs, or as a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dmt.commands.printing import Output, plainly
from dmt.config import Config
from dmt.distill.folder import read_record
from dmt.errors import UserError
from dmt.pages.compared import Compared, compared, differing, has_results, measures, number
from dmt.pages.curves import read_curves
from dmt.pages.page import write
from dmt.runs import at_home, run_folder
from dmt.wording import shown


def compare(given: argparse.Namespace, out: Output) -> None:
    """A table of results and one of settings that differ; with --html also their curves, laid over each other."""
    if given.html is not None:
        _check_page(given.html)
    runs = _opened(given.runs)
    names = [run.name for run in runs]
    apart = differing(runs)
    found = [measures(run.record) for run in runs]
    rows = [(name, *(number(each.get(name)) for each in found)) for name in dict.fromkeys(name for each in found for name in each)]
    out.table(("", *names), rows, "nothing was measured")
    words = {name: [shown(value) for value in values] for name, values in apart.items()}
    out.line("")
    out.table(("settings that differ", *names), [(name, *values) for name, values in words.items()], "no setting differs")
    page = None
    if given.html is not None:
        page = str(at_home(given.html))
        try:
            write(compared(runs, words), Path(page))
        except OSError as error:
            raise UserError(f"--html {given.html} cannot be written ({error.strerror}); name another file") from None
        out.line("")
        out.line(page)
    told = [
        {"name": run.name, "folder": run.folder, "measures": each, "settings": {name: apart[name][place] for name in apart}}
        for place, (run, each) in enumerate(zip(runs, found, strict=True))
    ]
    out.data({"runs": told, "html": page})


def _opened(words: Sequence[str]) -> list[Compared]:
    if len(words) < 2:
        raise UserError(f"compare takes two runs or more, got {len(words)}; as in dmt compare version_0 version_1")
    folders = [run_folder(word) for word in words]
    known: dict[Path, str] = {}
    for word, folder in zip(words, folders, strict=True):
        if (place := folder.resolve()) in known:
            raise UserError(f"{word} and {known[place]} are the same run, {folder}; name different ones")
        known[place] = word
    alike = len({folder.name for folder in folders}) < len(folders)
    return [_read(folder, str(folder) if alike else folder.name) for folder in folders]


def _read(folder: Path, name: str) -> Compared:
    record = read_record(folder)
    if not isinstance(record, dict) or not has_results(record):
        raise UserError(f"{folder} has no results yet; go on with it: python distill.py --resume {folder}")
    try:
        measures(record)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / 'run.json'} is not what this version writes; do it again: python distill.py {folder}/config.yaml"
        ) from None
    return Compared(plainly(name), str(folder), record, _settings(folder / "config.yaml"), read_curves(folder))


def _settings(file: Path) -> dict[str, Any]:
    """Every setting by dotted name; those that a run of another version did not know are as they are now."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        raise UserError(f"{file} cannot be read as settings; it is what a run wrote when it began, put it back") from None
    return _flat(asdict(Config())) | (_flat(found) if isinstance(found, dict) else {})


def _flat(found: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_page(word: str) -> None:
    """Raise `UserError` where no page can be written to, before anything is read."""
    file = at_home(word)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html must name a file that ends in .html, got {shown(word)}")
    if file.is_dir():
        raise UserError(f"--html {word} is a folder; name a file in it, as in {file / 'compared.html'}")
    try:
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"--html {word} cannot be written ({error.strerror}); name a file in another folder") from None
