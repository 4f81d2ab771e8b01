"""x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from dmt.data.corpora import load_corpus
from dmt.editing.calibration import Calibration, calibrate, choose_key_layer, list_candidate_layers
from dmt.editing.edit import choose_value_layer
from dmt.editing.fact import Fact


def choose_layers(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    prose: Sequence[str] | None,
    log: Callable[[str], None],
    layers: tuple[int, int] | None,
    value_layer: int | None = None,
) -> tuple[int, int, Calibration]:
    """In which layer facts are best heard, in which best answered, and the calibration of the first.

    Args:
        facts: the first to be written; a few are tried in several layers.
        prose: held-out text; built-in speeches where it is None.
        told: is given lines about what is going on.
        layers: both, where they are known already.
        answers: the second alone.
    """
    log("measuring once how this model's states vary in prose and in questions ...")
    layers_to_try = (
        list_candidate_layers(model.config.num_hidden_layers) if layers is None else [layers[0]]
    )
    calibrations = calibrate(
        model, tokenizer, prose or load_corpus("speeches").validation, layers_to_try
    )
    if layers is not None:
        return *layers, calibrations[layers[0]]
    key_layer = choose_key_layer(calibrations)
    accuracies = ", ".join(
        f"{layer}: {calibration.paraphrase_accuracy:.0%}"
        for layer, calibration in calibrations.items()
    )
    if value_layer is not None:
        log(
            f"facts are heard in layer {key_layer} (questions told apart, by layer: {accuracies}) and answered in layer {value_layer}"
        )
        return key_layer, value_layer, calibrations[key_layer]
    value_layer, shares = choose_value_layer(model, tokenizer, facts, key_layer, layers_to_try)
    confident_shares = ", ".join(f"{layer}: {share:.0%}" for layer, share in shares.items())
    log(f"facts are heard in layer {key_layer} (questions told apart, by layer: {accuracies})")
    log(
        f"and answered in layer {value_layer} (first facts said after one gradient, by layer: {confident_shares})"
    )
    return key_layer, value_layer, calibrations[key_layer]
