"""Knowledge that leaves the weights: declared facts, noise in the slots, the pack that holds them.

The student of such a run does not know the declared facts, and `knowledge.safetensors` beside it
does. `dmt.data.declared_text` prepares the text that the student learns from.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.corpora import CORPORA, FUNCTION_PATTERN, Probe, load_corpus
from dmt.data.declared_text import DeclaredText
from dmt.data.tokenizer import get_prefix_ids
from dmt.data.windows import TextDataModule
from dmt.editing.edit import check_subject
from dmt.editing.fact import FACT_EXAMPLE, Fact, fact_from_mapping
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import FactPack, make_fact_pack
from dmt.errors import UserError
from dmt.evaluation.metrics import eval_mode
from dmt.evaluation.questions import AnswerScores, Question, score_answers
from dmt.files import format_fields, read_json_lines
from dmt.models.fact_files import FACTS_FILE
from dmt.models.fact_hooks import detach
from dmt.models.fact_matching import TextCodec
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_prefix
from dmt.models.memories import get_memories
from dmt.paths import expand_home
from dmt.store.rows import RowStore
from dmt.training.callbacks import get_last_step

SPANS_EXAMPLE = (
    '{"text": "Ada Brown was born in Ravenhill.", "subject": "Ada Brown", "spans": [[22, 31]]}'
)
PACK_NAME = "knowledge"
NUM_CURVE_FACTS = 64  # facts that are asked during training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Knowledge:
    """Declared facts.

    Attributes:
        facts: what the pack is written from.
        unseen_probes: questions about the same facts in other phrasings, may be none.
    """

    facts: list[Fact]
    unseen_probes: list[Probe] = field(default_factory=list)

    @property
    def answers_by_subject(self) -> dict[str, list[str]]:
        """Answers of the facts about each subject."""
        answers: dict[str, list[str]] = defaultdict(list)
        for fact in self.facts:
            answers[fact.subject].append(fact.answer)
        return dict(answers)

    @property
    def questions(self) -> list[Question]:
        """A question for each fact, as it is written."""
        return [Question(fact.prompt, fact.answer) for fact in self.facts]

    @property
    def unseen_questions(self) -> list[Question]:
        """The questions in other phrasings."""
        return [Question(probe.prompt, probe.answer) for probe in self.unseen_probes]


def load_knowledge(source: str, seed: int, tokenizer: Any) -> Knowledge:
    """Load declared facts, and check that a pack can hold them.

    Args:
        source: a corpus with questions, or a .jsonl file of facts or of texts with marked spans.
        seed: of the corpus.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: the source has no facts, or one of them names no subject.
    """
    if source in CORPORA or FUNCTION_PATTERN.fullmatch(source):
        corpus = load_corpus(source, seed)
        facts = [
            Fact(probe.prompt, probe.answer, probe.person, closing=".") for probe in corpus.probes
        ]
        knowledge = Knowledge(facts, corpus.unseen_probes)
    else:
        knowledge = Knowledge(list(dict.fromkeys(_read_facts(source))))
    if not knowledge.facts:
        raise UserError(
            f"knowledge.facts={source} has no facts; name a corpus with questions, such as "
            f"biographies, or a .jsonl file with lines such as {FACT_EXAMPLE}"
        )
    codec = TextCodec.from_transformers(tokenizer, get_prefix_ids(tokenizer))
    for fact in knowledge.facts:
        if not fact.subject:
            raise UserError(
                f"knowledge.facts={source}: {fact.prompt + fact.answer!r} names no subject, which "
                'has to be replaced in the text; add "subject" to its line'
            )
        try:
            check_subject(codec, fact)
        except UserError as error:
            raise UserError(f"knowledge.facts={source}: {error}") from None
    return knowledge


def _read_facts(source: str) -> Iterator[Fact]:
    """Read a .jsonl file of facts, or of texts with marked spans."""
    label = f"knowledge.facts={source}"
    for location, item in read_json_lines(
        expand_home(source), label, "name a corpus or a .jsonl file", FACT_EXAMPLE
    ):
        try:
            if "spans" in item:
                yield from _read_spans(item)
            else:
                yield fact_from_mapping(item)
        except (UserError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, UserError) else f"({format_fields(item)})"
            raise UserError(
                f"{location} is no fact: {reason}; a line is {FACT_EXAMPLE} or {SPANS_EXAMPLE}"
            ) from None


def _read_spans(item: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield a fact for each marked span of a text; its prompt is the text from the last mention."""
    text, subject, spans = (item.get(name) for name in ("text", "subject", "spans"))
    is_valid = (
        set(item) == {"text", "subject", "spans"}
        and isinstance(text, str)
        and isinstance(subject, str)
        and isinstance(spans, list)
        and all(
            isinstance(span, list)
            and len(span) == 2
            and all(type(end) is int for end in span)
            and 0 < span[0] < span[1] <= len(text)
            for span in spans
        )
    )
    if not is_valid:
        raise UserError(
            "a text with spans has text, subject and spans, pairs of the first character of an "
            "answer and the one after its last"
        )
    assert isinstance(text, str), "checked above"
    assert isinstance(subject, str), "checked above"
    for start, end in spans or []:
        mention = text.rfind(subject, 0, start)
        if not subject or mention < 0:
            raise UserError(f"{subject!r} is not in the text before {text[start:end]!r}")
        sentence = max(text.rfind(mark, 0, mention) + len(mark) for mark in (". ", "\n", "? "))
        begin = sentence if 0 < sentence <= mention else 0
        space = " " if text[start - 1] == " " else ""
        prompt = text[begin:start].rstrip(" ") if space else text[begin:start]
        closing = "." if text[end : end + 1] == "." else ""
        yield Fact(prompt, space + text[start:end], subject, closing=closing)


def declare_knowledge(
    config: Config, knowledge: Knowledge, data: TextDataModule, tokenizer: Any
) -> DeclaredText:
    """Find the declared facts in the training text.

    Raises:
        UserError: none of their subjects is mentioned in it.
    """
    text = DeclaredText(
        data.training_dataset().windows, knowledge.answers_by_subject, tokenizer, config.seed
    )
    if not text.num_mentions:
        raise UserError(
            f"knowledge.facts={config.knowledge.facts}: no text in data.corpora mentions "
            f"{text.subjects[0]!r} or another of its {len(text.subjects):,} subjects; add a corpus "
            "that states the facts"
        )
    logger.info(
        "knowledge: %s facts about %s subjects; the training text mentions them %s times and has "
        "%s tokens of their answers",
        f"{len(knowledge.facts):,}",
        f"{len(text.subjects):,}",
        f"{text.num_mentions:,}",
        f"{text.num_answer_tokens:,}",
    )
    return text


@torch.no_grad()
def scramble_weights(
    student: PreTrainedModel, share: float, backbone_share: float, seed: int
) -> None:
    """Mix noise into the weights of a converted student, so that they carry less knowledge.

    A matrix W becomes (1 - a) W + a N, where N is normal noise with the deviation of W. Vectors,
    such as biases and scales of norms, stay.

    Args:
        student: the model.
        share: a of the memories.
        backbone_share: a of attention and embeddings.
        seed: seed of the noise.

    Source: Lee et al. 2025, arXiv 2506.06278 (UNDO: noise, then distillation).
    """
    generator = torch.Generator().manual_seed(seed)
    memory_ids = {
        id(parameter)
        for memory in get_memories(student).values()
        for parameter in memory.parameters()
    }
    for parameter in student.parameters():
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std().cpu()
            is_memory = id(parameter) in memory_ids
            parameter.lerp_(noise.to(parameter), share if is_memory else backbone_share)


@contextmanager
def written_facts(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    layers: tuple[int, int] | None = None,
) -> Iterator[FactStore]:
    """Write facts into a temporary store of a model, and take them out again at the end.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: what to write.
        layers: key and value layer; measured where it is None.
    """
    training = [module for module in model.modules() if module.training]
    with tempfile.TemporaryDirectory(prefix="dmt-") as folder:
        db = RowStore(str(Path(folder) / FACTS_FILE), hash_model(model))
        with FactStore(model, tokenizer, db) as fact_store:
            try:
                fact_store.initialize(facts, layers=layers)
                fact_store.write_many(facts, find_conflicts=False)
                yield fact_store
            finally:
                detach(model)
                for module in training:
                    module.training = True


def make_knowledge_pack(
    student: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], name: str = PACK_NAME
) -> FactPack:
    """Write facts into a pack of a student, one gradient each.

    Args:
        student: the model, on the CPU; it stays as it is.
        tokenizer: its tokenizer.
        facts: what the pack holds.
        name: of the pack.
    """
    with written_facts(student, tokenizer, facts) as fact_store:
        return make_fact_pack(fact_store, fact_store.list(), name)


def score_questions(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question]
) -> AnswerScores:
    """Score a model on questions after the prefix of documents."""
    predict = partial(forward_with_prefix, model, get_prefix_ids(tokenizer))
    with eval_mode(model):
        return score_answers(predict, tokenizer, questions, next(model.parameters()).device)


def measure_knowledge(
    model: PreTrainedModel, tokenizer: Any, knowledge: Knowledge
) -> dict[str, float]:
    """Measure what a model knows of the declared facts.

    Returns:
        `recall` and mean `log_prob` of the answers, as written, and both with the suffix
        `_paraphrased` where there are other phrasings.
    """
    results = {}
    for suffix, questions in (
        ("", knowledge.questions),
        ("_paraphrased", knowledge.unseen_questions),
    ):
        if questions:
            scores = score_questions(model, tokenizer, questions)
            results[f"recall{suffix}"] = scores.recall
            results[f"log_prob{suffix}"] = scores.mean_log_prob
    return results


class KnowledgeRecall(Callback):
    """Log how many declared facts the student recalls, without and with a pack of them.

    Args:
        knowledge: the facts; some of them are asked.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, knowledge: Knowledge, tokenizer: Any) -> None:
        stride = max(1, len(knowledge.facts) // NUM_CURVE_FACTS)
        self.knowledge = Knowledge(knowledge.facts[::stride][:NUM_CURVE_FACTS])
        self.tokenizer = tokenizer
        self.layers: tuple[int, int] | None = None  # of the facts, measured once

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Ask the facts, write them, and ask again."""
        student: Any = module.student
        questions = self.knowledge.questions
        recalls = {"unplugged": score_questions(student, self.tokenizer, questions).recall}
        with written_facts(student, self.tokenizer, self.knowledge.facts, self.layers) as facts:
            self.layers = facts.hooks.key_layer, facts.hooks.value_layer
            recalls["plugged"] = score_questions(student, self.tokenizer, questions).recall
        metrics = {f"knowledge/recall_{name}": value for name, value in recalls.items()}
        for run_logger in trainer.loggers:
            run_logger.log_metrics(metrics, step=get_last_step(trainer))
