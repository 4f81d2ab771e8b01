"""A teacher's answers to the windows of a run, on disk: written once before training, read instead of asking the teacher.

One file, `logits.safetensors`: `numbers` of the windows, a `checksum` of each, and `records` `(windows, block, bytes)` mapped into
memory. Its header says what it was made of. It is written under another name, so what bears its name is whole.

A distribution by k of its outcomes: the likeliest for certain, a sample of the rest, so that sums over all can be estimated.

A teacher's tail is heavy: beyond its 128 likeliest of 2,048 tokens the embedded one keeps seven percent of its probability.
Counting the rest as one outcome takes 5 to 10 percent off the KL. Sampled outcomes that stand for those left out do not.

Sampled distributions as records of one length: which outcomes, and how likely each is, in 300 bytes for 128 of 50,257.

A record is, in bytes: the low bits of the ids, ascending; their high bits in unary; a byte for each probability; three for the
scale. Ids take `k (2 + log2(V / k))` bits, near the least that k of V outcomes can take.

Source: the ids' code is that of Elias 1974 and Fano 1971 for ascending numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config
from dmt.errors import UserError, format_value
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_teacher

MIN_PROB = 1e-27
"""Probability below which outcomes are not told apart."""
CONTROL_DECAY = 4.0
"""How fast the second estimate of a tail loses weight where student and teacher part; measured in EXPERIMENTS.md."""


@dataclass(frozen=True)
class SparseDistribution:
    """Distributions of some tokens, each by k outcomes.

    An outcome at least as likely as the token's `threshold` is there for certain and counts as it is. A less likely one is
    there with chance probability / threshold, and counts as `threshold`, for others too. What counts sums to one.

    Attributes:
        ids: which outcomes, `(tokens, k)`, long.
        logs: the natural logarithm of each one's probability, `(tokens, k)`.
        threshold: `(tokens, 1)`.
    """

    ids: Tensor
    log_probs: Tensor
    threshold: Tensor

    def __getitem__(self, index: slice) -> SparseDistribution:
        return SparseDistribution(self.ids[index], self.log_probs[index], self.threshold[index])

    @property
    def weights(self) -> Tensor:
        """What each outcome counts in a sum over all, `(tokens, k)`."""
        return torch.maximum(self.log_probs.exp(), self.threshold)


@torch.no_grad()
def sample_distribution(logits: Tensor, k: int, offsets: Tensor) -> SparseDistribution:
    """The distributions of `logits` `(tokens, vocabulary)` by `k` different outcomes each.

    The threshold is the one with which chances sum to k. Outcomes below it are taken at even steps through the vocabulary,
    a step being a threshold's worth of probability.

    Args:
        places: where in its first step each token begins, `(tokens, 1)` in [0, 1), the only thing that is random.

    Source: Horvitz and Thompson 1952 (what has chance c counts 1 / c); Madow 1949 (sampling at even steps).
    """
    logits = logits.float()
    lse = logits.logsumexp(-1, keepdim=True)
    probs = (logits - lse).exp_().clamp_(min=MIN_PROB)
    top = probs.topk(k)
    top_probs = top.values.double()
    tail_prob = probs.scatter_(-1, top.indices, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    remaining = top_probs.flip(-1).cumsum(-1).flip(-1) + tail_prob
    order = torch.arange(k, device=probs.device).expand_as(top.indices)
    thresholds = remaining / (k - order)  # where the first 0, 1, ... are there for certain
    below_threshold = top_probs < thresholds
    below_threshold[:, -1] = True
    num_certain = below_threshold.int().argmax(-1, keepdim=True)
    cumulative = probs.scatter_(
        -1, top.indices, top.values.where(order >= num_certain, 0.0)
    ).cumsum(-1, dtype=torch.float64)
    steps = (
        (order - num_certain + offsets.clamp(1e-6, 1 - 1e-6))
        / (k - num_certain)
        * cumulative[:, -1:]
    )
    sampled_ids = torch.searchsorted(cumulative, steps.clamp(min=0), right=True).clamp(
        max=probs.shape[1] - 1
    )
    ids = top.indices.where(order < num_certain, sampled_ids).sort(-1).values
    assert (ids.diff(dim=-1) > 0).all(), "an outcome below the threshold is met once"
    log_probs = (logits.gather(-1, ids) - lse).clamp(min=log(MIN_PROB))
    return SparseDistribution(ids, log_probs, thresholds.gather(-1, num_certain).float())


def sampled_kl(
    student_logits: Tensor, teacher: SparseDistribution, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) per token in nats, times temperature squared; logits `(tokens, vocabulary)` to `(tokens,)`.

    Value and gradient are right on average over samples. That of `sum of p log(p / q)` alone would be noisy, so what is known
    of another sum is used: the q of the outcomes sampled, by what each stands for, must come to one. Where student and teacher
    are close the two errors cancel; where they are not the second is the larger, so it counts by how close they are on what is
    there for certain. A temperature is the one that the teacher's logits were divided by when its outcomes were taken.
    """
    student_log_probs = torch.log_softmax(student_logits.float() / temperature, -1).gather(
        -1, teacher.ids
    )
    weights = teacher.weights
    control = (weights / teacher.log_probs.exp() * student_log_probs.exp()).sum(-1) - 1
    return (
        (weights * (teacher.log_probs - student_log_probs)).sum(-1)
        + control_variate_weight(teacher, student_log_probs.detach()) * control
    ) * temperature**2


def control_variate_weight(teacher: SparseDistribution, student_log_probs: Tensor) -> Tensor:
    """How close `given`, logarithms `(tokens, k)`, are to the teacher's on what is there for certain: `(tokens,)` in (0, 1]."""
    certain_probs = teacher.log_probs.exp() * (teacher.log_probs.exp() >= teacher.threshold)
    return 1 / (
        1
        + CONTROL_DECAY * (certain_probs * (teacher.log_probs - student_log_probs).square()).sum(-1)
    )


LOG_LEVELS = 255
THRESHOLD_LEVELS = 65_535
SPAN_UNIT = 0.5
"""Nats in which the range of a record is counted: 7 bits of them."""
UNIFORM_FLAG = 128
"""Bit that says that nothing was there for certain; the threshold is then 1 / k and the largest probability is kept instead."""


def record_bytes(k: int, vocab_size: int) -> int:
    """Bytes of one token's record."""
    low_bits, high_bits = _id_bits(k, vocab_size)
    return -(-k * low_bits // 8) + -(-high_bits // 8) + k + 3


def pack_records(distribution: SparseDistribution, vocab_size: int) -> NDArray[np.uint8]:
    """Records `(tokens, record_bytes)`.

    Logarithms are kept as the square of a byte over the token's range: finest where probabilities are largest.
    """
    ids, log_probs = distribution.ids.cpu().numpy(), distribution.log_probs.double().cpu().numpy()
    num_tokens, k = ids.shape
    low_bits, high_bits = _id_bits(k, vocab_size)
    low_bytes = np.packbits(
        ((ids[..., None] >> np.arange(low_bits)) & 1).astype(np.uint8).reshape(num_tokens, -1),
        axis=-1,
    )
    unary = np.zeros((num_tokens, high_bits), np.uint8)
    np.put_along_axis(unary, (ids >> low_bits) + np.arange(k), 1, axis=-1)
    max_log_prob = log_probs.max(-1, keepdims=True)
    spans = np.clip(
        np.ceil((max_log_prob - log_probs.min(-1, keepdims=True)) / SPAN_UNIT), 1, UNIFORM_FLAG - 1
    )
    depths = np.clip((max_log_prob - log_probs) / (spans * SPAN_UNIT), 0, 1)
    threshold = np.log(distribution.threshold.double().cpu().numpy())
    is_uniform = threshold > max_log_prob
    fraction = np.where(
        is_uniform,
        -max_log_prob / (2 * log(vocab_size)),
        (max_log_prob - threshold) / (spans * SPAN_UNIT),
    )
    threshold_codes = np.round(np.clip(fraction, 0, 1) * THRESHOLD_LEVELS).astype(np.uint16)
    scale_bytes = np.concatenate(
        [spans + UNIFORM_FLAG * is_uniform, threshold_codes & 255, threshold_codes >> 8], -1
    )
    log_codes = np.round(np.sqrt(depths) * LOG_LEVELS)
    return np.concatenate(
        [
            low_bytes,
            np.packbits(unary, axis=-1),
            log_codes.astype(np.uint8),
            scale_bytes.astype(np.uint8),
        ],
        -1,
    )


def unpack_records(records: NDArray[np.uint8], k: int, vocab_size: int) -> SparseDistribution:
    """What was packed, ids exactly, logarithms as near as a byte tells, on the CPU.

    The largest probability is the one with which all that counts sums to one.
    """
    low_bits, high_bits = _id_bits(k, vocab_size)
    fields = np.split(records, np.cumsum([-(-k * low_bits // 8), -(-high_bits // 8), k]), axis=-1)
    bits = np.unpackbits(fields[0], axis=-1, count=k * low_bits).reshape(len(records), k, low_bits)
    low_ids = (bits * (1 << np.arange(low_bits, dtype=np.int32))).sum(-1) if low_bits else 0
    high_ids = np.nonzero(np.unpackbits(fields[1], axis=-1, count=high_bits))[1].reshape(
        len(records), k
    ) - np.arange(k)
    scale_bytes = torch.from_numpy(fields[3].astype(np.float32))
    is_uniform, span = (
        scale_bytes[:, :1] >= UNIFORM_FLAG,
        scale_bytes[:, :1] % UNIFORM_FLAG * SPAN_UNIT,
    )
    fraction = (scale_bytes[:, 1:2] + 256 * scale_bytes[:, 2:]) / THRESHOLD_LEVELS
    log_probs = (torch.from_numpy(fields[2].astype(np.float32)) / LOG_LEVELS).square_().mul_(-span)
    threshold = -fraction * span
    max_log_prob = torch.where(
        is_uniform,
        -fraction * 2 * log(vocab_size),
        -torch.maximum(log_probs, threshold).logsumexp(-1, keepdim=True),
    )
    threshold = torch.where(
        is_uniform, torch.full_like(threshold, -log(k)), threshold + max_log_prob
    )
    return SparseDistribution(
        torch.from_numpy(low_ids + (high_ids << low_bits)),
        log_probs + max_log_prob,
        threshold.exp(),
    )


def _id_bits(k: int, vocab_size: int) -> tuple[int, int]:
    """Low bits of an id, and bits of all high parts of a record in unary."""
    low_bits = max(0, (vocab_size // k).bit_length() - 1)
    return low_bits, k + ((vocab_size - 1) >> low_bits) + 1


def move_to_device(
    distribution: SparseDistribution, device: torch.device | str
) -> SparseDistribution:
    """The same on another device."""
    moved: list[Tensor] = [
        tensor.to(device)
        for tensor in (distribution.ids, distribution.log_probs, distribution.threshold)
    ]
    return SparseDistribution(*moved)


CACHE_FILE = "logits.safetensors"
FORMAT_VERSION = "1"
PACK_TOKENS = 64
"""Tokens whose logits are turned into records at once."""
HEADER_FIELDS = {
    "format": "the format version",
    "teacher": "the teacher's weights",
    "block": "data.seq_len",
    "vocabulary": "the vocabulary",
    "k": "logit_cache.top_k",
    "temperature": "loss.temperature",
}
"""What has to be the same, by its name in the header."""


class LogitCache:
    """A whole cache, checked.

    Args:
        file: `logits.safetensors`, of this format version.
        told: its header's metadata.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.k, self.vocab_size = int(metadata["k"]), int(metadata["vocabulary"])
        shape, offset = _parse_shape(metadata), _data_offset(path)
        self.window_ids = np.memmap(path, "<i8", "r", offset, (shape[0],))
        self.checksums = np.memmap(path, "<i8", "r", offset + 8 * shape[0], (shape[0],))
        self.records = np.memmap(path, np.uint8, "r", offset + 16 * shape[0], shape)

    def read(self, window_ids: Tensor, device: torch.device | str = "cpu") -> SparseDistribution:
        """The teacher's distributions in the windows of these numbers `(windows,)`, token after token."""
        requested = window_ids.cpu().numpy()
        rows = np.searchsorted(self.window_ids, requested)
        assert (self.window_ids[np.minimum(rows, len(self.window_ids) - 1)] == requested).all(), (
            "a run's windows are all in its cache"
        )
        records = self.records[rows].reshape(-1, self.records.shape[-1])
        return move_to_device(unpack_records(records, self.k, self.vocab_size), device)


def open_logit_cache(
    config: Config, teacher: PreTrainedModel, windows: Tensor, window_ids: Sequence[int]
) -> LogitCache:
    """The cache at `logit_cache.dir`, written first where there is none.

    Args:
        windows: all training windows `(windows, block)`.
        numbers: which of them training will ask about, ascending.

    Raises:
        UserError: what is there was made of something else, lacks a window or is damaged; or there is no room to write.
    """
    cache_dir = Path(str(config.logit_cache.dir)).expanduser()
    expected = _build_metadata(config, teacher)
    if config.logit_cache.top_k > teacher.config.vocab_size:
        raise UserError(
            f"logit_cache.top_k must be in [16, {teacher.config.vocab_size}], the vocabulary of this teacher, got {config.logit_cache.top_k}"
        )
    if not (cache_dir / CACHE_FILE).exists():
        _write_locked(config, teacher, windows, window_ids, cache_dir, expected)
    return _open_checked(config, cache_dir / CACHE_FILE, expected, windows, window_ids)


def _build_metadata(config: Config, teacher: PreTrainedModel) -> dict[str, str]:
    """The header that a cache for this run has, but for its windows."""
    return {
        "format": FORMAT_VERSION,
        "teacher": hash_model(teacher),
        "block": str(config.data.seq_len),
        "vocabulary": str(teacher.config.vocab_size),
        "k": str(config.logit_cache.top_k),
        "temperature": str(config.loss.temperature),
    }


def _write_locked(
    config: Config,
    teacher: PreTrainedModel,
    windows: Tensor,
    window_ids: Sequence[int],
    cache_dir: Path,
    base_metadata: dict[str, str],
) -> None:
    """`_write`, unless another run is about it: then that is waited for."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"logit_cache.dir={cache_dir} cannot be written ({error.strerror}); name another folder"
        ) from None
    lock = cache_dir / f".{CACHE_FILE}.lock"
    lock_file = files.acquire_lock(
        lock,
        "",
        lambda: print(
            f"waiting for another run that writes the teacher's answers to {cache_dir} ...",
            file=sys.stderr,
            flush=True,
        ),
    )
    try:
        for stale in cache_dir.glob(f"{CACHE_FILE}.*.partial"):  # by a run that was killed
            stale.unlink()
        if not (cache_dir / CACHE_FILE).exists():
            _write_cache(config, teacher, windows, window_ids, cache_dir, base_metadata)
    finally:
        files.release_lock(lock_file, lock)


def _write_cache(
    config: Config,
    teacher: PreTrainedModel,
    windows: Tensor,
    window_ids: Sequence[int],
    cache_dir: Path,
    base_metadata: dict[str, str],
) -> None:
    record_size = record_bytes(config.logit_cache.top_k, teacher.config.vocab_size)
    shape = [len(window_ids), config.data.seq_len, record_size]
    metadata = {
        **base_metadata,
        "windows": _hash_windows(windows[list(window_ids)]),
        "shape": json.dumps(shape),
    }
    header = _encode_header(metadata)
    required_bytes = len(header) + len(window_ids) * (16 + config.data.seq_len * record_size)
    temp_path = cache_dir / f"{CACHE_FILE}.{os.getpid()}.partial"
    try:
        if (free_bytes := shutil.disk_usage(cache_dir).free) < required_bytes:
            raise UserError(
                f"logit_cache.dir={cache_dir} has {free_bytes / 1e9:.1f} GB free and the teacher's answers to {len(window_ids):,} windows need "
                f"{required_bytes / 1e9:.1f}; make room, name another folder or set a smaller logit_cache.top_k"
            )
        with temp_path.open("wb") as file:
            checksums = np.zeros(len(window_ids), "<i8")
            file.write(header + np.asarray(window_ids, "<i8").tobytes())
            checksum_offset = file.tell()
            file.write(checksums.tobytes())
            message = f"teacher's answers to {len(window_ids):,} windows, {required_bytes / 1e6:,.0f} MB, to {cache_dir}"
            if not config.trainer.progress_bar:
                print(message)
            for row in track(
                range(len(window_ids)), message, disable=not config.trainer.progress_bar
            ):
                records = _compute_records(config, teacher, windows, window_ids[row]).tobytes()
                checksums[row] = zlib.crc32(records)
                file.write(records)
            file.seek(checksum_offset)
            file.write(checksums.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temp_path.replace(cache_dir / CACHE_FILE)
    except OSError as error:
        raise UserError(
            f"logit_cache.dir={cache_dir} cannot be written ({error.strerror}); name another folder"
        ) from None
    finally:
        temp_path.unlink(missing_ok=True)


def _compute_records(
    config: Config, teacher: PreTrainedModel, windows: Tensor, window_id: int
) -> np.ndarray:
    """Records `(block, bytes)` of one window: a function of the teacher, the window and its number alone."""
    outputs = forward_teacher(teacher, windows[window_id : window_id + 1].to(teacher.device))
    offsets = torch.rand(
        windows.shape[1], 1, generator=torch.Generator().manual_seed(window_id), dtype=torch.float64
    )
    chunks = []
    for hidden, chunk_offsets in zip(
        outputs.hidden[0].split(PACK_TOKENS), offsets.split(PACK_TOKENS), strict=True
    ):
        logits = outputs.head(hidden).float().cpu() / config.loss.temperature
        chunks.append(
            pack_records(
                sample_distribution(logits, config.logit_cache.top_k, chunk_offsets),
                logits.shape[-1],
            )
        )
    return np.concatenate(chunks)


def _open_checked(
    config: Config, path: Path, expected: dict[str, str], windows: Tensor, window_ids: Sequence[int]
) -> LogitCache:
    """The cache in `file`, if it is the one that is wanted, whole and undamaged."""
    advice = f"name another logit_cache.dir or delete {path}"
    try:
        with safe_open(
            path, "np"
        ) as handle:  # which refuses a file that is shorter or longer than its header says
            metadata: dict[str, Any] = handle.metadata() or {}
        mismatched = [name for name in expected if metadata.get(name) != expected[name]]
        if not mismatched:
            cache = LogitCache(path, metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(
            f"logit_cache.dir={path.parent}: its {CACHE_FILE} is damaged or no such file ({reason}); {advice}"
        ) from None
    if mismatched:
        differences = [
            HEADER_FIELDS[name]
            if name == "teacher"
            else f"{HEADER_FIELDS[name]} ({format_value(metadata.get(name))} there, {expected[name]} here)"
            for name in (["format"] if "format" in mismatched else mismatched)
        ]
        raise UserError(
            f"logit_cache.dir={path.parent} was made for something else: {' and '.join(differences)} differ; {advice}"
        )
    cached_ids = np.asarray(cache.window_ids).copy()
    if (
        cached_ids.min() < 0
        or cached_ids.max() >= len(windows)
        or _hash_windows(windows[torch.from_numpy(cached_ids)]) != metadata["windows"]
    ):
        raise UserError(
            f"logit_cache.dir={path.parent} was made of other training windows, by data.corpora, seed or the tokenizer; {advice}"
        )
    if num_missing := len(np.setdiff1d(np.asarray(window_ids), cache.window_ids)):
        raise UserError(
            f"logit_cache.dir={path.parent} lacks {num_missing:,} of the {len(window_ids):,} windows that this run reads: data.mixture_weights, "
            f"data.batch_size or stages differ; {advice}"
        )
    corrupt_rows = [
        row
        for row, (record, checksum) in enumerate(zip(cache.records, cache.checksums, strict=True))
        if zlib.crc32(record) != checksum
    ]
    if corrupt_rows:
        raise UserError(
            f"logit_cache.dir={path.parent}: {len(corrupt_rows):,} of its {len(cache.window_ids):,} windows are damaged, the first is number "
            f"{cache.window_ids[corrupt_rows[0]]}; {advice}"
        )
    return cache


def _hash_windows(windows: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows.numpy(), "<i8").tobytes()).hexdigest()


def _parse_shape(metadata: dict[str, str]) -> tuple[int, int, int]:
    num_windows, seq_len, record_size = json.loads(metadata["shape"])
    return num_windows, seq_len, record_size


def _encode_header(metadata: dict[str, str]) -> bytes:
    """What a safetensors file begins with: eight bytes of length, then JSON."""
    num_windows, seq_len, record_size = _parse_shape(metadata)
    layout = {
        "numbers": ("I64", [num_windows]),
        "checksums": ("I64", [num_windows]),
        "records": ("U8", [num_windows, seq_len, record_size]),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = int(np.prod(shape)) * (8 if dtype == "I64" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _data_offset(path: Path) -> int:
    with path.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")
