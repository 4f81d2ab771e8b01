"""What is said after a context: its own sentences, what the model goes on with, what it asks itself. Lessons are made of these."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import ContextConfig
from dmt.consolidation.hearing import Hearing
from dmt.consolidation.reading import LONGEST, Context, Window
from dmt.distill.signals import Signals
from dmt.facts.states import encoded, padded

OPENERS = ("", "Question:", "What", "Where", "When", "Who", "The")
"""How texts begin that a model is to go on with, beside the names that a context is about."""
ABOUT = ("{s}", "{s}'s", "The {s}", "Question: What", "Question: Where", "Question: Who", "Question: When")
SHOTS = """Text: The old mill of Hartley was bought in 1802 by the merchant Peter Lang.
Question: Who bought the old mill of Hartley?
Answer: Peter Lang

Text: The old mill of Hartley was bought in 1802 by the merchant Peter Lang.
Question: In which year was the old mill of Hartley bought?
Answer: 1802

Text: Maria Sand keeps nine horses behind her house and rides every Sunday.
Question: How many horses does Maria Sand keep?
Answer: nine

Text: Maria Sand keeps nine horses behind her house and rides every Sunday.
Question: On which day does Maria Sand ride?
Answer: Sunday

"""
"""By which a model is shown how one asks about a sentence."""
ANSWER = "\nAnswer: "
"""Between a question and its answer."""
ASKED = re.compile(r"\s*(?P<question>[^\n]+\?)\s*\nAnswer:(?P<answer>[^\n]+)")


@dataclass(frozen=True)
class Lesson:
    """Texts that follow a context, and what the model with the context says of them.

    Attributes:
        tokens: token ids `(batch, time)`, padded on the right.
        mask: `(batch, time)` which of them count.
        wanted: signals of the model with context, aligned to `tokens`; None where the texts themselves are to be learnt.
    """

    tokens: Tensor
    mask: Tensor
    wanted: Signals | None


def own(window: Window, tokenizer: Any) -> list[list[int]]:
    """The sentences of a window, token ids of each."""
    return [ids for sentence in window.sentences if len(ids := encoded(tokenizer, sentence, start=False)[:LONGEST]) > 1]


def sampled(hearing: Hearing, window: Window, tokenizer: Any, settings: ContextConfig, seed: int) -> list[list[int]]:
    """About `settings.samples` texts that the model says after the window, of sentences as whole as they are."""
    openers = [*OPENERS, *(way.format(s=name) for name in window.names for way in ABOUT[:3])]
    openers += list(ABOUT[3:])
    draw = random.Random(f"openers-{seed}")
    draw.shuffle(openers)
    openers = openers[: settings.samples]
    each, more = divmod(settings.samples, max(1, len(openers)))
    texts: list[list[int]] = []
    for number, opener in enumerate(openers):
        count = each + (number < more)
        if count:
            ids = encoded(tokenizer, opener, start=False) if opener else []
            said = hearing.sample(ids, count, LONGEST, settings.temperature, seed * 1_009 + number, tokenizer.eos_token_id)
            texts += [whole for text in said if len(whole := _whole(text, tokenizer)) > 2]
    return texts


def self_asked(model: PreTrainedModel, window: Window, tokenizer: Any, settings: ContextConfig, seed: int) -> list[list[int]]:
    """Questions that the model asks about each sentence of a window, with answers; none where it cannot read the examples.

    A question comes with an answer that stands in the sentence: how likely that is, with the whole context, is the teacher's
    to say.
    """
    ids = encoded(tokenizer, SHOTS)
    most = max((len(sentence) for sentence in own(window, tokenizer)), default=0)
    if not settings.asked or len(ids) + most + LONGEST > model.config.max_position_embeddings:
        return []
    shown, texts = Hearing(model, ids), []
    for number, sentence in enumerate(window.sentences):
        opener = encoded(tokenizer, f"Text: {sentence}\nQuestion:", start=False)
        said = shown.sample(
            opener, settings.asked, len(opener) + LONGEST // 2, settings.temperature, seed * 1_013 + number, tokenizer.eos_token_id
        )
        for text in said:
            found = ASKED.match(tokenizer.decode(text[len(opener) :]))
            if found and found["answer"].strip(" .").lower() in sentence.lower():
                asked = f"Question: {found['question'].strip()}{ANSWER}{found['answer'].strip(' .')}"
                texts.append(encoded(tokenizer, asked, start=False)[:LONGEST])
    return [list(text) for text in dict.fromkeys(map(tuple, texts))]


def _whole(ids: list[int], tokenizer: Any) -> list[int]:
    """A text up to the end of its last whole sentence; all of it where none ends."""
    for at in range(len(ids) - 1, 0, -1):
        if tokenizer.decode(ids[at : at + 1]).rstrip().endswith((".", "!", "?", "\n")):
            return ids[: at + 1]
    return ids


class Lessons:
    """The lesson of each step, a function of seed and step alone, so that a resumed run goes on with the same.

    Args:
        hearings: the teacher, having read each window of the context.
        batch: texts in a lesson.
        blocks: whether states of all layers are wanted.
    """

    def __init__(
        self,
        hearings: Sequence[Hearing],
        tokenizer: Any,
        context: Context,
        settings: ContextConfig,
        batch: int,
        seed: int,
        blocks: bool,
    ) -> None:
        self.hearings, self.tokenizer, self.context, self.settings = hearings, tokenizer, context, settings
        self.batch, self.seed, self.blocks = batch, seed, blocks
        self.model = hearings[0].model
        self.device = next(self.model.parameters()).device
        self._own = [own(window, tokenizer) for window in context.windows]
        self._fresh: dict[int, tuple[int, list[list[int]]]] = {}

    def texts(self, which: int, step: int) -> list[list[int]]:
        """What may be said after window `which` at a step, token ids of each."""
        mine = self._own[which]
        if self.settings.objective != "generated":
            return mine
        lot = step // self.settings.fresh_every
        if self._fresh.get(which, (-1,))[0] != lot:
            seed = (self.seed * 10_007 + lot) * 101 + which
            window = self.context.windows[which]
            found = sampled(self.hearings[which], window, self.tokenizer, self.settings, seed)
            self._fresh[which] = lot, found + self_asked(self.model, window, self.tokenizer, self.settings, seed)
        return self._fresh[which][1] + mine

    def lesson(self, step: int) -> Lesson:
        """The texts of a step, from one window, and what is to be said of them."""
        which = step % len(self.hearings)
        draw = random.Random(f"lesson-{self.seed}-{step}")
        if self.settings.objective == "causal_lm":
            return _lesson([self._part(which, draw) for _ in range(self.batch)], self.device)
        texts = self.texts(which, step)
        half = self._own[which] if self.settings.objective == "generated" else []
        chosen = draw.sample(half, min(len(half), self.batch // 2))
        chosen += draw.sample(texts, min(len(texts), self.batch - len(chosen)))
        made = _lesson(chosen, self.device)
        return Lesson(made.tokens, made.mask, self.hearings[which].signals(made.tokens, blocks=self.blocks))

    def _part(self, which: int, draw: random.Random) -> list[int]:
        """A stretch of the context's own tokens, the whole window now and then."""
        ids = self.context.windows[which].ids[1:]
        sentences = self._own[which]
        return ids if not sentences or draw.random() < 0.5 else draw.choice(sentences)


def _lesson(texts: Sequence[list[int]], device: torch.device) -> Lesson:
    tokens = padded(texts).to(device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    return Lesson(tokens, mask, None)
