"""Replay examples, and windows of text."""

import pytest
import torch

from consolidation.conftest import CORPUS, TEXTS
from dmt.consolidation.replay import (
    NON_ANSWER_WEIGHT,
    ReplayExample,
    build_replay_set,
    make_replay_example,
    sample_sentences,
)
from dmt.consolidation.sleep import plan_slot_transfer
from dmt.data.windows import pack_windows


def test_positions_before_answer_tokens_have_full_weight(student):
    plan = plan_slot_transfer(student)
    model, tokenizer = plan.fact_store.model, plan.fact_store.tokenizer
    fact = plan.facts[0]
    example = make_replay_example(tokenizer, fact)
    assert tokenizer.decode(example.ids[example.answer_start :]) == fact.answer
    weights = example.position_weights()
    weighted = (weights == 1).nonzero().flatten() + 1
    assert tokenizer.decode([example.ids[position] for position in weighted]) == fact.answer
    assert sorted(set(weights.tolist())) == pytest.approx([NON_ANSWER_WEIGHT, 1.0])
    assert len(ReplayExample((1, 2, 3), None).position_weights()) == 3
    examples = build_replay_set(model, tokenizer, plan.facts, sample_sentences([CORPUS], 0), 0)
    assert example in examples
    assert len(set(examples)) == len(examples)
    assert all(len(item.ids) <= model.config.max_position_embeddings for item in examples)


def test_packed_windows_depend_on_the_seed(tokenizer):
    assert pack_windows(TEXTS, tokenizer, 16, 5).shape == (5, 16)
    windows = [pack_windows(TEXTS, tokenizer, 16, 5, seed) for seed in (1, 1, 2)]
    assert torch.equal(windows[0], windows[1])
    assert not torch.equal(windows[0], windows[2])
