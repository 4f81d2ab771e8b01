"""Write a context into rows of facts beside a student.

Rows hold the difference that the context makes to a layer, in one pass without gradient steps, or
the result of one gradient each, or values trained by the objective.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.consolidation.module import ConsolidationRun, train_student
from dmt.consolidation.sampling import (
    ANSWER_PREFIX,
    encode_sentences,
    generate_qa,
    sample_continuations,
)
from dmt.data.tokenizer import get_prefix_ids, save_tokenizer
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.editing.edit import (
    FALSE_POSITIVE_RATE,
    PreparedFact,
    WriteResult,
    compute_keys,
    make_record,
)
from dmt.editing.fact import Fact, parse_fact
from dmt.editing.fact_store import FactStore
from dmt.errors import NothingToDoError, UserError
from dmt.evaluation.questions import Question, score_answers
from dmt.files import atomic_directory
from dmt.models.fact_files import back_up_facts
from dmt.models.fact_hooks import TrainedValues, disabled, record_matches
from dmt.models.fact_matching import SUBJECT_WINDOW
from dmt.models.forward import (
    ContextTeacher,
    batch_by_length,
    encode_text,
    forward_with_activations,
    forward_with_prefix,
    pad_token_ids,
)
from dmt.store.records import FactRecord

MIN_GAIN = 1.0  # nats that the context has to add to the log-probability of a token
MIN_PROB = 0.01  # probability with context of a word's first token
MIN_GENERATED_PROB = 0.5  # the same in texts that the model generated, which may be false
MAX_ANSWER_WORDS = 4
MIN_PROMPT_WORDS = 3  # a name after a shorter prompt without subject is not a fact
FALSE_TRIGGER_TOKENS = 16_384  # tokens of each corpus in which no new row may fire
SENTENCE_END_PATTERN = re.compile(r"[.!?\n]")


@dataclass(frozen=True)
class Span:
    """Tokens of a text that the context makes more probable.

    Attributes:
        ids: token ids of the text.
        first: index of the first such token.
        last: index of the last one.
        prompt: the text before them.
        answer: their text.
        subject: the name in the prompt that they are about, empty if there is none.
    """

    ids: tuple[int, ...]
    first: int
    last: int
    prompt: str
    answer: str
    subject: str


def find_informative_spans(
    model: PreTrainedModel,
    teacher: ContextTeacher,
    tokenizer: Any,
    texts: Sequence[list[int]],
    names: Sequence[str],
    min_prob: float = MIN_PROB,
) -> list[Span]:
    """Return the spans of texts that the context makes more probable.

    Args:
        model: the model without context.
        teacher: the model with context.
        tokenizer: their tokenizer.
        texts: token ids of each text.
        names: subjects of the context; a span that completes a name is left out.
        min_prob: smallest probability, with context, of a word's first token.
    """
    start_ids, spans = get_prefix_ids(tokenizer), []
    for batch in batch_by_length([len(text) for text in texts]):
        tokens = pad_token_ids([texts[index] for index in batch]).to(
            next(model.parameters()).device
        )
        with torch.no_grad(), disabled(model):
            context_nlls = _token_nlls(teacher.predict(tokens).logits, tokens)
            gains, probs = (
                _token_nlls(forward_with_prefix(model, start_ids, tokens).logits, tokens)
                - context_nlls,
                (-context_nlls).exp(),
            )
        for row, index in enumerate(batch):
            positions = slice(0, len(texts[index]) - 1)
            spans += _extract_spans(
                texts[index],
                gains[row, positions].tolist(),
                probs[row, positions].tolist(),
                tokenizer,
                names,
                min_prob,
            )
    return spans


def _token_nlls(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
    )


def _extract_spans(
    ids: list[int],
    gains: list[float],
    probs: list[float],
    tokenizer: Any,
    names: Sequence[str],
    min_prob: float,
) -> list[Span]:
    """Return runs of words that the context makes probable; `gains[i]` is that of token `i + 1`."""
    words = _group_words(
        [tokenizer.decode(ids[position : position + 1]) for position in range(len(ids))]
    )
    is_informative = [
        max(gains[word[0] - 1 : word[-1]]) >= MIN_GAIN and probs[word[0] - 1] >= min_prob
        for word in words
    ]
    spans = []
    for index, word in enumerate(words):
        prompt, last = tokenizer.decode(ids[: word[0]]), index
        if not is_informative[index] or _completes_name(
            prompt, tokenizer.decode(ids[word[0] : word[-1] + 1]), names
        ):
            continue
        while (
            last + 1 < min(len(words), index + MAX_ANSWER_WORDS)
            and words[last][-1] + 1 == words[last + 1][0]
        ):
            first_char = tokenizer.decode(
                ids[words[last + 1][0] : words[last + 1][-1] + 1]
            ).strip()[:1]
            # Names and dates are kept together.
            is_atomic = first_char.isupper() or first_char.isdigit()
            if not is_atomic and (min_prob > MIN_PROB or not is_informative[last + 1]):
                break
            last += 1
        answer, subject = (
            tokenizer.decode(ids[word[0] : words[last][-1] + 1]),
            _find_subject(prompt, names),
        )
        if (
            subject
            or len(prompt.split()) > MIN_PROMPT_WORDS
            or not answer.strip().startswith(tuple(names))
        ):
            spans.append(Span(tuple(ids), word[0], words[last][-1], prompt, answer, subject))
    return spans


def _group_words(token_strings: Sequence[str]) -> list[list[int]]:
    """Return token indices of each word but the first, without the ends of sentences."""
    words: list[list[int]] = []
    for position, token_string in enumerate(token_strings[1:], 1):
        if SENTENCE_END_PATTERN.search(token_string):
            words.append([])
        elif token_string[:1].isspace() or not words:
            words.append([position])
        elif words[-1]:
            words[-1].append(position)
    return [word for word in words if word and token_strings[word[0]][:1].isspace()]


def _completes_name(prompt: str, word: str, names: Sequence[str]) -> bool:
    """Return whether a word continues a name at the end of the prompt."""
    return any(
        prompt.endswith(name[:cut]) and name[cut:].startswith(word.rstrip(",;:'’s"))
        for name in names
        for cut in range(1, len(name))
        if name[cut].isspace()
    )


def _find_subject(prompt: str, names: Sequence[str]) -> str:
    """Return the last of the context's names in the prompt, or an empty string."""
    mentions = [(prompt.rfind(name), len(name), name) for name in names if name in prompt]
    return max(mentions)[2] if mentions else ""


@torch.no_grad()
def write_activation_deltas(
    fact_store: FactStore,
    teacher: ContextTeacher,
    spans: Sequence[Span],
    tag: str,
    source: str,
    overwrite: bool = True,
    false_positive_rate: float = FALSE_POSITIVE_RATE,
) -> list[WriteResult]:
    """Write a row for each token of the spans: the difference that the context makes to a layer.

    At the last layer a row reproduces the predictions of the model with context exactly, in the
    state in which it was written.

    Args:
        fact_store: the student and its facts, initialized.
        teacher: the model with context.
        spans: what to write.
        tag: tag of the facts.
        source: source of the facts.
        overwrite: whether they replace stored facts with the same prompt.
        false_positive_rate: target rate of the match thresholds.
    """
    model, tokenizer, key_layer, value_layer = (
        fact_store.model,
        fact_store.tokenizer,
        fact_store.hooks.key_layer,
        fact_store.hooks.value_layer,
    )
    spans_by_text: dict[tuple[int, ...], list[Span]] = {}
    for span in spans:
        spans_by_text.setdefault(span.ids, []).append(span)
    texts, prepared = sorted(spans_by_text), []
    for batch in batch_by_length([len(text) for text in texts]):
        tokens = pad_token_ids([texts[index] for index in batch]).to(
            next(model.parameters()).device
        )
        with disabled(model):
            base_signals = forward_with_prefix(
                model, get_prefix_ids(tokenizer), tokens, blocks=True
            )
            context_signals = teacher.predict(tokens, blocks=True)
        deltas = (
            context_signals.layer_outputs[value_layer] - base_signals.layer_outputs[value_layer]
        ).float()
        probs_after, probs_before = (
            torch.exp(-_token_nlls(signals.logits, tokens))
            for signals in (context_signals, base_signals)
        )
        for row, index in enumerate(batch):
            for span in spans_by_text[texts[index]]:
                positions = slice(span.first - 1, span.last)
                fact = Fact(span.prompt, span.answer, span.subject, tag, source)
                answer_ids = span.ids[span.first : span.last + 1]
                record = make_record(fact, answer_ids, false_positive_rate)
                with disabled(model):
                    key = compute_keys(model, fact_store.codec, [fact], key_layer)
                prepared.append(
                    PreparedFact(
                        record,
                        key.expand(len(answer_ids), -1),
                        deltas[row, positions].cpu(),
                        *(
                            float(probs[row, positions].prod())
                            for probs in (probs_before, probs_after)
                        ),
                    )
                )
    return fact_store.write_prepared(prepared, overwrite)


def extract_qa_facts(
    model: PreTrainedModel,
    teacher: ContextTeacher,
    tokenizer: Any,
    texts: Sequence[list[int]],
    names: Sequence[str],
    tag: str,
    source: str,
) -> list[Fact]:
    """Return generated questions as facts, if the context makes their answers more probable.

    Args:
        model: the model without context.
        teacher: the model with context.
        tokenizer: their tokenizer.
        texts: token ids of each question and answer, as `sampling.generate_qa` returns them.
        names: subjects of the context; questions without any of them are left out.
        tag: tag of the facts.
        source: source of the facts.
    """
    qa_parts = [tokenizer.decode(text).partition(ANSWER_PREFIX) for text in texts]
    facts = [
        Fact(
            question + ANSWER_PREFIX.rstrip(),
            " " + answer.strip(),
            _find_subject(question, names),
            tag,
            source,
        )
        for question, _, answer in qa_parts
        if answer.strip()
    ]
    facts = [fact for fact in facts if fact.subject or not names]
    if not facts:
        return []
    questions, device = (
        [Question(fact.prompt, fact.answer) for fact in facts],
        next(model.parameters()).device,
    )
    with disabled(model):
        base_scores = score_answers(
            partial(forward_with_prefix, model, get_prefix_ids(tokenizer)),
            tokenizer,
            questions,
            device,
        )
        context_scores = score_answers(teacher.predict, tokenizer, questions, device)
    return [
        fact
        for fact, base_nll, context_nll in zip(
            facts, base_scores.nlls, context_scores.nlls, strict=True
        )
        if base_nll - context_nll >= MIN_GAIN
    ]


def extract_stated_facts(
    sentences: Sequence[str], names: Sequence[str], tag: str, source: str
) -> list[Fact]:
    """Return the facts of sentences: a name, a number or the last word is the answer."""
    facts = []
    for sentence in sentences:
        try:
            fact = parse_fact(sentence, tag=tag, source=source)
        except UserError:
            continue
        facts.append(replace(fact, subject=_find_subject(fact.prompt, names)))
    return facts


def is_subject_recent(tokenizer: Any, prompt: str, subject: str) -> bool:
    """Return whether the subject is near enough to the end of the prompt for a row to match it."""
    return (
        not subject
        or len(encode_text(tokenizer, prompt[prompt.rfind(subject) :], add_prefix=False))
        < SUBJECT_WINDOW
    )


@torch.no_grad()
def find_false_triggers(
    fact_store: FactStore, windows: Sequence[Tensor], fact_ids: set[int]
) -> set[int]:
    """Return which of the facts fire in unrelated text, windows of token ids `(batch, time)`."""
    fired: set[int] = set()
    for tokens in windows:
        with record_matches(fact_store.model) as matches:
            forward_with_activations(fact_store.model, tokens)
        fired |= {match.fact.id for pass_matches in matches for match in pass_matches}
    return fact_ids & fired


def write_context(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    data: TextDataModule,
    run_dir: Path,
    is_new: bool,
) -> dict[str, Any]:
    """Write the context into the facts of a student in the run's folder, all or nothing.

    A resumed run writes everything again, with equal results.

    Args:
        run_state: the model with context, the settings and the questions.
        student: a copy of the model that is a student.
        data: unrelated text.
        run_dir: the run's folder.
        is_new: whether the run has no checkpoint yet.

    Returns:
        Numbers of facts, rows and bytes for `run.json`.

    Raises:
        NothingToDoError: the context does not change the model's predictions.
    """
    with atomic_directory(run_dir / "student", back_up_facts) as folder:
        return _write_to_folder(run_state, student, data, run_dir, is_new, folder)


def _write_to_folder(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    data: TextDataModule,
    run_dir: Path,
    is_new: bool,
    folder: Path,
) -> dict[str, Any]:
    config = run_state.config
    by_gradient = config.context.row_method == "gradient"
    (
        run_state.base if run_state.base.config.model_type.startswith("dmt_") else student
    ).save_pretrained(folder)
    save_tokenizer(run_state.tokenizer, folder)
    tag = Path(config.context.file).stem if config.context.file else "context"
    source = config.context.file or "context.text"
    with closing(FactStore.open(folder, packs=[])) as fact_store:
        existing_ids = set(fact_store.records)
        spans = [
            ([], []) if by_gradient else _collect_spans(run_state, chunk_index)
            for chunk_index in range(len(run_state.teachers))
        ]
        facts = [
            _collect_facts(run_state, chunk_index, tag, source) if by_gradient else []
            for chunk_index in range(len(run_state.teachers))
        ]
        if not any(facts) and not any(map(any, spans)):
            raise NothingToDoError(
                "the context does not change the model's predictions, so there is nothing to store"
            )
        fact_store.initialize([], value_layer=fact_store.model.config.num_hidden_layers - 1)
        for chunk_index, teacher in enumerate(run_state.teachers):
            if by_gradient:
                fact_store.write_many(facts[chunk_index])
            else:
                for span_group, overwrite in zip(spans[chunk_index], (True, False), strict=True):
                    write_activation_deltas(fact_store, teacher, span_group, tag, source, overwrite)
        false_triggers = find_false_triggers(
            fact_store, _unrelated_batches(run_state, data), set(fact_store.records) - existing_ids
        )
        fact_store.delete(sorted(false_triggers), "evicted")
        new_facts = [
            fact for fact_id, fact in fact_store.records.items() if fact_id not in existing_ids
        ]
        if config.context.row_method == "trained" and new_facts:
            new_facts = _train_rows(run_state, fact_store, data, run_dir, is_new, new_facts)
    num_rows = sum(len(fact.rows) for fact in new_facts)
    num_bytes = num_rows * 2 * 4 * student.config.hidden_size
    return {
        "num_facts": len(new_facts),
        "num_rows": num_rows,
        "false_triggers": len(false_triggers),
        "bytes": num_bytes,
        "tag": tag,
    }


def _context_names(run_state: ConsolidationRun) -> list[str]:
    """Return the subjects of all chunks."""
    return [name for chunk in run_state.context.chunks for name in chunk.names]


def _collect_spans(run_state: ConsolidationRun, chunk_index: int) -> tuple[list[Span], list[Span]]:
    """Return the spans of a chunk's own sentences, and of generated questions and continuations."""
    chunk, settings, names = (
        run_state.context.chunks[chunk_index],
        run_state.config.context,
        _context_names(run_state),
    )
    seed, continuations, qa_texts = run_state.config.seed * 101 + chunk_index, [], []
    if settings.objective == "generated":
        continuations = sample_continuations(
            run_state.teachers[chunk_index], chunk, run_state.tokenizer, settings, seed
        )
        qa_texts = generate_qa(run_state.base, chunk, run_state.tokenizer, settings, seed)
    span_lists = []
    for texts, min_prob in (
        (encode_sentences(chunk, run_state.tokenizer), MIN_PROB),
        (qa_texts, MIN_PROB),
        (continuations, MIN_GENERATED_PROB),
    ):
        spans = find_informative_spans(
            run_state.base,
            run_state.teachers[chunk_index],
            run_state.tokenizer,
            texts,
            names,
            min_prob,
        )
        span_lists.append(
            [
                span
                for span in spans
                if is_subject_recent(run_state.tokenizer, span.prompt, span.subject)
            ]
        )
    generated_spans = [span for span in span_lists[1] if span.subject or not names]
    return span_lists[0], generated_spans + [
        span
        for span in span_lists[2]
        if (span.subject or not names) and _is_stated(run_state, span)
    ]


def _is_stated(run_state: ConsolidationRun, span: Span) -> bool:
    """Return whether a sentence of the context has the subject and the answer.

    A continuation may state anything about anybody.
    """
    sentences = (sentence for chunk in run_state.context.chunks for sentence in chunk.sentences)
    return any(
        span.subject in sentence and span.answer.strip(" ,;") in sentence for sentence in sentences
    )


def _collect_facts(
    run_state: ConsolidationRun, chunk_index: int, tag: str, source: str
) -> list[Fact]:
    """Return the facts of a chunk: generated questions, and what its sentences state."""
    chunk, settings, seed = (
        run_state.context.chunks[chunk_index],
        run_state.config.context,
        run_state.config.seed * 101 + chunk_index,
    )
    facts = extract_stated_facts(chunk.sentences, _context_names(run_state), tag, source)
    if settings.objective == "generated":
        qa_texts = generate_qa(run_state.base, chunk, run_state.tokenizer, settings, seed)
        facts = (
            extract_qa_facts(
                run_state.base,
                run_state.teachers[chunk_index],
                run_state.tokenizer,
                qa_texts,
                _context_names(run_state),
                tag,
                source,
            )
            + facts
        )
    return [
        fact for fact in facts if is_subject_recent(run_state.tokenizer, fact.prompt, fact.subject)
    ]


def _unrelated_batches(run_state: ConsolidationRun, data: TextDataModule) -> list[torch.Tensor]:
    """Return training windows of every corpus, in which no row of a context should fire."""
    windows_by_corpus = [
        select_first_windows(corpus.train, FALSE_TRIGGER_TOKENS) for corpus in data.corpora
    ]
    return [
        batch.to(run_state.device)
        for corpus_windows in windows_by_corpus
        for batch in corpus_windows.split(run_state.config.data.micro_batch_size)
    ]


def _train_rows(
    run_state: ConsolidationRun,
    fact_store: FactStore,
    data: TextDataModule,
    run_dir: Path,
    is_new: bool,
    facts: list[FactRecord],
) -> list[FactRecord]:
    """Train the values of the facts' rows and write the facts again."""
    stored = [fact_store.load_fact(fact.id) for fact in facts]
    values = nn.Parameter(torch.cat([torch.from_numpy(fact.values) for fact in stored]))
    row_ids = [row for fact in stored for row in fact.record.rows]
    fact_store.hooks.trained_values = TrainedValues(
        {row_id: index for index, row_id in enumerate(row_ids)}, values
    )
    train_student(
        run_state, fact_store.model, {"rows": values}, run_state.prefix, data, run_dir, is_new
    )
    trained = values.detach().cpu().split([len(fact.values) for fact in stored])
    prepared = [
        PreparedFact(
            replace(fact.record, id=0, rows=()), torch.from_numpy(fact.keys), new_values, 0.0, 1.0
        )
        for fact, new_values in zip(stored, trained, strict=True)
    ]
    fact_store.hooks.trained_values = None
    fact_store.delete([fact.id for fact in facts], "replaced")
    return [result.fact for result in fact_store.write_prepared(prepared)]
