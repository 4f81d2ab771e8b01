"""What is measured once about a model, before it is told its first fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from dmt.data.corpora import load_corpus
from dmt.facts.calibration import Calibration, best_listener, calibrate, candidates
from dmt.facts.drafting import best_answerer
from dmt.facts.sentences import Fact


def measured(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    prose: Sequence[str] | None,
    told: Callable[[str], None],
    layers: tuple[int, int] | None,
    answers: int | None = None,
) -> tuple[int, int, Calibration]:
    """In which layer facts are best heard, in which best answered, and the calibration of the first.

    Args:
        facts: the first to be written; a few are tried in several layers.
        prose: held-out text; built-in speeches where it is None.
        told: is given lines about what is going on.
        layers: both, where they are known already.
        answers: the second alone.
    """
    told("measuring once how this model's states vary in prose and in questions ...")
    among = candidates(model.config.num_hidden_layers) if layers is None else [layers[0]]
    found = calibrate(model, tokenizer, prose or load_corpus("speeches").validation, among)
    if layers is not None:
        return *layers, found[layers[0]]
    listens = best_listener(found)
    heard = ", ".join(f"{layer}: {each.heard:.0%}" for layer, each in found.items())
    if answers is not None:
        told(f"facts are heard in layer {listens} (questions told apart, by layer: {heard}) and answered in layer {answers}")
        return listens, answers, found[listens]
    answers, shares = best_answerer(model, tokenizer, facts, listens, among)
    sure = ", ".join(f"{layer}: {share:.0%}" for layer, share in shares.items())
    told(f"facts are heard in layer {listens} (questions told apart, by layer: {heard})")
    told(f"and answered in layer {answers} (first facts said after one gradient, by layer: {sure})")
    return listens, answers, found[listens]
