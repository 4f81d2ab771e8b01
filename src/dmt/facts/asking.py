"""Asking a model that has a book: what it says, and which facts are near to a question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.book import Book
from dmt.facts.states import check_length, encoded, states_at
from dmt.records import Told


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    heard: Callable[[str], None] | None = None,
) -> Tensor:
    """Token ids `(time,)` of the prompt, its start token included, and of what the model says next.

    Args:
        tokens: most that are said; fewer where the model says that the text ends, or can read no more.
        temperature: 0 says what is likeliest; above it, drawn with `seed`.
        heard: is given each piece of text as it is said.

    Raises:
        UserError: the prompt is empty, or leaves no room for an answer.
    """
    ids = encoded(tokenizer, prompt)
    if not prompt.strip():
        raise UserError("the prompt is empty; ask something, as in dmt ask 'The capital of France is'")
    check_length(model, [*ids, 0], "the prompt, with room for an answer,")
    room = model.config.max_position_embeddings - len(ids)
    if temperature > 0:
        torch.manual_seed(seed)
    given = torch.tensor([ids], device=next(model.parameters()).device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = None if heard is None else _Streamer(tokenizer, heard)
    said = model.generate(  # type: ignore[operator]
        given, attention_mask=torch.ones_like(given), max_new_tokens=min(tokens, room), streamer=streamer,
        pad_token_id=tokenizer.eos_token_id or 0, **how,
    )  # fmt: skip
    return said[0]


def say(book: Book, prompt: str, tokens: int = 30) -> str:
    """What the model of a book says next, as text; see `ask`."""
    ids = ask(book.model, book.tokenizer, prompt, tokens)
    return book.tokenizer.decode(ids[len(encoded(book.tokenizer, prompt)) :], skip_special_tokens=True)


class _Streamer:
    """What transformers tells of a text while it grows; the prompt is told first and left out."""

    def __init__(self, tokenizer: Any, heard: Callable[[str], None]) -> None:
        self.tokenizer, self.heard = tokenizer, heard
        self.ids: list[int] | None = None
        self.told = ""

    def put(self, ids: Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            self.heard(text[len(self.told) :])
            self.told = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids or [], skip_special_tokens=True)
        self.heard(text[len(self.told) :])


def nearest(book: Book, text: str, count: int = 5) -> list[tuple[Told, float]]:
    """Facts asked for in states nearest to that at the end of `text`, whomever they are about; with cosines."""
    if not book.known:
        return []
    ids = encoded(book.tokenizer, text)
    check_length(book.model, ids, "the text")
    listens = book.overlay.listens
    state = states_at(book.model, [ids], [[len(ids) - 1]], [listens])[listens].cpu()
    numbers = list(book.known)
    keys = book.calibration.compared(torch.stack([book.parts(number)[0].key for number in numbers]))
    best = (keys @ book.calibration.compared(state)[0]).topk(min(count, len(numbers)))
    return [(book.known[numbers[at]], cosine) for cosine, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
