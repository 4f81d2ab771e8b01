"""A teacher's answers to the windows of a run, on disk: written once before training, read instead of asking the teacher.

One file, `logits.safetensors`: `numbers` of the windows, a `checksum` of each, and `records` `(windows, block, bytes)` mapped into
memory. Its header says what it was made of. It is written under another name, so what bears its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dmt import disk
from dmt.config import Config
from dmt.distill.packing import on, pack, record_bytes, unpack
from dmt.distill.sampling import Sampled, sample
from dmt.distill.signals import observe_teacher
from dmt.errors import UserError
from dmt.models.fingerprint import fingerprint
from dmt.wording import shown

FILE = "logits.safetensors"
FORMAT = "1"
TOKENS = 64
"""Tokens whose logits are turned into records at once."""
MADE_OF = {
    "format": "the format version", "teacher": "the teacher's weights", "block": "data.block", "vocabulary": "the vocabulary",
    "k": "cache.kept", "temperature": "loss.temperature",
}  # fmt: skip
"""What has to be the same, by its name in the header."""


class TeacherCache:
    """A whole cache, checked.

    Args:
        file: `logits.safetensors`, of this format version.
        told: its header's metadata.
    """

    def __init__(self, file: Path, told: dict[str, str]) -> None:
        self.k, self.vocabulary = int(told["k"]), int(told["vocabulary"])
        shape, at = _shape(told), _offset(file)
        self.numbers = np.memmap(file, "<i8", "r", at, (shape[0],))
        self.checksums = np.memmap(file, "<i8", "r", at + 8 * shape[0], (shape[0],))
        self.records = np.memmap(file, np.uint8, "r", at + 16 * shape[0], shape)

    def read(self, numbers: Tensor, device: torch.device | str = "cpu") -> Sampled:
        """The teacher's distributions in the windows of these numbers `(windows,)`, token after token."""
        wanted = numbers.cpu().numpy()
        rows = np.searchsorted(self.numbers, wanted)
        assert (self.numbers[np.minimum(rows, len(self.numbers) - 1)] == wanted).all(), "a run's windows are all in its cache"
        records = self.records[rows].reshape(-1, self.records.shape[-1])
        return on(unpack(records, self.k, self.vocabulary), device)


def teacher_cache(config: Config, teacher: PreTrainedModel, windows: Tensor, numbers: Sequence[int]) -> TeacherCache:
    """The cache at `cache.place`, written first where there is none.

    Args:
        windows: all training windows `(windows, block)`.
        numbers: which of them training will ask about, ascending.

    Raises:
        UserError: what is there was made of something else, lacks a window or is damaged; or there is no room to write.
    """
    place = Path(str(config.cache.place)).expanduser()
    wanted = _made_of(config, teacher)
    if config.cache.kept > teacher.config.vocab_size:
        raise UserError(
            f"cache.kept must be in [16, {teacher.config.vocab_size}], the vocabulary of this teacher, got {config.cache.kept}"
        )
    if not (place / FILE).exists():
        _write_alone(config, teacher, windows, numbers, place, wanted)
    return _opened(config, place / FILE, wanted, windows, numbers)


def _made_of(config: Config, teacher: PreTrainedModel) -> dict[str, str]:
    """The header that a cache for this run has, but for its windows."""
    return {
        "format": FORMAT, "teacher": fingerprint(teacher), "block": str(config.data.block),
        "vocabulary": str(teacher.config.vocab_size), "k": str(config.cache.kept), "temperature": str(config.loss.temperature),
    }  # fmt: skip


def _write_alone(
    config: Config, teacher: PreTrainedModel, windows: Tensor, numbers: Sequence[int], place: Path, made_of: dict[str, str]
) -> None:
    """`_write`, unless another run is about it: then that is waited for."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache.place={place} cannot be written ({error.strerror}); name another folder") from None
    lock = place / f".{FILE}.lock"
    held = disk.hold(
        lock,
        "",
        lambda: print(f"waiting for another run that writes the teacher's answers to {place} ...", file=sys.stderr, flush=True),
    )
    try:
        for left in place.glob(f"{FILE}.*.partial"):  # by a run that was killed
            left.unlink()
        if not (place / FILE).exists():
            _write(config, teacher, windows, numbers, place, made_of)
    finally:
        disk.let_go(held, lock)


def _write(
    config: Config, teacher: PreTrainedModel, windows: Tensor, numbers: Sequence[int], place: Path, made_of: dict[str, str]
) -> None:
    length = record_bytes(config.cache.kept, teacher.config.vocab_size)
    whole = [len(numbers), config.data.block, length]
    told = {**made_of, "windows": _digest(windows[list(numbers)]), "shape": json.dumps(whole)}
    header = _header(told)
    needed = len(header) + len(numbers) * (16 + config.data.block * length)
    partial = place / f"{FILE}.{os.getpid()}.partial"
    try:
        if (free := shutil.disk_usage(place).free) < needed:
            raise UserError(
                f"cache.place={place} has {free / 1e9:.1f} GB free and the teacher's answers to {len(numbers):,} windows need "
                f"{needed / 1e9:.1f}; make room, name another folder or set a smaller cache.kept"
            )
        with partial.open("wb") as file:
            checksums = np.zeros(len(numbers), "<i8")
            file.write(header + np.asarray(numbers, "<i8").tobytes())
            after = file.tell()
            file.write(checksums.tobytes())
            said = f"teacher's answers to {len(numbers):,} windows, {needed / 1e6:,.0f} MB, to {place}"
            if not config.trainer.progress:
                print(said)
            for row in track(range(len(numbers)), said, disable=not config.trainer.progress):
                records = _records(config, teacher, windows, numbers[row]).tobytes()
                checksums[row] = zlib.crc32(records)
                file.write(records)
            file.seek(after)
            file.write(checksums.tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place / FILE)
    except OSError as error:
        raise UserError(f"cache.place={place} cannot be written ({error.strerror}); name another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _records(config: Config, teacher: PreTrainedModel, windows: Tensor, number: int) -> np.ndarray:
    """Records `(block, bytes)` of one window: a function of the teacher, the window and its number alone."""
    answer = observe_teacher(teacher, windows[number : number + 1].to(teacher.device))
    places = torch.rand(windows.shape[1], 1, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    parts = []
    for hidden, begins in zip(answer.hidden[0].split(TOKENS), places.split(TOKENS), strict=True):
        logits = answer.head(hidden).float().cpu() / config.loss.temperature
        parts.append(pack(sample(logits, config.cache.kept, begins), logits.shape[-1]))
    return np.concatenate(parts)


def _opened(config: Config, file: Path, wanted: dict[str, str], windows: Tensor, numbers: Sequence[int]) -> TeacherCache:
    """The cache in `file`, if it is the one that is wanted, whole and undamaged."""
    leave = f"name another cache.place or delete {file}"
    try:
        with safe_open(file, "np") as opened:  # which refuses a file that is shorter or longer than its header says
            told: dict[str, Any] = opened.metadata() or {}
        differing = [name for name in wanted if told.get(name) != wanted[name]]
        if not differing:
            cache = TeacherCache(file, told)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"cache.place={file.parent}: its {FILE} is damaged or no such file ({reason}); {leave}") from None
    if differing:
        said = [
            MADE_OF[name] if name == "teacher" else f"{MADE_OF[name]} ({shown(told.get(name))} there, {wanted[name]} here)"
            for name in (["format"] if "format" in differing else differing)
        ]
        raise UserError(f"cache.place={file.parent} was made for something else: {' and '.join(said)} differ; {leave}")
    held = np.asarray(cache.numbers).copy()
    if held.min() < 0 or held.max() >= len(windows) or _digest(windows[torch.from_numpy(held)]) != told["windows"]:
        raise UserError(
            f"cache.place={file.parent} was made of other training windows, by data.corpora, seed or the tokenizer; {leave}"
        )
    if lacking := len(np.setdiff1d(np.asarray(numbers), cache.numbers)):
        raise UserError(
            f"cache.place={file.parent} lacks {lacking:,} of the {len(numbers):,} windows that this run reads: data.shares, "
            f"data.batch or stages differ; {leave}"
        )
    damaged = [row for row, (part, sum_) in enumerate(zip(cache.records, cache.checksums, strict=True)) if zlib.crc32(part) != sum_]
    if damaged:
        raise UserError(
            f"cache.place={file.parent}: {len(damaged):,} of its {len(cache.numbers):,} windows are damaged, the first is number "
            f"{cache.numbers[damaged[0]]}; {leave}"
        )
    return cache


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows.numpy(), "<i8").tobytes()).hexdigest()


def _shape(told: dict[str, str]) -> tuple[int, int, int]:
    windows, block, length = json.loads(told["shape"])
    return windows, block, length


def _header(told: dict[str, str]) -> bytes:
    """What a safetensors file begins with: eight bytes of length, then JSON."""
    windows, block, length = _shape(told)
    sizes = {"numbers": ("I64", [windows]), "checksums": ("I64", [windows]), "records": ("U8", [windows, block, length])}
    described: dict[str, Any] = {"__metadata__": told}
    at = 0
    for name, (kind, shape) in sizes.items():
        size = int(np.prod(shape)) * (8 if kind == "I64" else 1)
        described[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _offset(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
