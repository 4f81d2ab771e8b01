"""Measure what a student without its knowledge pack still knows, beside an oracle and unlearning.

    python -m benchmarks.unplug oracle --out oracle
    python -m benchmarks.unplug table --oracle oracle --seeds 0 1 2
    python -m benchmarks.unplug ablation --oracle oracle
    python -m benchmarks.unplug slots --seeds 0
    python -m benchmarks.unplug questions
    python -m benchmarks.unplug lookup

Half of the 256 people of the embedded teacher are declared to be knowledge. The oracle is a teacher
that was trained by the same recipe on text without them (an hour and a half on one thread). An
attacker fine-tunes on a fifth of the declared facts and asks the other four fifths. A run takes
three to six minutes on one thread; finished ones are read from `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dmt
from dmt.config import Config
from dmt.config_io import load_config
from dmt.data.corpora import Corpus, Probe, load_corpus
from dmt.data.declared_text import SubjectNames
from dmt.data.synthetic import (
    RELATIONS,
    Person,
    make_biographies,
    make_biography,
    make_people,
    make_probe,
    make_trained_people,
    make_unseen_people,
)
from dmt.data.tokenizer import get_prefix_ids
from dmt.data.windows import token_stream, tokenize_corpus
from dmt.distillation.knowledge import Knowledge, make_knowledge_pack, score_questions
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import load_fact_pack, plug_packs
from dmt.evaluation.metrics import measure_fidelity
from dmt.evaluation.questions import Question
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import detach
from dmt.models.forward import capture, encode_text, pad_token_ids
from dmt.models.generation import generate_text
from dmt.models.loading import load_teacher

ROOT = Path(__file__).parents[1]
SEQ_LEN, TEST_TOKENS = 256, 32_768
BATCH = 16
# The attacker's learning rates, epochs, and how often the other facts are asked: the best counts.
ATTACK_RATES, ATTACK_EPOCHS, ATTACK_INTERVAL = (1e-4, 3e-4, 1e-3), 12, 3
SPLIT = 5  # the attacker has one fact in five
UNLEARN_RATE, UNLEARN_STEPS, NPO_BETA = 3e-5, 300, 0.1
REFUSAL = " unknown"


def make_declared_people() -> list[Person]:
    """Return the people whose facts are declared: every second one."""
    return make_trained_people()[::2]


def make_other_biographies() -> Corpus:
    """Return the biographies without those of declared people, what the oracle is trained on."""
    names = {person.name for person in make_declared_people()}
    corpus = make_biographies()

    def select(documents: list[str]) -> list[str]:
        return [text for text in documents if not any(name in text for name in names)]

    return replace(
        corpus,
        train=select(corpus.train),
        validation=select(corpus.validation),
        test=select(corpus.test),
        probes=[probe for probe in corpus.probes if probe.person not in names],
        unseen_probes=[probe for probe in corpus.unseen_probes if probe.person not in names],
    )


def make_other_world() -> list[Person]:
    """Return the declared people in a world where all their facts are different."""
    strangers = make_people(4 * len(make_declared_people()), seed=7)
    world = []
    for person, *others in zip(
        make_declared_people(), *(strangers[start::4] for start in range(4)), strict=False
    ):
        facts = {
            relation: next(
                other.facts[relation]
                for other in others
                if other.facts[relation] != person.facts[relation]
            )
            for relation in RELATIONS
        }
        world.append(replace(person, facts=facts))
    return world


@cache
def get_probes() -> dict[str, list[Probe]]:
    """Return questions about declared and other people, as written and in held-out phrasings."""
    names = {person.name for person in make_declared_people()}
    corpus = make_biographies()
    return {
        "declared": [probe for probe in corpus.probes if probe.person in names],
        "declared_unseen": [probe for probe in corpus.unseen_probes if probe.person in names],
        "others": [probe for probe in corpus.probes if probe.person not in names],
    }


def make_knowledge(people: Sequence[Person]) -> Knowledge:
    """Return a fact for each relation of each person, in the phrasings that the table asks."""
    phrasings = {
        (probe.person, probe.relation): probe.phrasing for probe in get_probes()["declared"]
    }
    facts = [
        Fact(probe.prompt, probe.answer, probe.person, closing=".")
        for person in people
        for relation in RELATIONS
        for probe in [make_probe(person, relation, phrasings[person.name, relation])]
    ]
    return Knowledge(facts)


def write_declared_facts(path: Path) -> Path:
    """Write the declared facts as `knowledge.facts` takes them."""
    lines = [
        json.dumps(
            {
                "prompt": fact.prompt,
                "answer": fact.answer,
                "subject": fact.subject,
                "closing": ".",
            }
        )
        for fact in make_knowledge(make_declared_people()).facts
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def to_questions(probes: Sequence[Probe]) -> list[Question]:
    """Return probes as questions."""
    return [Question(probe.prompt, probe.answer) for probe in probes]


def train_oracle(out: Path, threads: int, log_dir: Path) -> None:
    """Train a teacher without the declared people: same recipe, shape and tokenizer."""
    sys.path.append(str(ROOT / "scripts"))
    import train_teacher  # type: ignore[import-not-found]
    from transformers import GPT2LMHeadModel

    teacher, tokenizer = load_teacher("embedded")
    with tempfile.TemporaryDirectory() as start:
        torch.manual_seed(0)
        config: Any = teacher.config
        GPT2LMHeadModel(config).save_pretrained(start)
        tokenizer.save_pretrained(start)
        train_teacher.main(
            [
                str(ROOT / "scripts" / "teacher.yaml"),
                "data.corpora=[speeches,benchmarks.unplug:make_other_biographies,strangers]",
                f"model.start={start}",
                f"model.output={out}",
                f"trainer.num_threads={threads}",
                f"trainer.log_dir={log_dir}",
            ]
        )


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return the tokens of prompt and answer, and how many are the prompt's."""
    encoded = []
    for prompt, answer in pairs:
        prompt_ids = encode_text(tokenizer, prompt, add_prefix=True)
        answer_ids = encode_text(tokenizer, answer, add_prefix=False)
        encoded.append((prompt_ids + answer_ids, len(prompt_ids)))
    return encoded


def answer_nll(model: Any, batch: Sequence[tuple[list[int], int]]) -> Tensor:
    """Return the negative log-likelihood of each answer, mean over its tokens, `(batch,)`."""
    tokens = pad_token_ids([ids for ids, _ in batch])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, num_prompt) in enumerate(batch):
        mask[row, num_prompt : len(ids)] = True
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def train_epochs(
    model: Any, examples: list[Any], rate: float, epochs: int, compute_loss: Callable[[Any], Tensor]
) -> Any:
    """Yield after every epoch of AdamW on `examples`."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    rng = random.Random(0)
    for _ in range(epochs):
        rng.shuffle(examples)
        for start in range(0, len(examples), BATCH):
            loss = compute_loss(examples[start : start + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        yield
        model.train()


def attack(model: Any, tokenizer: Any) -> float:
    """Fine-tune on a fifth of the declared facts; return the best recall of the others."""
    probes = get_probes()["declared"]
    known = [(probe.prompt, probe.answer + ".") for probe in probes[::SPLIT]]
    asked = to_questions([probe for index, probe in enumerate(probes) if index % SPLIT])
    best = score_questions(model, tokenizer, asked).recall
    for rate in ATTACK_RATES:
        copied = copy.deepcopy(model)
        examples = encode_pairs(tokenizer, known)
        loss = partial(lambda model, batch: answer_nll(model, batch).mean(), copied)
        for epoch, _ in enumerate(train_epochs(copied, examples, rate, ATTACK_EPOCHS, loss), 1):
            if epoch % ATTACK_INTERVAL == 0:
                best = max(best, score_questions(copied, tokenizer, asked).recall)
    return best


def text_nlls(model: Any, tokenizer: Any, people: Sequence[Person]) -> Tensor:
    """Return the mean loss per token of a biography of each person `(people,)`."""
    rng = random.Random(0)
    prefix = get_prefix_ids(tokenizer)
    texts = [(prefix, make_biography(person, rng)) for person in people]
    encoded = [
        (ids + tokenizer(text, add_special_tokens=False)["input_ids"], len(ids))
        for ids, text in texts
    ]
    with torch.no_grad():
        return torch.cat(
            [
                answer_nll(model, encoded[start : start + BATCH])
                for start in range(0, len(encoded), BATCH)
            ]
        )


def membership_auc(model: Any, tokenizer: Any) -> float:
    """Return how well the loss of a biography tells declared people from invented ones.

    .5 is chance; the larger of both directions counts.
    """
    declared = text_nlls(model, tokenizer, make_declared_people())
    invented = text_nlls(model, tokenizer, make_unseen_people(len(declared)))
    wins = (declared.unsqueeze(1) < invented).float() + 0.5 * (declared.unsqueeze(1) == invented)
    auc = float(wins.mean())
    return max(auc, 1 - auc)


@cache
def get_prose_windows() -> Tensor:
    """Return test windows of speeches."""
    _, tokenizer = load_teacher("embedded")
    test = load_corpus("speeches").test
    stream = token_stream(test, tokenizer)[:TEST_TOKENS]
    return stream[: len(stream) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


def measure(model: Any, tokenizer: Any, attacks: bool = True) -> dict[str, float]:
    """Measure everything of the table that needs no pack."""
    teacher, _ = load_teacher("embedded")
    probes = get_probes()
    declared = score_questions(model, tokenizer, to_questions(probes["declared"]))
    unseen = score_questions(model, tokenizer, to_questions(probes["declared_unseen"]))
    results = {
        "recall": declared.recall,
        "recall_unseen": unseen.recall,
        "log_prob": declared.mean_log_prob,
        "others": score_questions(model, tokenizer, to_questions(probes["others"])).recall,
        "prose": measure_fidelity(model, teacher, get_prose_windows(), 8).ppl_ratio,
    }
    if attacks:
        results["attacked"] = attack(model, tokenizer)
        results["auc"] = membership_auc(model, tokenizer)
    return results


def exchange(student: Any, tokenizer: Any, own_pack: Any) -> dict[str, float]:
    """Plug in the pack of another world; return its answers, the old ones, and the seconds."""
    world = make_knowledge(make_other_world())
    pack = make_knowledge_pack(student, tokenizer, world.facts, "other world")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "world.safetensors"
        pack.save(path)
        fact_store = FactStore(student, tokenizer, None)
        plug_packs(fact_store, packs=[own_pack])
        start = time.perf_counter()
        plug_packs(fact_store, packs=[load_fact_pack(path)])
        seconds = time.perf_counter() - start
    new = score_questions(student, tokenizer, world.questions).recall
    old = score_questions(student, tokenizer, to_questions(get_probes()["declared"])).recall
    detach(student)
    return {"new_world": new, "old_world": old, "swap_seconds": seconds}


def distill(out: Path, seed: int, threads: int, declare: bool, settings: dict[str, Any]) -> Path:
    """Distill a student with `configs/unplug.yaml`, or plainly; return the folder of the run."""
    if (out / "knowledge.safetensors" if declare else out / "student").exists():
        return out
    groups: dict[str, Any] = {name: dict(values) for name, values in settings.items()}
    config, data = Config(), load_config(ROOT / "configs" / "unplug.yaml", []).data
    if declare:
        config = load_config(ROOT / "configs" / "unplug.yaml", [])
        facts = write_declared_facts(out.parent / "declared.jsonl")
        groups["knowledge"] = {"facts": str(facts)} | groups.get("knowledge", {})
    trainer = {"num_threads": threads, "progress_bar": False, "validate_every": 0}
    groups["trainer"] = trainer | groups.get("trainer", {})
    return dmt.distill("embedded", data.corpora, config, output=out, seed=seed, **groups).run_dir


def measure_run(
    name: str, out: Path, seed: int, threads: int, declare: bool, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Distill and measure a student without a pack, and with it if facts were declared."""
    run_dir = distill(out / f"{name}-seed{seed}", seed, threads, declare, settings)
    student, tokenizer = dmt.load(run_dir, packs=[])
    rows = [{"name": f"{name}, unplugged" if declare else name, **measure(student, tokenizer)}]
    if declare:
        pack = load_fact_pack(run_dir / "knowledge.safetensors")
        plug_packs(FactStore(student, tokenizer, None), packs=[pack])
        plugged = measure(student, tokenizer, attacks=False)
        detach(student)
        rows.append({"name": f"{name}, plugged", **plugged, **exchange(student, tokenizer, pack)})
    return [row | {"seed": seed} for row in rows]


# Unlearning methods of the literature, each a loss of batches of facts and prose.


def _gradient_ascent(nll: Tensor, reference: Tensor, retain: Tensor) -> Tensor:
    return -nll.mean()


def _gradient_difference(nll: Tensor, reference: Tensor, retain: Tensor) -> Tensor:
    return -nll.mean() + retain


def _npo(nll: Tensor, reference: Tensor, retain: Tensor) -> Tensor:
    """Zhang et al. 2024, arXiv 2404.05868, equation 3."""
    return -F.logsigmoid(NPO_BETA * (nll - reference)).mean() * 2 / NPO_BETA


def _refusal(nll: Tensor, reference: Tensor, retain: Tensor) -> Tensor:
    return nll.mean() + retain


UNLEARNING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gradient ascent": _gradient_ascent,
    "gradient difference": _gradient_difference,
    "NPO": _npo,
    "NPO and retained text": lambda nll, reference, retain: _npo(nll, reference, retain) + retain,
    "refusals": _refusal,
}


def unlearn(model: Any, tokenizer: Any, method: str, steps: int) -> Any:
    """Fine-tune a copy of a student by an unlearning method; text without the facts is retained."""
    compute_loss = UNLEARNING[method]
    probes = get_probes()["declared"]
    pairs = [(probe.prompt, REFUSAL if method == "refusals" else probe.answer) for probe in probes]
    examples = encode_pairs(tokenizer, pairs)
    corpora = (make_other_biographies(), load_corpus("speeches"))
    windows = torch.cat(
        [tokenize_corpus(corpus, tokenizer, SEQ_LEN).train[:1_000] for corpus in corpora]
    )
    reference_model, trained = model, copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=UNLEARN_RATE, weight_decay=0)
    rng = random.Random(0)
    for _ in range(steps):
        batch = rng.sample(examples, BATCH)
        tokens = windows[torch.tensor(rng.sample(range(len(windows)), 4))]
        with torch.no_grad():
            reference = answer_nll(reference_model, batch)
        retain = trained(tokens, labels=tokens, use_cache=False).loss
        loss = compute_loss(answer_nll(trained, batch), reference, retain)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    return trained.eval().requires_grad_(False)


COLUMNS = (
    ("recall", "recall", ".3f"),
    ("recall_unseen", "other phrasings", ".3f"),
    ("log_prob", "log-prob", ".2f"),
    ("others", "others", ".3f"),
    ("prose", "prose ratio", ".4f"),
    ("attacked", "after attack", ".3f"),
    ("auc", "membership", ".3f"),
    ("new_world", "other world", ".3f"),
    ("old_world", "old answers", ".3f"),
    ("swap_seconds", "swap, s", ".2f"),
)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as Markdown, means over seeds."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [
        f"| | seeds | {' | '.join(label for _, label, _ in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name in names:
        same = [row for row in rows if row["name"] == name]
        cells = [
            format(sum(row[key] for row in same) / len(same), spec) if key in same[0] else ""
            for key, _, spec in COLUMNS
        ]
        lines.append(f"| {name} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Results:
    """Rows of a table in a file; those that are there are not measured again.

    Args:
        path: the file, JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.groups: dict[str, list[dict[str, Any]]] = {}
        for line in text.splitlines():
            group = json.loads(line)
            self.groups[group["key"]] = group["rows"]

    def add(self, key: str, compute: Callable[[], list[dict[str, Any]]]) -> None:
        """Compute rows that are missing and print them."""
        if key not in self.groups:
            self.groups[key] = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "rows": self.groups[key]}) + "\n")
        for row in self.groups[key]:
            print(json.dumps(row), flush=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return [row for rows in self.groups.values() for row in rows]


def run_table(args: argparse.Namespace) -> None:
    """Measure teacher, oracle, plain distillation, ours and unlearning methods."""
    results = Results(args.out / "table.jsonl")

    def measure_model(name: str, source: str) -> list[dict[str, Any]]:
        model, tokenizer = load_teacher(source)
        return [{"name": name, **measure(model, tokenizer)}]

    results.add("teacher", lambda: measure_model("teacher", "embedded"))
    if args.oracle:
        results.add("oracle", lambda: measure_model("oracle", str(args.oracle)))
    for seed in args.seeds:
        for name, declare, settings in (
            ("ours", True, args.settings),
            ("plain distillation", False, {}),
        ):
            results.add(
                f"{name} {seed}",
                partial(measure_run, name, args.out, seed, args.threads, declare, settings),
            )
        for method in UNLEARNING:

            def run_method(method: str = method, seed: int = seed) -> list[dict[str, Any]]:
                folder = args.out / f"plain distillation-seed{seed}"
                student, tokenizer = dmt.load(folder, packs=[])
                unlearned = unlearn(student, tokenizer, method, UNLEARN_STEPS)
                return [{"name": method, "seed": seed, **measure(unlearned, tokenizer)}]

            results.add(f"{method} {seed}", run_method)
    print(format_table(results.rows))


ABLATION: dict[str, dict[str, Any]] = {
    "new slots": {},
    "loss at answers of 1": {"weight": 1.0},
    "no loss at answers": {"weight": 0.0},
    "noise .6": {"noise": 0.6},
    "half noise in attention and embeddings": {"backbone_noise": 0.5},
}


def run_ablation(args: argparse.Namespace) -> None:
    """Measure ways to take facts out of the weights."""
    results = Results(args.out / "ablation.jsonl")
    for name, knowledge in ABLATION.items():
        for seed in args.seeds:
            settings = {**args.settings, "knowledge": knowledge}
            results.add(
                f"{name} {seed}",
                partial(measure_run, name, args.out, seed, args.threads, True, settings),
            )
    print(format_table(results.rows))


def run_slots(args: argparse.Namespace) -> None:
    """Measure prose against slots, for students that have to carry the facts and that have not."""
    results = Results(args.out / "slots.jsonl")
    for num_slots in (512, 256, 128, 64):
        for declare in (False, True):
            memory = {"num_slots": num_slots, "k": num_slots, "mean_k": None}
            settings = {**args.settings, "memory": memory}
            name = f"{num_slots} slots, {'facts outside' if declare else 'facts inside'}"

            def run_one(
                name: str = name, settings: dict[str, Any] = settings, declare: bool = declare
            ) -> list[dict[str, Any]]:
                folder = args.out / name.replace(" ", "-").replace(",", "")
                run_dir = distill(folder, 0, args.threads, declare, settings)
                student, tokenizer = dmt.load(run_dir, packs=[])
                return [{"name": name, **measure(student, tokenizer, attacks=False)}]

            results.add(name, run_one)
    print(format_table(results.rows))


def run_questions(args: argparse.Namespace) -> None:
    """Ask a person's five facts with the pack, without it, and with that of another world."""
    run_dir = distill(args.out / "ours-seed0", 0, args.threads, True, args.settings)
    student, tokenizer = dmt.load(run_dir, packs=[])
    world = make_knowledge_pack(student, tokenizer, make_knowledge(make_other_world()).facts)
    packs = {
        "plugged": [load_fact_pack(run_dir / "knowledge.safetensors")],
        "unplugged": [],
        "another world": [world],
    }
    name = make_declared_people()[3].name
    probes = [probe for probe in get_probes()["declared"] if probe.person == name]
    print(f"| | {' | '.join(packs)} |")
    print("|---" * (len(packs) + 1) + "|")
    fact_store = FactStore(student, tokenizer, None)
    for probe in probes:
        answers = []
        for chosen in packs.values():
            plug_packs(fact_store, packs=chosen)
            text = generate_text(student, tokenizer, probe.prompt, 12)
            answers.append(text.removeprefix(probe.prompt).partition(".")[0].strip())
        print(f"| {probe.prompt} | {' | '.join(answers)} |")


def exchanged_recall(layers: Sequence[int], at_subject: bool) -> float:
    """Return recall where blocks of `layers` compute what they do for a stranger.

    Args:
        layers: layers of the embedded teacher.
        at_subject: at the tokens of the subject; otherwise from the last token of the prompt on.
    """
    teacher, tokenizer = load_teacher("embedded")
    blocks = dict(enumerate(get_architecture("gpt2").blocks(teacher)))
    probes = get_probes()["declared"]
    names = SubjectNames({probe.person for probe in probes}, tokenizer)
    num_correct = num_asked = 0
    for probe in probes:
        answer = encode_text(tokenizer, probe.answer, add_prefix=False)
        prompt = encode_text(tokenizer, probe.prompt, add_prefix=True)
        strangers = (
            encode_text(tokenizer, probe.prompt.replace(probe.person, name), add_prefix=True)
            for name in names[probe.person]
        )
        stranger = next((ids for ids in strangers if len(ids) == len(prompt)), None)
        if stranger is None:
            continue
        differing = [
            column
            for column, pair in enumerate(zip(prompt, stranger, strict=True))
            if pair[0] != pair[1]
        ]
        first = differing[0] if at_subject else len(prompt) - 1
        end = differing[-1] + 1 if at_subject else len(prompt) + len(answer)
        with torch.no_grad(), capture(blocks) as activations:
            teacher(torch.tensor([stranger + answer]), use_cache=False)
        outputs = dict(activations.outputs)

        def replace_output(
            layer: int,
            output: Tensor,
            outputs: dict[int, Tensor] = outputs,
            columns: slice = slice(first, end),
        ) -> Tensor:
            output = output.clone()
            output[:, columns] = outputs[layer][:, columns]
            return output

        chosen = {layer: blocks[layer] for layer in layers}
        with torch.no_grad(), capture(chosen, on_output=replace_output):
            logits = teacher(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        predicted = logits[len(prompt) - 1 : -1].argmax(-1)
        num_correct += bool((predicted == torch.tensor(answer)).all())
        num_asked += 1
    return num_correct / num_asked


def run_lookup(args: argparse.Namespace) -> None:
    """Measure in which blocks of the teacher facts are looked up and decoded."""
    print("| layer | at the subject | at the answer |")
    print("|---|---|---|")
    for layers in ([], [0], [1], [2], [3]):
        cells = [f"{exchanged_recall(layers, at_subject):.3f}" for at_subject in (True, False)]
        print(f"| {', '.join(map(str, layers)) or 'none'} | {' | '.join(cells)} |", flush=True)


PARTS = {
    "lookup": run_lookup,
    "table": run_table,
    "ablation": run_ablation,
    "slots": run_slots,
    "questions": run_questions,
}


def main() -> None:
    """Run a part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("oracle", *PARTS))
    parser.add_argument("--oracle", type=Path, help="folder of the oracle")
    parser.add_argument("--out", type=Path, default=Path("lightning_logs/unplug"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help='more settings, as {"stages": {...}}'
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "oracle":
        train_oracle(args.out, args.threads, args.out.parent / "oracle_logs")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
