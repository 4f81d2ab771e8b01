"""How close a student is to its teacher, and what its memories do, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.data.corpora import Corpus, Probe, load_corpus
from dmt.data.tokenizer import get_prefix_ids
from dmt.data.windows import select_first_windows, token_stream
from dmt.distributed import all_reduce_sum
from dmt.errors import UserError
from dmt.evaluation.questions import Question, score_answers
from dmt.memory.associative import RetrievalStats
from dmt.memory.usage import UsageCounts
from dmt.models.external_tensors import SLOTS_FILE, find_external_modules, measure_bytes
from dmt.models.forward import (
    forward_with_activations,
    forward_with_prefix,
    override_decoding,
)
from dmt.models.memories import (
    get_associative_memories,
    get_featural_memories,
    get_slot_memories,
)
from dmt.ops import kl
from dmt.progress import ProgressLog

METRIC_NAMES = (
    "teacher_perplexity",
    "student_perplexity",
    "ppl_ratio",
    "kl",
    "top1_agreement",
    "tokens",
)


def _safe_exp(log_value: float) -> float:
    """Return `math.exp`, infinite where the result is too large."""
    return math.exp(log_value) if log_value < 700 else math.inf


@dataclass(repr=False)
class FidelityMetrics:
    """How close the predictions of a student are to those of its teacher.

    The fields are sums over tokens, so that batches and processes can be added; the properties
    are the means.

    Attributes:
        tokens: predicted tokens.
        teacher_nll, student_nll: sums of negative log-likelihoods of the text, in nats.
        kl_sum: sum of KL(teacher || student), in nats.
        top1_matches: tokens for which both models have the same most likely next token.
    """

    tokens: float = 0
    teacher_nll: float = 0
    student_nll: float = 0
    kl_sum: float = 0
    top1_matches: float = 0

    def update(self, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> None:
        """Add a batch.

        Args:
            student_logits: `(batch, time, vocabulary)`.
            teacher_logits: `(batch, time, vocabulary)`.
            tokens: token ids `(batch, time)`.
        """
        student_shifted, teacher_shifted, targets = (
            student_logits[:, :-1].float(),
            teacher_logits[:, :-1].float(),
            tokens[:, 1:].flatten(),
        )
        self.tokens += targets.numel()
        self.teacher_nll += float(
            F.cross_entropy(teacher_shifted.flatten(0, 1), targets, reduction="sum")
        )
        self.student_nll += float(
            F.cross_entropy(student_shifted.flatten(0, 1), targets, reduction="sum")
        )
        self.kl_sum += float(kl(student_shifted, teacher_shifted).sum())
        self.top1_matches += float((student_shifted.argmax(-1) == teacher_shifted.argmax(-1)).sum())

    def all_reduce(self) -> FidelityMetrics:
        """Return the sum over all processes; every process must call it."""
        return FidelityMetrics(
            *all_reduce_sum(torch.tensor(astuple(self), dtype=torch.double)).tolist()
        )

    @property
    def teacher_perplexity(self) -> float:
        """Perplexity of the teacher on the text."""
        return _safe_exp(self.teacher_nll / self.tokens)

    @property
    def student_perplexity(self) -> float:
        """Perplexity of the student on the text."""
        return _safe_exp(self.student_nll / self.tokens)

    @property
    def ppl_ratio(self) -> float:
        """Perplexity of the student divided by that of the teacher."""
        return _safe_exp((self.student_nll - self.teacher_nll) / self.tokens)

    @property
    def kl(self) -> float:
        """KL(teacher || student), mean in nats per token."""
        return self.kl_sum / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both have the same most likely next token."""
        return self.top1_matches / self.tokens

    def to_dict(self) -> dict[str, float]:
        """Return the means, and the number of tokens, by name."""
        return {name: getattr(self, name) for name in METRIC_NAMES}

    def __repr__(self) -> str:
        if not self.tokens:
            return "FidelityMetrics(tokens=0)"
        return (
            f"FidelityMetrics(ppl_ratio={self.ppl_ratio:.4f}, kl={self.kl:.4f}, "
            f"top1_agreement={self.top1_agreement:.4f}, "
            f"student_perplexity={self.student_perplexity:.3f}, "
            f"teacher_perplexity={self.teacher_perplexity:.3f}, tokens={self.tokens:,.0f})"
        )


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Tensor | Corpus | str | Path | Sequence[str | Path],
    tokenizer: Any = None,
    *,
    seq_len: int = 256,
    max_tokens: int = 65_536,
    batch_size: int = 8,
) -> FidelityMetrics:
    """Compare a student with its teacher on test text.

        metrics = dmt.evaluate(student, teacher, "speeches", tokenizer)
        metrics.ppl_ratio, metrics.kl, metrics.top1_agreement

    Both models are evaluated without dropout, and are left as they were.

    Args:
        student: the model to evaluate; any causal language model with the teacher's vocabulary.
        teacher: the model to compare with, on the same device.
        data: token ids `(windows, time)`; or text: a built-in corpus, a file, a folder or
            `hub:<dataset>`, one or several, or a `Corpus`, of which the test split is read.
        tokenizer: tokenizer of both models; needed for text.
        seq_len: tokens in a window of text; windows do not overlap.
        max_tokens: maximum number of tokens of each text.
        batch_size: windows computed at once.

    Returns:
        The metrics over all windows.

    Raises:
        UserError: an argument is not accepted, or there is no text.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    devices = [next(model.parameters()).device for model in (student, teacher)]
    if devices[0] != devices[1]:
        raise UserError(
            f"student and teacher must be on one device, got {devices[0]} and {devices[1]}; "
            "move one of them with .to(device)"
        )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            "student and teacher must have the same vocabulary, got "
            f"{student.config.vocab_size:,} and {teacher.config.vocab_size:,} tokens"
        )
    max_positions = min(
        getattr(model.config, "max_position_embeddings", None) or seq_len
        for model in (student, teacher)
    )
    if isinstance(data, Tensor):
        windows_by_text = [data]
        if data.dim() != 2 or not data.numel() or not 1 < data.shape[1] <= max_positions:
            raise UserError(
                "data must have token ids of shape (windows, time), with at least one window of 2 "
                f"to {max_positions:,} tokens, got shape {tuple(data.shape)}"
            )
    else:
        windows_by_text = _read_test_windows(
            data, tokenizer, min(seq_len, max_positions), max_tokens
        )
    metrics = FidelityMetrics()
    for windows in windows_by_text:
        totals = measure_fidelity(student, teacher, windows, batch_size)
        metrics = FidelityMetrics(
            *(a + b for a, b in zip(astuple(metrics), astuple(totals), strict=True))
        )
    return metrics


def _read_test_windows(
    data: Corpus | str | Path | Sequence[str | Path], tokenizer: Any, seq_len: int, max_tokens: int
) -> list[Tensor]:
    """Return token ids `(windows, seq_len)` of the test text of each corpus."""
    if tokenizer is None:
        raise UserError("tokenizer is needed where data is text; dmt.load returns it with a model")
    if seq_len < 2:
        raise UserError(f"seq_len must be at least 2, got {seq_len}")
    sources = [data] if isinstance(data, Corpus | str | Path) else list(data)
    if not sources:
        raise UserError("data is empty; name at least one corpus or file")
    windows_by_text = []
    for source in sources:
        corpus = (
            source
            if isinstance(source, Corpus)
            else load_corpus(str(source), tokenizer=tokenizer, min_tokens=seq_len)
        )
        stream = token_stream(corpus.test, tokenizer)
        if len(stream) < seq_len:
            raise UserError(
                f"data: the test text of {corpus.name} has {len(stream)} tokens, fewer than "
                f"seq_len={seq_len}; give more text or a smaller seq_len"
            )
        windows = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
        windows_by_text.append(select_first_windows(windows, max_tokens))
    return windows_by_text


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and back into its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def measure_fidelity(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, batch_size: int = 8
) -> FidelityMetrics:
    """Measure both models on windows that do not share context.

    Args:
        student: the model to measure.
        teacher: the model to compare with.
        windows: token ids `(windows, time)`.
        batch_size: windows computed at once.
    """
    metrics, device = FidelityMetrics(), next(student.parameters()).device
    progress = ProgressLog("measuring", len(windows), " windows")
    with eval_mode(student), eval_mode(teacher):
        for index, tokens in enumerate(windows.split(batch_size), 1):
            tokens = tokens.to(device)
            metrics.update(
                forward_with_activations(student, tokens).logits,
                forward_with_activations(teacher, tokens).logits,
                tokens,
            )
            progress.update(min(index * batch_size, len(windows)))
    return metrics


def measure_recall(model: PreTrainedModel, tokenizer: Any, probes: Sequence[Probe]) -> float:
    """Return the share of probes whose complete answer greedy decoding generates.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        probes: prompts with one correct answer each.
    """
    predict = partial(forward_with_prefix, model, get_prefix_ids(tokenizer))
    questions = [Question(probe.prompt, probe.answer) for probe in probes]
    with eval_mode(model):
        device = next(model.parameters()).device
        return score_answers(predict, tokenizer, questions, device).recall


@torch.no_grad()
def generate_greedy(model: PreTrainedModel, prompts: Tensor, max_new_tokens: int) -> Tensor:
    """Return greedy continuations `(prompts, max_new_tokens)` of token ids `(prompts, time)`."""
    prompts = prompts.to(next(model.parameters()).device)
    with eval_mode(model):
        generated = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stop_strings=None,
            **override_decoding(model),
        )  # type: ignore[operator]
    return generated[:, prompts.shape[1] :]


def compute_slot_usage(read_counts: Tensor) -> dict[str, float]:
    """Return how evenly slots are used.

    Args:
        read_counts: how often each slot was active, `(slots,)`.

    Returns:
        `used_fraction`: share of slots that were active at all; `dead`: number of the others;
        `usage_entropy`: entropy of the counts as a share of its maximum.
    """
    read_counts = read_counts.cpu()
    fractions = read_counts.double() / read_counts.sum().clamp(min=1)
    entropy = (
        -(fractions * fractions.clamp(min=1e-300).log()).sum()
        / torch.tensor(float(max(2, len(read_counts)))).log()
    )
    dead = int((read_counts == 0).sum())
    return {
        "used_fraction": 1 - dead / len(read_counts),
        "dead": float(dead),
        "usage_entropy": float(entropy),
    }


def collect_slot_usage(
    student: PreTrainedModel, usage: Mapping[int, UsageCounts]
) -> dict[str, dict[str, Any]]:
    """Return how each layer's slots were used.

    Args:
        student: the model.
        usage: counts by layer, see `record_usage`.
    """
    return {
        str(layer): compute_slot_usage(usage[layer].reads)
        | {
            "num_slots": memory.num_slots,
            "k": memory.k,
            "active_per_token": usage[layer].mean_reads,
        }
        for layer, memory in get_slot_memories(student).items()
    }


@torch.no_grad()
def measure_search_recall(student: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Return for each layer the share of an exact search's slots that an approximate one finds.

    Tokens are searched one at a time, as in generation. Windows are scored exactly where that is
    faster, so metrics on windows do not show what the search misses.

    Args:
        student: the model; layers with an exact search are left out.
        windows: token ids `(windows, time)`.
    """
    approximate = {
        layer: memory
        for layer, memory in get_featural_memories(student).items()
        if memory.search != "exact"
    }
    if not approximate:
        return {}
    windows = windows.to(next(student.parameters()).device)
    outputs = forward_with_activations(student, windows, capture_blocks=True)
    return {
        str(layer): memory.measure_recall(outputs.block_inputs[layer].flatten(0, -2))
        for layer, memory in approximate.items()
    }


def collect_row_stats(
    student: PreTrainedModel, retrieval: Mapping[int, RetrievalStats]
) -> dict[str, dict[str, float]]:
    """Return the stored rows of each layer and how they were used.

    Args:
        student: the model.
        retrieval: statistics by layer, see `record_retrieval`.
    """
    stats_by_layer = {}
    for layer, memory in get_associative_memories(student).items():
        width = memory.rows.keys.shape[1] + memory.rows.values.shape[1]
        stats_by_layer[str(layer)] = {
            "num_rows": len(memory.rows),
            "null_weight": retrieval[layer].mean_null_weight,
            "bytes": 4 * width * len(memory.rows),
        }
    return stats_by_layer


def measure_sizes(
    teacher: PreTrainedModel, student: PreTrainedModel, student_dir: Path
) -> dict[str, int]:
    """Return bytes of weights: in memory, of the saved student on disk, and of what stays there.

    Args:
        teacher: the original model.
        student: the distilled model.
        student_dir: folder of the saved student.
    """
    models = {"teacher": teacher, "student": student}
    sizes = {
        name: sum(p.numel() * p.element_size() for p in model.parameters())
        for name, model in models.items()
    }
    external = [module for module in find_external_modules(student).values() if module.is_attached]
    sizes["student"] += sum(module.external_sizes()["ram"] for module in external)
    file_names = ["model.safetensors", *([SLOTS_FILE] if external else [])]
    sizes["student_on_disk"] = sum((student_dir / name).stat().st_size for name in file_names)
    offloaded = measure_bytes(student)["disk"]
    return sizes | ({"student_offloaded": offloaded} if offloaded else {})
