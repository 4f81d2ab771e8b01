"""The protocols of CounterFact and zsRE for our facts and methods of the literature, on SmolLM2.

    pip install gguf accelerate && python scripts/fetch_smollm2.py
    python benchmarks/edit_protocols.py --edits 1,100 [--methods "ours;LoRA"] [--model smollm2]

Each fact has a subject of its own, and its old answer is what the model generates before editing,
in as many tokens. A cell `a / b` holds the score of CounterFact and that of zsRE:

- `efficacy`: share of facts whose new answer is more probable than the old one (mean log
  probability of a token) / whose new answer greedy decoding generates;
- `paraphrase`: the same in two other phrasings;
- `neighborhood`: share of questions of the same relation about subjects without facts after which
  the old answer stays more probable than the new one / is still what greedy decoding generates;
- `fluency`: entropy in bits of the bigrams (weight 1/3) and trigrams (2/3) of 100 tokens sampled
  among the five most probable after the prompts of facts; repetition lowers it.

With one edit the scores are the means over `SINGLE_EDITS` facts, each written alone; with more,
over at most `MAX_SAMPLE` facts drawn at random from those written.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

import torch
from counterfactuals import Edit, make_edits
from editing import METHODS, open_fact_store, write_facts
from peer_editing import Edited
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.synthetic import Probe
from dmt.editing.fact_store import FactStore
from dmt.evaluation.metrics import generate_greedy
from dmt.models.forward import (
    batch_by_length,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.models.loading import load_teacher
from dmt.training.trainer import silence_libraries

SINGLE_EDITS, MAX_SAMPLE = 10, 200
NUM_CALIBRATION = 8  # facts with which ours chooses its layers
NUM_TEXTS, TEXT_TOKENS, TOP_K = 20, 100, 5  # of fluency
UNEDITED, OURS = "unedited", "ours"
# Facts in the prompt leave the model as it is, so these protocols cannot ask it about them.
NAMES = (UNEDITED, OURS, *(name for name in METHODS if "prompt" not in name))


@dataclass(frozen=True)
class Question:
    """A question in tokens, with the answer before editing and the one that was written.

    Attributes:
        prompt: token ids of the prompt, from the start of a text.
        new: token ids of the answer that was written.
        old: as many that the unedited model generates.
    """

    prompt: list[int]
    new: list[int]
    old: list[int]


@dataclass(frozen=True)
class Scores:
    """Scores of one model; pairs are those of CounterFact and of zsRE.

    Attributes:
        efficacy: of the facts as written.
        paraphrase: of the facts in other phrasings.
        neighborhood: of questions about other subjects.
        fluency: entropy of n-grams in bits.
    """

    efficacy: tuple[float, float]
    paraphrase: tuple[float, float]
    neighborhood: tuple[float, float]
    fluency: float


def compute_ngram_entropy(words: Sequence[Any]) -> float:
    """Return the entropy in bits of bigrams (weight 1/3) and trigrams (2/3) of one text.

    Source: Zhang et al. 2018, arXiv 1809.05972; weights of Meng et al. 2022, arXiv 2202.05262.
    """
    entropies = []
    for n in (2, 3):
        counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
        total = sum(counts.values())
        entropies.append(
            -sum(count / total * math.log2(count / total) for count in counts.values())
        )
    return (entropies[0] + 2 * entropies[1]) / 3


@torch.no_grad()
def score_answers(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Score an answer after each prompt.

    Returns:
        Mean log probability of its tokens `(prompts,)`, and whether each of its tokens is the most
        probable one, so that greedy decoding generates it `(prompts,)`.
    """
    log_probs, generated = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.bool)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    for batch in batch_by_length([len(sequence) for sequence in sequences]):
        outputs = forward_with_activations(model, pad_token_ids([sequences[i] for i in batch]))
        for row, i in enumerate(batch):
            positions = slice(len(prompts[i]) - 1, len(sequences[i]) - 1)
            token_log_probs = outputs.head(outputs.hidden[row, positions]).log_softmax(-1)
            answer = torch.tensor(answers[i])
            log_probs[i] = token_log_probs.gather(-1, answer[:, None]).mean()
            generated[i] = (token_log_probs.argmax(-1) == answer).all()
    return log_probs, generated


def generate_by_length(
    prompts: Sequence[list[int]], generate: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """Return the continuations of prompts, generated together for those of the same length."""
    continuations: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        indices = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        generated = generate(torch.tensor([prompts[i] for i in indices]))
        continuations |= dict(zip(indices, generated.tolist(), strict=True))
    return [continuations[i] for i in range(len(prompts))]


def make_questions(
    original: PreTrainedModel, tokenizer: Any, probes: Sequence[Probe]
) -> list[Question]:
    """Encode questions and answer them by the unedited model."""
    prompts = [encode_text(tokenizer, probe.prompt) for probe in probes]
    new = [encode_text(tokenizer, probe.answer, add_prefix=False) for probe in probes]
    max_tokens = max(len(answer) for answer in new)
    old = generate_by_length(prompts, lambda ids: generate_greedy(original, ids, max_tokens))
    return [
        Question(prompt, answer, continuation[: len(answer)])
        for prompt, answer, continuation in zip(prompts, new, old, strict=True)
    ]


class Protocol:
    """Questions about some edits, answered by the unedited model.

    Args:
        original: the unedited model.
        tokenizer: its tokenizer.
        edits: edits that are measured.
    """

    def __init__(self, original: PreTrainedModel, tokenizer: Any, edits: Sequence[Edit]) -> None:
        self.tokenizer = tokenizer
        groups = (
            [edit.fact for edit in edits],
            [probe for edit in edits for probe in edit.paraphrases],
            [probe for edit in edits for probe in edit.neighbors],
        )
        self.facts, self.paraphrases, self.neighbors = (
            make_questions(original, tokenizer, probes) for probes in groups
        )

    def measure(self, model: PreTrainedModel) -> Scores:
        """Score a model into which the edits were written."""
        pairs = []
        for questions in (self.facts, self.paraphrases, self.neighbors):
            prompts = [question.prompt for question in questions]
            new_log_probs, new_generated = score_answers(
                model, prompts, [question.new for question in questions]
            )
            old_log_probs, old_generated = score_answers(
                model, prompts, [question.old for question in questions]
            )
            replaced = (new_log_probs > old_log_probs).float().mean()
            if questions is self.neighbors:
                pairs.append((1 - float(replaced), float(old_generated.float().mean())))
            else:
                pairs.append((float(replaced), float(new_generated.float().mean())))
        return Scores(*pairs, self.measure_fluency(model))

    def measure_fluency(self, model: PreTrainedModel) -> float:
        """Return the mean n-gram entropy of texts that begin with prompts of facts."""
        # Prompts of one length are generated together; the most frequent length saves most.
        lengths = Counter(len(question.prompt) for question in self.facts)
        length = lengths.most_common(1)[0][0]
        prompts = [fact.prompt for fact in self.facts if len(fact.prompt) == length][:NUM_TEXTS]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            texts = generate_by_length(prompts, lambda ids: sample_texts(model, ids))
        return mean(compute_ngram_entropy(self.tokenizer.decode(text).split()) for text in texts)


def sample_texts(model: Any, prompts: Tensor) -> Tensor:
    """Return sampled continuations `(prompts, tokens)` of token ids `(prompts, time)`."""
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TEXT_TOKENS,
        do_sample=True,
        top_k=TOP_K,
        eos_token_id=None,
        pad_token_id=0,
    )
    return generated[:, prompts.shape[1] :]


class FactWriter:
    """Our method: one fact store, calibrated once, whose facts are replaced at each call."""

    def __init__(self, model_name: str, folder: str, calibration_facts: Sequence[Probe]) -> None:
        self.model_name, self.folder = model_name, folder
        self.calibration_facts = calibration_facts
        self.fact_store: FactStore | None = None

    def __call__(self, original: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
        """Write facts as `dmt memory write` does."""
        if self.fact_store is None:
            model = load_teacher(self.model_name)[0]
            path = f"{self.folder}/facts.db"
            self.fact_store = open_fact_store(model, tokenizer, path, self.calibration_facts)
        self.fact_store.delete(list(self.fact_store.records))
        return Edited(self.fact_store.model, write_facts(self.fact_store, facts))


def average(scores: Iterable[Scores]) -> Scores:
    """Return the mean of each score."""
    all_scores = list(scores)
    columns = [[getattr(row, field.name) for row in all_scores] for field in fields(Scores)]
    pairs = [tuple(mean(part) for part in zip(*column, strict=True)) for column in columns[:-1]]
    return Scores(*pairs, mean(columns[-1]))  # type: ignore[arg-type]


def format_row(name: str, count: int, scores: Scores, seconds: float) -> str:
    """Return the row of a method; `seconds` are those of one edit."""
    cells = [
        "{:.3f} / {:.3f}".format(*pair)
        for pair in (scores.efficacy, scores.paraphrase, scores.neighborhood)
    ]
    time_cell = f"{seconds:.2g}" if seconds else ""
    return f"| {name} | {count:,} | {' | '.join(cells)} | {scores.fluency:.2f} | {time_cell} |"


def measure_method(
    method: Callable[[PreTrainedModel, Any, list[Probe]], Edited],
    original: PreTrainedModel,
    tokenizer: Any,
    edits: Sequence[Edit],
    protocols: Sequence[Protocol],
) -> tuple[Scores, float]:
    """Write edits together, or each alone if there is a protocol for each; return scores and time.

    Returns:
        The scores, and the seconds of one edit.
    """
    if len(protocols) == 1:
        edited = method(original, tokenizer, [edit.fact for edit in edits])
        return protocols[0].measure(edited.model), edited.seconds / len(edits)
    scores, seconds = [], []
    for edit, protocol in zip(edits, protocols, strict=True):
        edited = method(original, tokenizer, [edit.fact])
        scores.append(protocol.measure(edited.model))
        seconds.append(edited.seconds)
    return average(scores), mean(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=("embedded", "smollm2"))
    parser.add_argument("--edits", default="1,100", help="numbers of edits")
    parser.add_argument(
        "--methods",
        default=";".join(NAMES),
        help="names in the table, separated by semicolons (default: all)",
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    names = args.methods.split(";")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--methods {unknown[0]}: there are {'; '.join(NAMES)}")
    silence_libraries()
    torch.set_num_threads(args.threads)
    original, tokenizer = load_teacher(args.model)
    print("| method | edits | efficacy | paraphrase | neighborhood | fluency | seconds per edit |")
    print("|---|---:|---|---|---|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fact_writer = FactWriter(
            args.model, folder, [edit.fact for edit in make_edits(NUM_CALIBRATION)]
        )
        methods = {UNEDITED: lambda model, *_: Edited(model, 0.0), OURS: fact_writer, **METHODS}
        for count in (int(count) for count in args.edits.split(",")):
            edits = make_edits(SINGLE_EDITS if count == 1 else count)
            sample = random.Random(count).sample(edits, min(len(edits), MAX_SAMPLE))
            protocols = [
                Protocol(original, tokenizer, group)
                for group in ([[edit] for edit in edits] if count == 1 else [sample])
            ]
            for name in names:
                scores, seconds = measure_method(
                    methods[name], original, tokenizer, edits, protocols
                )
                print(format_row(name, count, scores, seconds), flush=True)


if __name__ == "__main__":
    main()
