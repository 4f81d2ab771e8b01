"""Students and plain models as cases of transformers' own tests; `transformers_suite.py` runs them.

Fresh memories have no threshold and no rows, so they get some: a third of the slots is read, and
every token reads rows.
"""

from __future__ import annotations

import unittest
from importlib import import_module
from typing import Any, ClassVar
from unittest import mock

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import dmt
from dmt.matching.relations import RATES, RelationMatcher, list_bank_clauses
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.fact_hooks import FactHooks, attach, record_matches
from dmt.models.fact_matching import TextCodec
from dmt.store.fact_index import FactIndex
from dmt.store.records import FactRecord, StoredFact

assert dmt  # registers the students
WIDTH, LAYERS, HEADS, SLOTS, VOCABULARY, ROWS = 32, 2, 4, 128, 99, 24
THRESHOLD = 0.02
GPT2_SIZES: dict[str, Any] = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 512,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": SLOTS,
    "max_position_embeddings": 512,
}
THRESHOLDED = {
    "kind": "featural",
    "num_slots": SLOTS,
    "k": 16,
    "activation": "gelu_new",
    "selection": "contribution",
    "k_mode": "threshold",
}
ALL_SLOTS = THRESHOLDED | {"k": SLOTS, "k_mode": "top"}
ASSOCIATIVE = {
    "kind": "associative",
    "k": 4,
    "value_target": "projection",
    "insert_policy": {},
    "allocated_rows": ROWS,
    "index": "exact",
    "write_start": 0.0,
    "base": {name: value for name, value in ALL_SLOTS.items() if name != "kind"},
}
_reset_slots, _reset_rows = FeaturalMemory.reset, AssociativeMemory.reset


@torch.no_grad()
def _reset_with_threshold(memory: FeaturalMemory) -> None:
    _reset_slots(memory)
    if memory.threshold is not None:
        nn.init.constant_(memory.threshold, THRESHOLD)


@torch.no_grad()
def _reset_with_rows(memory: AssociativeMemory) -> None:
    _reset_rows(memory)
    generator = torch.Generator().manual_seed(0)
    rows, device = memory.rows, memory.rows.keys.device
    if device.type == "meta":
        return
    keys = torch.randn(rows.keys.shape, generator=generator)
    rows.keys.copy_(nn.functional.normalize(keys, dim=-1))
    rows.values.copy_(torch.randn(rows.values.shape, generator=generator))
    rows.ids.copy_(torch.arange(len(rows.ids)))


FeaturalMemory.reset = _reset_with_threshold  # type: ignore[method-assign]
AssociativeMemory.reset = _reset_with_rows  # type: ignore[method-assign]


class Tester:
    """Config and inputs of a case, as the mixins ask for them."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = WIDTH, LAYERS, HEADS
    vocab_size = VOCABULARY

    def __init__(self, case: Case) -> None:
        self.case = case

    def get_config(self) -> Any:
        """Return the config of a tiny model."""
        memory = self.case.memory
        layers = {str(layer): memory for layer in range(LAYERS)}
        return self.case.config_class(
            vocab_size=VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **self.case.sizes,
            **({} if memory is None else {"memory": layers}),
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return a config and a batch."""
        ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Case(ModelTesterMixin, GenerationTesterMixin):
    """All tests of both mixins on a family's backbone, language model and heads."""

    prefix, names, sizes, memory = "", ("",), GPT2_SIZES, None  # type: ignore[var-annotated]
    heads = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        """Collect the classes."""
        transformers = import_module("transformers")  # the mixins import it a second time
        family, language_model = self.names
        self.config_class = getattr(transformers, f"{self.prefix}{family}Config")
        class_names = (f"{family}Model", language_model, *(family + head for head in self.heads))
        self.all_model_classes = tuple(
            getattr(transformers, self.prefix + name) for name in class_names
        )
        self.model_tester = Tester(self)


class PlainGPT2(Case, unittest.TestCase):
    """The control."""

    names = ("GPT2", "GPT2LMHeadModel")


class ThresholdGPT2(PlainGPT2):
    """Featural memories with one budget."""

    prefix, memory = "Memory", THRESHOLDED


class AllSlotsGPT2(PlainGPT2):
    """Featural memories that read every slot."""

    prefix, memory = "Memory", ALL_SLOTS


class AssociativeGPT2(PlainGPT2):
    """Associative memories with rows."""

    prefix, memory = "Memory", ASSOCIATIVE


class FactsGPT2(PlainGPT2):
    """A language model with facts about every token, which fire wherever one was mentioned."""

    prefix, memory = "Memory", ALL_SLOTS

    def setUp(self) -> None:
        """Let every language model that is made have facts; backbones and heads have none."""
        super().setUp()
        language_model = self.all_model_classes[1]
        self.all_model_classes = (language_model,)
        initialize = language_model.__init__

        def initialize_with_facts(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            initialize(model, config, *args, **kwargs)
            attach_facts(model)

        patcher = mock.patch.object(language_model, "__init__", initialize_with_facts)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_facts_fire(self) -> None:
        """Check that the other tests see facts at all."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](config).eval()
        with record_matches(model) as passes, torch.no_grad():
            model(**inputs)
        assert len(passes[0]) == inputs["input_ids"].numel()


def attach_facts(model: Any) -> None:
    """Attach a fact about each token, the same ones to every model, in float32 as from a file.

    Every token is a word. A fact without a subject, whose prompt is that word, answers with a token
    that no text has.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        states = torch.randn(VOCABULARY, 2, 1, WIDTH, generator=generator, dtype=torch.float32)
        bank = torch.randn(len(list_bank_clauses()), WIDTH, generator=generator).float()
        relations = RelationMatcher(
            torch.zeros(WIDTH).float(),
            torch.eye(WIDTH).float(),
            torch.zeros(WIDTH).float(),
            nn.functional.normalize(bank, dim=-1),
            torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 2).float(),
            torch.linspace(1, -1, len(RATES)).float().repeat(2, 1),
        )
    words = {f"word{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    index = FactIndex()
    index.set_unsaved(
        StoredFact(
            FactRecord(
                token + 1, word, " new", "", "", "", 0.0, (VOCABULARY,), (token + 1,), (0.0,)
            ),
            *states[token].numpy(),
        )
        for word, token in words.items()
    )
    codec = TextCodec(tokenizer)
    attach(model, FactHooks(index, relations, codec, 0, LAYERS - 1, eos_ids=None))


class PlainLlama(Case, unittest.TestCase):
    """The control."""

    names, sizes = ("Llama", "LlamaForCausalLM"), LLAMA_SIZES


class ThresholdLlama(PlainLlama):
    """Featural memories with one budget, gated."""

    prefix, memory = "Memory", THRESHOLDED | {"activation": "silu"}
