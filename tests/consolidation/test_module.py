"""The objective of a consolidation as loss terms."""

from dataclasses import replace

from dmt.config import Config, ContextConfig, LossConfig
from dmt.consolidation.module import build_loss_config, compare_layer_outputs
from dmt.models.forward import (
    forward_with_activations,
)


def config_of(**context):
    return Config(context=ContextConfig(text="the quick brown fox", **context))


def test_an_objective_is_one_loss_term():
    for objective, term in {
        "causal_lm": "ce",
        "logits": "kl",
        "generated": "kl",
        "hidden_last": "hidden_mse",
        "hidden_all": "block_fvu",
    }.items():
        config = replace(
            config_of(objective=objective), loss=LossConfig(kl=0.5, ce=0, temperature=2.0)
        )
        weights = build_loss_config(config)
        on = {
            name: getattr(weights, name)
            for name in (
                "kl",
                "reverse_kl",
                "ce",
                "hidden_mse",
                "block_fvu",
                "hidden_cosine",
            )
        }
        assert {name for name, value in on.items() if value} == {term}
        assert on[term] == (0.5 if term == "kl" else 1.0)
        assert weights.temperature == 2.0


def test_block_terms_compare_layer_outputs(teacher, tokens):
    seen = forward_with_activations(teacher, tokens, capture_blocks=True)
    assert all(
        a is b
        for a, b in zip(compare_layer_outputs(seen).block_outputs, seen.layer_outputs, strict=True)
    )
