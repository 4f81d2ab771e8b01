"""Cached teacher distributions: written once before training, then read instead of the teacher.

Of each token's distribution k outcomes are stored: the likeliest for certain, and a sample of the
rest, so that sums over the vocabulary can be estimated. A teacher's tail is heavy: beyond its 128
likeliest of 2,048 tokens the embedded teacher has 7 % of its probability. Counting the rest as one
outcome takes 5 to 10 % off the KL; sampled outcomes that stand for the rest do not.

A cache is a folder with `logits.npy`, a structured array with one record per window that is mapped
into memory, and `logits.json`, which says what it was made from. `logits.npy` is written under
another name first, so a file of that name is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tokenize
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config
from dmt.errors import FailureError, UserError, format_value
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_teacher
from dmt.ops import move_together
from dmt.paths import expand_home

logger = logging.getLogger(__name__)

CACHE_FILE = "logits.npy"
METADATA_FILE = "logits.json"
FORMAT_VERSION = 2
MIN_TOP_K = 16
HEAD_CHUNK_TOKENS = 64  # tokens whose logits are computed at once
MIN_PROB = 1e-27  # less likely outcomes count as this likely
# How fast the control variate of `sampled_kl` loses weight where student and teacher differ;
# measured in docs/experiments.
CONTROL_DECAY = 4.0
# What json and numpy raise for a damaged file; numpy parses its header as Python.
DAMAGE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    SyntaxError,
    tokenize.TokenError,
)
# What has to be equal, by its name in the metadata, and what errors call it.
METADATA_LABELS = {
    "version": "the format version",
    "teacher": "the teacher's weights",
    "seq_len": "data.seq_len",
    "vocab_size": "the vocabulary",
    "top_k": "logit_cache.top_k",
    "temperature": "loss.temperature",
}


@dataclass(frozen=True)
class SparseDistribution:
    """Distributions of some tokens, of each k outcomes.

    An outcome at least as likely as the token's `threshold` is always included and counts as its
    probability. A less likely one is included with chance probability / threshold and counts as
    `threshold`, for outcomes that were not sampled too. What counts sums to one.

    Attributes:
        ids: token ids of the outcomes, `(tokens, k)`, long.
        log_probs: natural logarithm of their probabilities, `(tokens, k)`.
        threshold: probability from which an outcome is always included, `(tokens, 1)`.
    """

    ids: Tensor
    log_probs: Tensor
    threshold: Tensor

    def __getitem__(self, index: slice) -> SparseDistribution:
        return SparseDistribution(self.ids[index], self.log_probs[index], self.threshold[index])

    @property
    def weights(self) -> Tensor:
        """What each outcome counts in a sum over the vocabulary, `(tokens, k)`."""
        return torch.maximum(self.log_probs.exp(), self.threshold)

    def to(self, device: torch.device | str) -> SparseDistribution:
        """Return the distributions on another device."""
        tensors = (self.ids, self.log_probs, self.threshold)
        return SparseDistribution(*move_together(tensors, torch.device(device)))


@torch.no_grad()
def sample_distribution(logits: Tensor, k: int, offsets: Tensor) -> SparseDistribution:
    """Sample `k` different outcomes of each distribution.

    The threshold is the one with which the chances of all outcomes sum to k. Outcomes below it are
    sampled at even steps through the vocabulary, a step being one threshold of probability.

    Args:
        logits: logits `(tokens, vocabulary)`.
        k: outcomes per token.
        offsets: start of each token in its first step, `(tokens, 1)` in [0, 1): the only random
            input.

    Source: Horvitz and Thompson 1952 (an outcome with chance c counts 1 / c); Madow 1949 (sampling
        at even steps).
    """
    logits = logits.float()
    lse = logits.logsumexp(-1, keepdim=True)
    probs = (logits - lse).exp_().clamp_(min=MIN_PROB)
    top = probs.topk(k)
    top_probs = top.values.double()
    tail_prob = probs.scatter_(-1, top.indices, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    remaining = top_probs.flip(-1).cumsum(-1).flip(-1) + tail_prob
    order = torch.arange(k, device=probs.device).expand_as(top.indices)
    thresholds = remaining / (k - order)  # if the first 0, 1, ... are included for certain
    below_threshold = top_probs < thresholds
    below_threshold[:, -1] = True
    num_certain = below_threshold.int().argmax(-1, keepdim=True)
    uncertain_probs = top.values.where(order >= num_certain, 0.0)
    cumulative = probs.scatter_(-1, top.indices, uncertain_probs).cumsum(-1, dtype=torch.float64)
    starts = order - num_certain + offsets.clamp(1e-6, 1 - 1e-6)
    steps = starts / (k - num_certain) * cumulative[:, -1:]
    sampled_ids = torch.searchsorted(cumulative, steps.clamp(min=0), right=True)
    sampled_ids = sampled_ids.clamp(max=probs.shape[1] - 1)
    ids = top.indices.where(order < num_certain, sampled_ids).sort(-1).values
    assert (ids.diff(dim=-1) > 0).all(), "an outcome below the threshold is sampled once"
    log_probs = (logits.gather(-1, ids) - lse).clamp(min=log(MIN_PROB))
    return SparseDistribution(ids, log_probs, thresholds.gather(-1, num_certain).float())


def sampled_kl(
    student_logits: Tensor, teacher: SparseDistribution, temperature: float = 1.0
) -> Tensor:
    """Estimate KL(teacher || student) per token in nats, times temperature squared.

    Value and gradient are unbiased over samples. The plain estimate `sum of p log(p / q)` is noisy,
    so a control variate is added: the student's probability of the sampled outcomes, weighted by
    what each stands for, must sum to one. Where student and teacher are close the two errors
    cancel; where they are not the second is the larger, so it is weighted by how close they are on
    the outcomes that are always included.

    Args:
        student_logits: logits `(tokens, vocabulary)`.
        teacher: sampled with the logits divided by the same temperature.
        temperature: divides the student's logits.

    Returns:
        One value per token, `(tokens,)`.
    """
    log_probs = torch.log_softmax(student_logits.float() / temperature, -1)
    student_log_probs = log_probs.gather(-1, teacher.ids)
    weights = teacher.weights
    control = (weights / teacher.log_probs.exp() * student_log_probs.exp()).sum(-1) - 1
    control_weight = control_variate_weight(teacher, student_log_probs.detach())
    value = (weights * (teacher.log_probs - student_log_probs)).sum(-1)
    return (value + control_weight * control) * temperature**2


def control_variate_weight(teacher: SparseDistribution, student_log_probs: Tensor) -> Tensor:
    """Return how close `student_log_probs` `(tokens, k)` are to the teacher's, `(tokens,)`.

    The result is in (0, 1]; only outcomes that are always included are compared.
    """
    probs = teacher.log_probs.exp()
    certain_probs = probs * (probs >= teacher.threshold)
    squared_distance = (teacher.log_probs - student_log_probs).square()
    return 1 / (1 + CONTROL_DECAY * (certain_probs * squared_distance).sum(-1))


def record_dtype(seq_len: int, k: int) -> np.dtype[np.void]:
    """Return the type of one window's record in `logits.npy`."""
    return np.dtype(
        [
            ("window_id", "<i8"),
            ("checksum", "<i8"),
            ("ids", "<i4", (seq_len, k)),
            ("log_probs", "<f2", (seq_len, k)),
            ("threshold", "<f4", (seq_len, 1)),
        ]
    )


def pack_record(window_id: int, distribution: SparseDistribution) -> NDArray[np.void]:
    """Pack the distributions of one window into a record, an array `()` of `record_dtype`."""
    record = np.zeros((), record_dtype(*distribution.ids.shape))
    record["window_id"] = window_id
    record["ids"] = distribution.ids.cpu().numpy()
    record["log_probs"] = distribution.log_probs.cpu().numpy()
    record["threshold"] = distribution.threshold.cpu().numpy()
    record["checksum"] = _checksum(record)
    return record


def unpack_records(records: NDArray[np.void]) -> SparseDistribution:
    """Unpack records `(windows,)`, on the CPU, token after token.

    Probabilities are scaled so that what counts sums to one again after rounding.
    """
    fields = {name: np.array(records[name]) for name in ("ids", "log_probs", "threshold")}
    ids = torch.from_numpy(fields["ids"].astype(np.int64)).flatten(0, 1)
    log_probs = torch.from_numpy(fields["log_probs"].astype(np.float32)).flatten(0, 1)
    log_threshold = torch.from_numpy(fields["threshold"]).flatten(0, 1).log()
    total = torch.maximum(log_probs, log_threshold).logsumexp(-1, keepdim=True)
    return SparseDistribution(ids, log_probs - total, (log_threshold - total).exp())


def _checksum(record: NDArray[np.void]) -> int:
    checksum = zlib.crc32(int(record["window_id"]).to_bytes(8, "little", signed=True))
    for name in ("ids", "log_probs", "threshold"):
        checksum = zlib.crc32(record[name].tobytes(), checksum)
    return checksum


class LogitCache:
    """A complete, checked cache.

    Args:
        records: records `(windows,)` of `record_dtype`, by ascending `window_id`.
    """

    def __init__(self, records: NDArray[np.void]) -> None:
        self.records = records
        self.window_ids: NDArray[np.int64] = np.array(records["window_id"])

    def read(self, window_ids: Tensor, device: torch.device | str = "cpu") -> SparseDistribution:
        """Return the teacher's distributions in windows `(windows,)`, token after token."""
        requested = window_ids.cpu().numpy()
        rows = np.searchsorted(self.window_ids, requested)
        assert (self.window_ids[np.minimum(rows, len(self.window_ids) - 1)] == requested).all(), (
            "a run's windows are all in its cache"
        )
        return unpack_records(self.records[rows]).to(device)


def open_logit_cache(
    config: Config, teacher: PreTrainedModel, windows: Tensor, window_ids: Sequence[int]
) -> LogitCache:
    """Open the cache at `logit_cache.dir`; write it first if it does not exist.

    Args:
        config: settings of the run.
        teacher: the model whose distributions are cached.
        windows: all training windows `(windows, time)`.
        window_ids: indices of the windows that training reads, ascending.

    Raises:
        UserError: the cache was made from something else, lacks a window or is damaged, or the disk
            is too small.
    """
    cache_dir = expand_home(str(config.logit_cache.dir))
    vocab_size = teacher.config.vocab_size
    if config.logit_cache.top_k > vocab_size:
        raise UserError(
            f"logit_cache.top_k must be in [{MIN_TOP_K}, {vocab_size}], the vocabulary of this "
            f"teacher, got {config.logit_cache.top_k}"
        )
    metadata = _build_metadata(config, teacher)
    if not (cache_dir / CACHE_FILE).exists():
        _write_locked(config, teacher, windows, window_ids, cache_dir, metadata)
    return _open_checked(cache_dir, metadata, windows, window_ids)


def _build_metadata(config: Config, teacher: PreTrainedModel) -> dict[str, Any]:
    """Return what a cache of this run is made from, except its windows."""
    return {
        "version": FORMAT_VERSION,
        "teacher": hash_model(teacher),
        "seq_len": config.data.seq_len,
        "vocab_size": teacher.config.vocab_size,
        "top_k": config.logit_cache.top_k,
        "temperature": config.loss.temperature,
    }


def _write_locked(
    config: Config,
    teacher: PreTrainedModel,
    windows: Tensor,
    window_ids: Sequence[int],
    cache_dir: Path,
    metadata: dict[str, Any],
) -> None:
    """Write the cache, or wait for another run that is writing it."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(cache_dir, error) from None
    lock_path = cache_dir / f".{CACHE_FILE}.lock"
    lock = files.acquire_lock(
        lock_path,
        "",
        lambda: logger.warning("waiting for another run that writes the cache %s", cache_dir),
    )
    try:
        if not (cache_dir / CACHE_FILE).exists():
            _write_cache(config, teacher, windows, window_ids, cache_dir, metadata)
    finally:
        files.release_lock(lock, lock_path)


def _write_cache(
    config: Config,
    teacher: PreTrainedModel,
    windows: Tensor,
    window_ids: Sequence[int],
    cache_dir: Path,
    metadata: dict[str, Any],
) -> None:
    dtype = record_dtype(config.data.seq_len, config.logit_cache.top_k)
    required_bytes = len(window_ids) * dtype.itemsize
    try:
        if (free_bytes := shutil.disk_usage(cache_dir).free) < required_bytes:
            raise FailureError(
                f"logit_cache.dir={cache_dir} has {free_bytes / 1e9:.1f} GB free, the cache of "
                f"{len(window_ids):,} windows needs {required_bytes / 1e9:.1f}; make room, name "
                "another folder or set a smaller logit_cache.top_k"
            )
        metadata = metadata | {"windows": _hash_windows(windows[list(window_ids)])}
        message = f"caching the teacher's logits for {len(window_ids):,} windows"
        logger.info("%s, %.0f MB, in %s", message, required_bytes / 1e6, cache_dir)
        with (
            files.atomic_path(cache_dir / CACHE_FILE) as partial_path,
            partial_path.open("wb") as file,
        ):
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (len(window_ids),),
            }
            np.lib.format.write_array_header_1_0(file, header)
            disabled = not config.trainer.progress_bar
            for window_id in track(window_ids, message, disable=disabled):
                distribution = _sample_window(config, teacher, windows, window_id)
                file.write(pack_record(window_id, distribution).tobytes())
            # Last, so that a run that fails leaves nothing, and before the records get their name.
            files.atomic_write(cache_dir / METADATA_FILE, json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise _not_writable(cache_dir, error) from None


def _not_writable(cache_dir: Path, error: OSError) -> UserError:
    return files.disk_error_class(error)(
        f"logit_cache.dir={cache_dir} cannot be written ({error.strerror}); name another folder"
    )


def _sample_window(
    config: Config, teacher: PreTrainedModel, windows: Tensor, window_id: int
) -> SparseDistribution:
    """Sample the distributions of one window; depends on teacher, window and index alone."""
    outputs = forward_teacher(teacher, windows[window_id : window_id + 1].to(teacher.device))
    generator = torch.Generator().manual_seed(window_id)
    offsets = torch.rand(windows.shape[1], 1, generator=generator, dtype=torch.float64)
    chunks = []
    for hidden, chunk_offsets in zip(
        outputs.hidden[0].split(HEAD_CHUNK_TOKENS), offsets.split(HEAD_CHUNK_TOKENS), strict=True
    ):
        logits = outputs.head(hidden).float().cpu() / config.loss.temperature
        chunks.append(sample_distribution(logits, config.logit_cache.top_k, chunk_offsets))
    return SparseDistribution(
        torch.cat([chunk.ids for chunk in chunks]),
        torch.cat([chunk.log_probs for chunk in chunks]),
        torch.cat([chunk.threshold for chunk in chunks]),
    )


def _open_checked(
    cache_dir: Path, expected: dict[str, Any], windows: Tensor, window_ids: Sequence[int]
) -> LogitCache:
    """Open a cache and check that it is complete, undamaged and made from `expected`."""
    path = cache_dir / CACHE_FILE
    advice = f"name another logit_cache.dir or delete {path}"
    try:
        metadata = json.loads((cache_dir / METADATA_FILE).read_text(encoding="utf-8"))
        mismatches = [name for name in expected if metadata.get(name) != expected[name]]
        records = None if mismatches else _map_records(path, expected)
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(
            f"logit_cache.dir={cache_dir}: its {CACHE_FILE} is damaged ({reason}); {advice}"
        ) from None
    if records is None:
        differences = [
            METADATA_LABELS[name]
            if name == "teacher"
            else f"{METADATA_LABELS[name]} ({format_value(metadata.get(name))} in the cache, "
            f"{expected[name]} in this run)"
            for name in (["version"] if "version" in mismatches else mismatches)
        ]
        raise UserError(
            f"logit_cache.dir={cache_dir} was made from something else: "
            f"{' and '.join(differences)} differ; {advice}"
        )
    corrupt_rows = [row for row, record in enumerate(records) if not _is_intact(record)]
    if corrupt_rows:
        raise UserError(
            f"logit_cache.dir={cache_dir}: {len(corrupt_rows):,} of its {len(records):,} windows "
            f"are damaged, the first is record {corrupt_rows[0]}; {advice}"
        )
    cache = LogitCache(records)
    if cache.window_ids.max() >= len(windows) or _hash_windows(
        windows[torch.from_numpy(cache.window_ids)]
    ) != metadata.get("windows"):
        raise UserError(
            f"logit_cache.dir={cache_dir} was made from other training windows: data.corpora, seed "
            f"or the tokenizer differ; {advice}"
        )
    if num_missing := len(np.setdiff1d(np.asarray(window_ids), cache.window_ids)):
        raise UserError(
            f"logit_cache.dir={cache_dir} lacks {num_missing:,} of the {len(window_ids):,} windows "
            f"that this run reads: data.mixture_weights, data.batch_size or stages differ; {advice}"
        )
    return cache


def _map_records(path: Path, expected: dict[str, Any]) -> NDArray[np.void]:
    """Map the records into memory.

    Raises:
        ValueError: the file is no array of such records, or has another length than it says.
    """
    records = cast(
        "np.memmap[Any, np.dtype[np.void]]", np.load(path, mmap_mode="r", allow_pickle=False)
    )
    dtype = record_dtype(expected["seq_len"], expected["top_k"])
    if records.dtype != dtype or records.ndim != 1 or not len(records):
        raise ValueError("its records have another shape")
    if path.stat().st_size != records.offset + records.nbytes:
        raise ValueError("it is longer than its header says")
    return records


def _is_intact(record: NDArray[np.void]) -> bool:
    return int(record["window_id"]) >= 0 and int(record["checksum"]) == _checksum(record)


def _hash_windows(windows: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows.numpy(), "<i8").tobytes()).hexdigest()
