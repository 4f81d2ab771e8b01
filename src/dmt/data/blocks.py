"""Documents to windows of token ids, and the order in which training reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dmt.config import Config
from dmt.data.corpora import Corpus, load_corpus
from dmt.data.encoding import start_of
from dmt.data.people import Probe
from dmt.errors import UserError

TOGETHER = 1_000
"""Documents tokenised at once."""


@dataclass(frozen=True)
class Blocks:
    """One corpus as windows of token ids `(windows, block)` by split."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    probes: list[Probe]
    unseen_probes: list[Probe]


def encode(corpus: Corpus, tokenizer: Any, block: int) -> Blocks:
    """Tokenise; documents follow each other with the end-of-text token before each, cut into windows without overlap.

    Raises:
        UserError: a split is shorter than one window.
    """
    splits = {}
    for split in ("train", "validation", "test"):
        stream = _stream(getattr(corpus, split), tokenizer)
        if len(stream) < block:
            raise UserError(
                f"data.corpora: the {split} part of {corpus.name} has {len(stream)} tokens, fewer than data.block={block}; "
                "give it more text or set a smaller data.block"
            )
        splits[split] = stream[: len(stream) // block * block].view(-1, block)
    return Blocks(corpus.name, probes=corpus.probes, unseen_probes=corpus.unseen_probes, **splits)


def _stream(documents: list[str], tokenizer: Any) -> Tensor:
    start = torch.tensor(start_of(tokenizer), dtype=torch.long)
    pieces = [piece for ids in _encoded(documents, tokenizer) for piece in (start, torch.tensor(ids, dtype=torch.long))]
    return torch.cat([torch.empty(0, dtype=torch.long), *pieces])


def _encoded(documents: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document, some documents at a time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for first in range(0, len(documents), TOGETHER):
        part = documents[first : first + TOGETHER]
        if backend is None:
            yield from tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            continue
        backend.no_truncation()
        backend.no_padding()
        # Without the place of each token in the text, which nobody asks for, this takes two thirds of the time.
        yield from (found.ids for found in backend.encode_batch_fast(part, add_special_tokens=False))


def first_windows(windows: Tensor, tokens: int) -> Tensor:
    """As many of `windows` `(windows, block)` as `tokens` fill, at least one."""
    return windows[: max(1, tokens // windows.shape[1])]


class Windows(Dataset):
    """Windows of all corpora one after the other; `numbered`, each comes with its number."""

    def __init__(self, parts: list[Tensor], numbered: bool = False) -> None:
        self.windows, self.numbered = torch.cat(parts), numbered

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        return (self.windows[index], index) if self.numbered else self.windows[index]


class StepSampler(Sampler[list[int]]):
    """Window numbers of each step: a function of seed and step alone, so a resumed run reads on where it stopped.

    Corpora take turns so that after any number of windows each has had its share to within one window; within a
    corpus an epoch visits every window once, in an order of its own.

    Args:
        sizes: windows of each corpus, numbered one after the other.
        shares: what part of the windows each corpus gives; they sum to one.
        batch: windows in a step, all processes together.
        steps: number of steps of the whole run.
        start: asked for the first step when iteration begins.
        rank, world: this process takes one of `world` equal parts of a step, so that parts in order are the step.
    """

    def __init__(
        self,
        sizes: list[int],
        shares: list[float],
        batch: int,
        steps: int,
        seed: int,
        start: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes, self.shares, self.batch, self.steps, self.seed = sizes, shares, batch, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return self.steps  # of the whole run: Lightning counts the steps before a resume as fetched

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        offsets = [sum(self.sizes[:c]) for c in range(len(self.sizes))]
        taken = [0] * len(self.sizes)
        orders: dict[int, tuple[int, Tensor]] = {}
        for step in range(self.steps):
            chosen = []
            for number in range(step * self.batch, (step + 1) * self.batch):
                corpus = max(range(len(self.sizes)), key=lambda c: self.shares[c] * (number + 1) - taken[c])
                epoch, place = divmod(taken[corpus], self.sizes[corpus])
                taken[corpus] += 1
                if step < first:
                    continue
                if orders.get(corpus, (-1,))[0] != epoch:
                    generator = torch.Generator().manual_seed((self.seed * 1009 + corpus) * 100_003 + epoch)
                    orders[corpus] = (epoch, torch.randperm(self.sizes[corpus], generator=generator))
                chosen.append(offsets[corpus] + int(orders[corpus][1][place]))
            if step >= first:
                share = len(chosen) // self.world
                yield chosen[self.rank * share : (self.rank + 1) * share]


class TextData(pl.LightningDataModule):
    """Training windows of every corpus mixed by share; validation windows of each corpus apart."""

    def __init__(self, config: Config, tokenizer: Any, steps: int) -> None:
        super().__init__()
        self.settings, self.tokenizer, self.steps = config, tokenizer, steps
        self.corpora: list[Blocks] = []

    def setup(self, stage: str | None = None) -> None:
        if not self.corpora:
            data = self.settings.data
            self.corpora = [encode(load_corpus(c, self.settings.seed), self.tokenizer, data.block) for c in data.corpora]
            named = Counter(corpus.name for corpus in self.corpora)
            if twice := [name for name, times in named.items() if times > 1]:
                raise UserError(f"data.corpora: two are called {twice[0]}, and results are told by name; rename a file or folder")

    @property
    def shares(self) -> list[float]:
        """What part of the training windows each corpus gives."""
        weights = self.settings.data.shares or [len(corpus.train) for corpus in self.corpora]
        return [weight / sum(weights) for weight in weights]

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = self._sampler(
            start=lambda: trainer.global_step if trainer else 0,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        return DataLoader(
            self.training_windows(numbered=self.settings.task == "distill" and bool(self.settings.cache.place)),
            batch_sampler=sampler,
        )

    def _sampler(self, **how: Any) -> StepSampler:
        sizes = [len(corpus.train) for corpus in self.corpora]
        return StepSampler(sizes, self.shares, self.settings.data.batch, self.steps, self.settings.seed, **how)

    def training_windows(self, numbered: bool = False) -> Windows:
        """Training windows of all corpora."""
        return Windows([corpus.train for corpus in self.corpora], numbered)

    def numbers_from(self, step: int) -> list[int]:
        """Numbers of the training windows that are read from `step` to the last step, each once, ascending."""
        all_of_them = sum(len(corpus.train) for corpus, share in zip(self.corpora, self.shares, strict=True) if share)
        found: set[int] = set()
        for batch in self._sampler(start=lambda: step):
            found.update(batch)
            if len(found) == all_of_them:  # there may be very many steps
                break
        return sorted(found)

    def val_dataloader(self) -> list[DataLoader]:
        data, trainer = self.settings.data, self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        loaders = []
        for corpus in self.corpora:
            windows = first_windows(corpus.validation, data.validation_tokens)
            mine = windows[rank::world] if len(windows) >= world else windows  # sums are over processes: means stay right
            loaders.append(DataLoader(Windows([mine]), batch_size=data.micro_batch))  # type: ignore[arg-type]
        return loaders

    def calibration_windows(self, tokens: int) -> Tensor:
        """Training windows `(windows, block)` of at least `tokens` tokens, mixed by share; the same for every process."""
        count = max(1, -(-tokens // self.settings.data.block))
        sizes = [len(corpus.train) for corpus in self.corpora]
        order = StepSampler(sizes, self.shares, count, 1, self.settings.seed + 1)
        return self.training_windows().windows[next(iter(order))]
