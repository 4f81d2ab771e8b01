"""From documents to windows of token ids, and the order in which training reads them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dmt.config import Config
from dmt.data.corpora import Corpus, Probe, SourceStats, load_corpus
from dmt.data.declared_text import DeclaredText
from dmt.data.splits import SPLITS
from dmt.data.tokenizer import get_prefix_ids
from dmt.errors import UserError
from dmt.progress import ProgressLog

TOKENIZE_BATCH_SIZE = 1_000  # documents tokenized at once
TOKENIZE_BATCH_CHARS = 2**20  # of them together, and of one that is tokenized whole
WORD_BREAK_CHARS = 10_000  # before that limit, among which a longer document is cut
PACK_BATCH_SIZE = 16  # documents tokenized at once where a few windows are enough
# A space between words: no tokenizer of words and spaces joins what stands on its two sides.
WORD_BREAK = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True)
class CorpusSummary:
    """What was read of a corpus; `run.json` has it under `corpora`.

    Attributes:
        name: name of the corpus.
        digest: digest of its documents, see `Corpus.compute_digest`.
        documents: number of documents.
        characters: their length.
        tokens: tokens of each split, with the prefix of each document; empty if unknown.
        source: how they were read and split.
    """

    name: str
    digest: str
    documents: int
    characters: int
    tokens: dict[str, int]
    source: SourceStats


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus as windows of token ids `(windows, time)`.

    Attributes:
        name: name of the corpus.
        train, validation, test: windows of each split.
        probes, unseen_probes: questions, see `Corpus`.
        summary: what was read.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    probes: list[Probe]
    unseen_probes: list[Probe]
    summary: CorpusSummary


def tokenize_corpus(corpus: Corpus, tokenizer: Any, seq_len: int) -> TokenizedCorpus:
    """Tokenize a corpus and cut it into windows without overlap.

    Documents follow each other, each after the prefix of `get_prefix_ids`.

    Raises:
        UserError: a split is shorter than one window.
    """
    splits, num_tokens = {}, {}
    for split in SPLITS:
        label = f"tokenizing {corpus.name} ({split})"
        stream = token_stream(getattr(corpus, split), tokenizer, label)
        num_tokens[split] = len(stream)
        if len(stream) < seq_len:
            raise UserError(
                f"data.corpora: the {split} part of {corpus.name} has {len(stream)} tokens, fewer "
                f"than data.seq_len={seq_len}; give it more text or set a smaller data.seq_len"
            )
        splits[split] = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
    return TokenizedCorpus(
        corpus.name,
        probes=corpus.probes,
        unseen_probes=corpus.unseen_probes,
        summary=summarize_corpus(corpus, num_tokens),
        **splits,
    )


def summarize_corpus(corpus: Corpus, num_tokens: dict[str, int]) -> CorpusSummary:
    """Return what was read of a corpus.

    Args:
        corpus: the corpus.
        num_tokens: tokens of each split; empty if it was not tokenized.
    """
    documents = [document for split in SPLITS for document in getattr(corpus, split)]
    return CorpusSummary(
        corpus.name,
        corpus.compute_digest(),
        len(documents),
        sum(map(len, documents)),
        num_tokens,
        corpus.source,
    )


def token_stream(documents: Sequence[str], tokenizer: Any, label: str = "tokenizing") -> Tensor:
    """Return the token ids of documents one after the other, `(tokens,)`.

    Args:
        documents: texts.
        tokenizer: the tokenizer.
        label: what the log calls this work if it takes long.
    """
    start = torch.tensor(get_prefix_ids(tokenizer), dtype=torch.long)
    chunks = [torch.empty(0, dtype=torch.long)]
    progress = ProgressLog(label, sum(map(len, documents)), " characters")
    for ids, is_start, num_chars in _tokenize_parts(documents, tokenizer):
        chunks += [start] if is_start else []
        chunks.append(torch.tensor(ids, dtype=torch.long))
        progress.update(num_chars)
    return torch.cat(chunks)


def _tokenize_documents(
    documents: Sequence[str], tokenizer: Any, batch_size: int = TOKENIZE_BATCH_SIZE
) -> Iterator[list[int]]:
    """Yield the token ids of each document."""
    document_ids: list[int] | None = None
    for ids, is_start, _ in _tokenize_parts(documents, tokenizer, batch_size):
        if is_start and document_ids is not None:
            yield document_ids
        document_ids = ids if is_start or document_ids is None else document_ids + ids
    if document_ids is not None:
        yield document_ids


def _tokenize_parts(
    documents: Sequence[str], tokenizer: Any, batch_size: int = TOKENIZE_BATCH_SIZE
) -> Iterator[tuple[list[int], bool, int]]:
    """Yield the token ids of each part of a document.

    A document has one part, or several if it is longer than `TOKENIZE_BATCH_CHARS`. Memory grows
    with the length of a part, not of a document.

    Yields:
        Ids, whether the part begins a document, and the number of characters up to its end.
    """
    num_chars = 0
    for batch in _batch_parts(documents, batch_size):
        ids_of_parts = _encode_batch([text for text, _ in batch], tokenizer)
        for (text, is_start), ids in zip(batch, ids_of_parts, strict=True):
            num_chars += len(text)
            yield ids, is_start, num_chars


def _batch_parts(documents: Sequence[str], batch_size: int) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    num_chars = 0
    for document in documents:
        for number, text in enumerate(_cut_document(document)):
            if batch and (len(batch) == batch_size or num_chars + len(text) > TOKENIZE_BATCH_CHARS):
                yield batch
                batch, num_chars = [], 0
            batch.append((text, number == 0))
            num_chars += len(text)
    if batch:
        yield batch


def _cut_document(document: str) -> Iterator[str]:
    """Yield parts of at most `TOKENIZE_BATCH_CHARS`, which begin at a space where there is one."""
    start = 0
    while len(document) - start > TOKENIZE_BATCH_CHARS:
        end = start + TOKENIZE_BATCH_CHARS
        breaks = list(WORD_BREAK.finditer(document, end - WORD_BREAK_CHARS, end))
        end = breaks[-1].start() if breaks else end
        yield document[start:end]
        start = end
    yield document[start:]


def _encode_batch(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return
    backend.no_truncation()
    backend.no_padding()
    # Without offsets, which are not needed, this takes two thirds of the time.
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def pack_windows(
    documents: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    num_windows: int,
    seed: int | None = None,
) -> Tensor:
    """Return windows `(windows, seq_len)` of token ids, each document after its prefix.

    Args:
        documents: texts.
        tokenizer: the tokenizer.
        seq_len: tokens of a window.
        num_windows: number of windows; fewer if the documents are shorter.
        seed: None takes the first documents; a number takes documents in random order, of each no
            more than 8 windows.
    """
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(f"windows-{seed}").shuffle(order)
    prefix, ids = get_prefix_ids(tokenizer), []
    max_tokens = None if seed is None else 8 * seq_len
    ordered = [documents[index] for index in order]
    for document_ids in _tokenize_documents(ordered, tokenizer, PACK_BATCH_SIZE):
        ids += (prefix + document_ids)[:max_tokens]
        if len(ids) >= num_windows * seq_len:
            break
    num_windows = min(num_windows, len(ids) // seq_len)
    return torch.tensor(ids[: num_windows * seq_len], dtype=torch.long).view(num_windows, seq_len)


def select_first_windows(windows: Tensor, tokens: int) -> Tensor:
    """Return the first windows `(windows, time)` that have `tokens` tokens, at least one."""
    return windows[: max(1, tokens // windows.shape[1])]


class WindowDataset(Dataset):
    """Windows of all corpora one after the other.

    Args:
        windows: windows `(windows, time)` of each corpus.
        with_index: whether an item is a window with its index.
    """

    def __init__(self, windows: list[Tensor], with_index: bool = False) -> None:
        self.windows, self.with_index = torch.cat(windows), with_index

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        return (self.windows[index], index) if self.with_index else self.windows[index]


class StepSampler(Sampler[list[int]]):
    """Sample the window indices of each step: a function of seed and step alone.

    So a resumed run continues where it stopped. Corpora take turns: after any number of windows
    each has had its share to within one window. An epoch of a corpus visits every window once, in
    an order of its own.

    Args:
        sizes: number of windows of each corpus; indices run through all corpora.
        mixture_weights: share of each corpus; they sum to one.
        batch_size: windows in a step, of all processes together.
        steps: steps of the run.
        seed: seed of the order.
        get_first_step: called for the first step when iteration begins.
        rank: this process, which takes one of `world_size` equal parts of each step.
        world_size: number of processes.
    """

    def __init__(
        self,
        sizes: list[int],
        mixture_weights: list[float],
        batch_size: int,
        steps: int,
        seed: int,
        get_first_step: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sizes, self.mixture_weights = sizes, mixture_weights
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.get_first_step, self.rank, self.world_size = get_first_step, rank, world_size

    def __len__(self) -> int:
        return self.steps  # of the run: Lightning counts the steps before a resume as fetched

    def __iter__(self) -> Iterator[list[int]]:
        first_step = self.get_first_step()
        offsets = [sum(self.sizes[:c]) for c in range(len(self.sizes))]
        counts = [0] * len(self.sizes)
        permutations: dict[int, tuple[int, Tensor]] = {}
        for step in range(self.steps):
            indices = []
            for window_number in range(step * self.batch_size, (step + 1) * self.batch_size):
                corpus = max(
                    range(len(self.sizes)),
                    key=lambda c: self.mixture_weights[c] * (window_number + 1) - counts[c],
                )
                epoch, position = divmod(counts[corpus], self.sizes[corpus])
                counts[corpus] += 1
                if step < first_step:
                    continue
                if permutations.get(corpus, (-1,))[0] != epoch:
                    generator = torch.Generator().manual_seed(
                        (self.seed * 1009 + corpus) * 100_003 + epoch
                    )
                    permutations[corpus] = (
                        epoch,
                        torch.randperm(self.sizes[corpus], generator=generator),
                    )
                indices.append(offsets[corpus] + int(permutations[corpus][1][position]))
            if step >= first_step:
                rank_size = len(indices) // self.world_size
                yield indices[self.rank * rank_size : (self.rank + 1) * rank_size]


class TextDataModule(pl.LightningDataModule):
    """Training windows of all corpora mixed by weight, and validation windows of each corpus.

    Args:
        config: settings; the corpora are those of `data`.
        tokenizer: the model's tokenizer.
        steps: training steps.

    Attributes:
        corpora: the corpora, once `setup` has read them.
        declared_text: the training windows with declared facts, if there are any.
    """

    def __init__(self, config: Config, tokenizer: Any, steps: int) -> None:
        super().__init__()
        self.config, self.tokenizer, self.steps = config, tokenizer, steps
        self.corpora: list[TokenizedCorpus] = []
        self.declared_text: DeclaredText | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load and tokenize the corpora, once."""
        if not self.corpora:
            data = self.config.data
            self.corpora = [
                tokenize_corpus(self._load_corpus(source), self.tokenizer, data.seq_len)
                for source in data.corpora
            ]
            name_counts = Counter(corpus.name for corpus in self.corpora)
            if duplicates := [name for name, count in name_counts.items() if count > 1]:
                raise UserError(
                    f"data.corpora: two are called {duplicates[0]}, and results are reported by "
                    "name; rename a file or folder"
                )

    def _load_corpus(self, source: str) -> Corpus:
        return load_corpus(
            source,
            self.config.seed,
            text_field=self.config.data.field,
            tokenizer=self.tokenizer,
            min_tokens=self.config.data.seq_len,
        )

    def to_record(self) -> list[dict[str, Any]]:
        """Return the summary of each corpus, as `run.json` has them under `corpora`."""
        return [asdict(corpus.summary) for corpus in self.corpora]

    @property
    def mixture_weights(self) -> list[float]:
        """Share of the training windows of each corpus."""
        weights = self.config.data.mixture_weights or [len(corpus.train) for corpus in self.corpora]
        return [weight / sum(weights) for weight in weights]

    def train_dataloader(self) -> DataLoader:
        """Return the training windows of this process, in the order of `StepSampler`."""
        trainer = self.trainer
        sampler = self._make_sampler(
            get_first_step=lambda: trainer.global_step if trainer else 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return DataLoader(
            self.training_dataset(
                with_index=self.config.task == "distill"
                and bool(self.config.logit_cache.dir or self.config.knowledge.facts)
            ),
            batch_sampler=sampler,
        )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move token ids; window indices stay on the CPU, where the logit cache is read."""
        if not isinstance(batch, list | tuple):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        tokens, *window_ids = batch
        return [super().transfer_batch_to_device(tokens, device, dataloader_idx), *window_ids]

    def _make_sampler(self, **kwargs: Any) -> StepSampler:
        sizes = [len(corpus.train) for corpus in self.corpora]
        return StepSampler(
            sizes,
            self.mixture_weights,
            self.config.data.batch_size,
            self.steps,
            self.config.seed,
            **kwargs,
        )

    def training_dataset(self, with_index: bool = False) -> WindowDataset:
        """Return the training windows of all corpora."""
        return WindowDataset([corpus.train for corpus in self.corpora], with_index)

    def window_indices_from(self, step: int) -> list[int]:
        """Return the ascending indices of the windows that are read from `step` on."""
        total = sum(
            len(corpus.train)
            for corpus, weight in zip(self.corpora, self.mixture_weights, strict=True)
            if weight
        )
        indices: set[int] = set()
        for batch in self._make_sampler(get_first_step=lambda: step):
            indices.update(batch)
            if len(indices) == total:  # there may be very many steps
                break
        return sorted(indices)

    def val_dataloader(self) -> list[DataLoader]:
        """Return the validation windows of this process, a loader per corpus."""
        data, trainer = self.config.data, self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        loaders = []
        for corpus in self.corpora:
            windows = select_first_windows(corpus.validation, data.validation_tokens)
            # Metrics are sums over processes, so means stay right if all measure the same windows.
            rank_windows = windows[rank::world_size] if len(windows) >= world_size else windows
            dataset = WindowDataset([rank_windows])
            loaders.append(DataLoader(dataset, batch_size=data.micro_batch_size))  # type: ignore[arg-type]
        return loaders

    def calibration_windows(self, tokens: int) -> Tensor:
        """Return training windows `(windows, time)` of at least `tokens` tokens, mixed by weight.

        They are the same in every process. Subjects of declared facts are replaced.
        """
        count = max(1, -(-tokens // self.config.data.seq_len))
        sizes = [len(corpus.train) for corpus in self.corpora]
        sampler = StepSampler(sizes, self.mixture_weights, count, 1, self.config.seed + 1)
        window_ids = next(iter(sampler))
        if self.declared_text is not None:
            return self.declared_text.replace_subjects(torch.tensor(window_ids), step=0)[0]
        return self.training_dataset().windows[window_ids]
