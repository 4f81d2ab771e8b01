"""Selection of the layers in which facts are matched and applied."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from dmt.data.corpora import load_corpus
from dmt.editing.calibration import calibrate, choose_key_layer, list_candidate_layers
from dmt.editing.edit import choose_value_layer
from dmt.editing.fact import Fact
from dmt.matching.relations import RelationMatcher
from dmt.models.fact_matching import TextCodec

logger = logging.getLogger(__name__)


def choose_layers(
    model: PreTrainedModel,
    tokenizer: Any,
    codec: TextCodec,
    facts: Sequence[Fact],
    prose: Sequence[str] | None = None,
    layers: tuple[int, int] | None = None,
    value_layer: int | None = None,
) -> tuple[int, int, RelationMatcher]:
    """Choose the key layer and the value layer of a model's facts, and calibrate the key layer.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        codec: the same tokenizer as facts use it.
        facts: the first facts to be written; a few of them are tried in several layers.
        prose: held-out text; the speeches that ship with dmt where it is None.
        layers: both layers, where they are known; then they are only calibrated.
        value_layer: the value layer, where it alone is known.
    """
    logger.info("calibrating once: measuring hidden states of prose and questions ...")
    num_layers = model.config.num_hidden_layers
    candidates = list_candidate_layers(num_layers) if layers is None else [layers[0]]
    prose = prose or load_corpus("speeches").validation
    calibrations = calibrate(model, tokenizer, codec, prose, candidates)
    if layers is not None:
        return *layers, calibrations[layers[0]]
    key_layer = choose_key_layer(calibrations)
    recalls = ", ".join(
        f"{layer}: {calibration.paraphrase_recall:.0%}"
        for layer, calibration in calibrations.items()
    )
    logger.info("key layer %d (paraphrases recognized by layer: %s)", key_layer, recalls)
    if value_layer is None:
        value_layer, shares = choose_value_layer(model, tokenizer, facts, key_layer, candidates)
        listed = ", ".join(f"{layer}: {share:.0%}" for layer, share in shares.items())
        logger.info("value layer %d (confident answer tokens by layer: %s)", value_layer, listed)
    else:
        logger.info("value layer %d", value_layer)
    return key_layer, value_layer, calibrations[key_layer]
