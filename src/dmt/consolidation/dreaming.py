"""What is gone through in a night: facts told in several ways, and prose. All of it is text, and the model's own answers to it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.corpora import Corpus
from dmt.data.encoding import start_of
from dmt.distill.signals import observe
from dmt.facts.states import batches, encoded, padded
from dmt.records import Told

DREAMS = 3_000
"""Sentences of the training text, at most, in which a name is replaced by whom a fact is about."""
EACH = 150
"""Of them for one subject, at most."""
SURE = 0.3
"""Probability that the model has to give to an answer's first token for a sentence to ask for this answer."""
QUIET = 5
"""Sentences about each subject in which no fact is asked for, and where none should be answered."""
BESIDE = 0.1
"""What a position counts at which nothing is answered; one that answers counts 1."""
LONGEST = 64
"""Tokens of a telling, at most."""
A_NAME = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+")
"""A name of two words or more."""
ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])")


@dataclass(frozen=True)
class Telling:
    """Token ids of a text, its start token included; `first` is where an answer begins in it, None where none does."""

    ids: tuple[int, ...]
    first: int | None

    def weights(self) -> Tensor:
        """What each position counts, `(time,)`: those at which the next token of the answer is to be said count fully."""
        found = torch.full((len(self.ids),), BESIDE)
        if self.first is not None:
            found[self.first - 1 : -1] = 1.0
        return found


def told(tokenizer: Any, fact: Told, before: str = "", longest: int = LONGEST) -> Telling:
    """A fact as it was written, after another text or after none."""
    start = len(start_of(tokenizer))
    prompt = encoded(tokenizer, f"{before} {fact.prompt}" if before else fact.prompt)
    room = longest - len(fact.answer_ids) - start
    prompt = prompt[:start] + prompt[start:][-max(1, room) :]
    return Telling((*prompt, *fact.answer_ids), len(prompt))


def tellings(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Told], sentences: Sequence[str], seed: int) -> list[Telling]:
    """Every fact alone, after something else, and wherever else in the words of `sentences` the model is asked for it.

    Args:
        model: knows the facts, in rows or in slots.
    """
    draw = random.Random(f"tellings-{seed}")
    longest = min(LONGEST, model.config.max_position_embeddings)
    found = [told(tokenizer, fact, longest=longest) for fact in facts]
    found += [told(tokenizer, fact, draw.choice(sentences), longest) for fact in facts] if sentences else []
    found += _dreams(model, tokenizer, facts, sentences, draw, longest)
    return list(dict.fromkeys(each for each in found if len(each.ids) <= longest))


def sentences_of(corpora: Sequence[Corpus], seed: int, documents: int = 200) -> list[str]:
    """Sentences of some documents of the training text, those with a name in them first."""
    draw = random.Random(f"sentences-{seed}")
    found: list[str] = []
    for corpus in corpora:
        for document in draw.sample(corpus.train, min(documents, len(corpus.train))):
            parts = [part for part in ENDS.split(document[:4_000]) if 10 < len(part) < 200]
            found += draw.sample(parts, min(len(parts), 5))
    draw.shuffle(found)
    return sorted(found, key=lambda sentence: A_NAME.search(sentence) is None)


def _dreams(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Told], sentences: Sequence[str], draw: random.Random, longest: int
) -> list[Telling]:
    """Sentences about somebody else, said of a fact's subject, up to where the model would go on with the fact's answer."""
    of: dict[str, list[Told]] = {}
    for fact in facts:
        if fact.subject:
            of.setdefault(fact.subject, []).append(fact)
    named = [sentence for sentence in sentences if A_NAME.search(sentence)]
    each = min(EACH, DREAMS // max(1, len(of)), len(named))
    found: list[Telling] = []
    for subject, known in of.items():
        said = {_about(subject, sentence) for sentence in draw.sample(named, each)}
        texts = [encoded(tokenizer, text)[:longest] for text in sorted(said)]
        found += _asked(model, texts, known)
    return found


def _about(subject: str, sentence: str) -> str:
    return A_NAME.sub(lambda _: subject, sentence, count=1)


@torch.no_grad()
def _asked(model: PreTrainedModel, texts: Sequence[list[int]], known: Sequence[Told]) -> list[Telling]:
    """Each text up to where the model would answer one of the facts, with this answer; some in which it would answer none."""
    firsts: dict[int, list[Told]] = {}
    for fact in known:
        firsts.setdefault(fact.answer_ids[0], []).append(fact)
    wanted = torch.tensor(sorted(firsts))
    found, quiet = [], []
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(next(model.parameters()).device)
        likely = observe(model, tokens).logits.float().softmax(-1)[..., wanted.to(tokens.device)].cpu()
        for row, i in enumerate(group):
            best, which = likely[row, : len(texts[i])].max(-1)
            places = (best >= SURE).nonzero().flatten().tolist()
            if not places:
                quiet.append(Telling(tuple(texts[i]), None))
                continue
            place = places[0]
            for fact in firsts[int(wanted[which[place]])]:
                found.append(Telling((*texts[i][: place + 1], *fact.answer_ids), place + 1))
    return found + quiet[:QUIET]


def windows(documents: Sequence[str], tokenizer: Any, block: int, count: int, seed: int | None = None) -> Tensor:
    """Token ids `(windows, block)` of text, each document after its start token: the first, or with a seed from all over."""
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(f"windows-{seed}").shuffle(order)
    ids: list[int] = []
    for number in order:
        part = encoded(tokenizer, documents[number])
        ids += part if seed is None else part[: 8 * block]
        if len(ids) >= count * block:
            break
    count = min(count, len(ids) // block)
    return torch.tensor(ids[: count * block], dtype=torch.long).view(count, block)


def parted(tellings: Sequence[Telling], tokens: int = 2_048) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and padded token ids of tellings, some at a time, those of like length together."""
    for group in batches([len(each.ids) for each in tellings]):
        yield group, padded([tellings[i].ids for i in group])
