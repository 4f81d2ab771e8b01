"""Compare the kinds of memory at equal bytes read per token: `python -m benchmarks.catalogue`.

    python -m benchmarks.catalogue [--kinds featural,peer] [--budgets 0.33,0.66] [--seeds 3]
        [--steps 1400] [--config smollm2] [--out FOLDER] [--resume] [KEY=VALUE ...]

A budget is a share of the bytes that the teacher's blocks read per token. Each kind begins with its
settings in `configs/catalogue` (`featural` with those of `--config`) and gets the largest size that
stays within the budget, found by measuring students of one layer. A size is what costs: slots where
all are compared, slots read where keys in 8 bits find them. All are distilled from the same
teacher on the same tokens. Kinds without a size run once. The four kinds with the lowest KL are
repeated with other seeds.

`FOLDER` (by default `lightning_logs/catalogue`) gets the runs, `results.jsonl` with a line for each
run, `table.md`, and `kl_by_bytes.svg`, all after each run. `--resume` goes on with what is missing.
Settings as KEY=VALUE apply to every run. Processes side by side need a folder each; the lines of
their `results.jsonl` can be joined in another folder, where `--resume` goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from benchmarks.decode import generate
from benchmarks.tables import Row, medians, table
from torch import Tensor

import dmt
from dmt.config import Config, MemoryConfig, SumConfig
from dmt.config_files import find_config
from dmt.config_io import load_config
from dmt.data.windows import TextDataModule
from dmt.distillation.run import DistillResult, read_result
from dmt.errors import UserError
from dmt.evaluation.cost import measure_costs
from dmt.files import atomic_write
from dmt.memory.slot_table import DEFAULT_K_DIVISOR
from dmt.models.architectures import get_architecture
from dmt.models.calibration import calibrate_memories
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_teacher
from dmt.models.loading import load_teacher
from dmt.models.memories import get_associative_memories, get_featural_memories
from dmt.progress import humanize_duration
from dmt.report.results import has_results
from dmt.report.svg import Series, draw_plot
from dmt.training.run_dir import read_record
from dmt.validation import ArgumentError

CATALOGUE = Path(__file__).parents[1] / "configs" / "catalogue"
NUM_BEST = 4  # kinds that run with every seed
PROBE_WINDOWS = 2  # of calibration text, for students whose cost is measured
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 16, 128, 3  # of generation
PICTURE_TITLE = "KL by bytes read per token"
RESULTS_FILE = "results.jsonl"
MIN_KL = 1e-9  # of a student that reads everything, whose KL is rounding


@dataclass(frozen=True)
class Size:
    """How a kind grows.

    Attributes:
        setting: what changes.
        unit: sizes are multiples of it, or of the value of a setting that it names.
        apply: returns settings of a size.
    """

    setting: str
    unit: int | str
    apply: Callable[[Any, int], MemoryConfig]

    def get_unit(self, config: MemoryConfig) -> int:
        """Return the unit as a number."""
        return self.unit if isinstance(self.unit, int) else getattr(config, self.unit)


def resize_slots(config: Any, size: int) -> MemoryConfig:
    """Return settings with `size` slots, of which no more are read than there are."""
    reads = {
        name: min(count, size)
        for name in ("k", "mean_k")
        if isinstance(count := getattr(config, name, None), int)
    }
    return replace(config, num_slots=size, **reads)


def resize_mean_reads(config: Any, size: int) -> MemoryConfig:
    """Return settings that read `size` rows on average."""
    return replace(config, mean_k=size)


def resize_reads(config: Any, size: int) -> MemoryConfig:
    """Return settings that read `size` rows."""
    return replace(config, k=size)


def resize_product_keys(config: Any, size: int) -> MemoryConfig:
    """Return settings that read `size` rows; queries as wide as the hidden state leave no room."""
    return replace(config, k=size, key_width=config.key_width or 32)


def resize_rank(config: Any, size: int) -> MemoryConfig:
    """Return settings of the rank `size`."""
    return replace(config, rank=size)


SIZES = {
    "featural": Size("num_slots", 8, resize_slots),
    "transcoder": Size("num_slots", 8, resize_slots),
    "pruned": Size("num_slots", 1, resize_slots),
    "experts": Size("k", "expert_size", resize_reads),
    "peer": Size("k", "heads", resize_product_keys),
    "product_key": Size("k", "heads", resize_product_keys),
    "low_rank": Size("rank", 1, resize_rank),
}


def get_size(memory: Any) -> Size | None:
    """Return how a memory grows, a sum by its first part that can; None where it does not."""
    for index, part in enumerate(getattr(memory, "parts", [])):
        if (size := get_size(part)) is not None:

            def resize_part(config: Any, count: int, index: int = index, size: Size = size) -> Any:
                parts = [*config.parts]
                parts[index] = size.apply(parts[index], count)
                return replace(config, parts=parts)

            return Size(f"{part.kind}.{size.setting}", size.get_unit(part), resize_part)
    if getattr(memory, "search", "exact") != "exact":  # where reading a slot costs, not having it
        return Size("mean_k", 1, resize_mean_reads)
    return SIZES.get(memory.kind)


@dataclass(frozen=True)
class Variant:
    """One entry of the catalogue at one budget.

    Attributes:
        kind: name of the kind, that is of its config.
        budget: share of the bytes that the teacher's blocks read; None without a size.
        size: the size and its setting, for the table.
        memory: settings.
    """

    kind: str
    budget: float | None
    size: str
    memory: MemoryConfig

    @property
    def name(self) -> str:
        """A name for messages and folders."""
        return self.kind if self.budget is None else f"{self.kind}-{self.budget:g}"


class CostProbe:
    """Measures the share of a block's bytes that a memory reads, in a model of one layer.

    Args:
        teacher: the teacher.
        windows: calibration windows `(windows, time)`.
    """

    def __init__(self, teacher: Any, windows: Tensor) -> None:
        self.teacher, self.windows = copy.deepcopy(teacher), windows
        architecture = get_architecture(teacher.config.model_type)
        del architecture.transformer_blocks(self.teacher)[1:]
        self.teacher.config.num_hidden_layers = 1
        tensors = architecture.read_tensors(architecture.blocks(self.teacher)[0])
        self.num_neurons = len(tensors["keys"])
        outputs = forward_teacher(self.teacher, windows, capture_blocks=True)
        self.block_inputs = outputs.block_inputs
        self.dense_bytes = self._measure_bytes(self.teacher)
        self._shares: dict[str, float] = {}

    def _measure_bytes(self, model: Any) -> float:
        return measure_costs(model, self.windows[0])[0].read_bytes_per_token

    def measure_share(self, memory: MemoryConfig) -> float:
        """Return the share.

        Raises:
            ArgumentError: the memory does not fit the block.
        """
        if repr(memory) not in self._shares:
            student, _ = convert_blocks(self.teacher, [memory], self.block_inputs)
            calibrate_memories(student.eval(), self.teacher, self.windows)
            self._shares[repr(memory)] = self._measure_bytes(student) / self.dense_bytes
        return self._shares[repr(memory)]


def find_largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 on that fits, where all smaller ones do; 0 for none."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def choose_variants(
    kinds: Sequence[str], budgets: Sequence[float], config: Config, probe: CostProbe
) -> list[Variant]:
    """Return each kind at each budget that it can meet; say on stderr which it cannot."""
    variants = []
    for kind in kinds:
        base = load_memory(kind, config, probe.num_neurons)
        size = get_size(base)
        if size is None:
            variants.append(Variant(kind, None, "", base))
            continue
        unit = size.get_unit(base)

        def measure_share(count: int, size: Size = size, base: Any = base) -> float:
            try:
                return probe.measure_share(size.apply(base, count * size.get_unit(base)))
            except ArgumentError:
                return math.inf

        for budget in budgets:
            count = find_largest(
                lambda count, budget=budget, measure=measure_share: measure(count) <= budget
            )
            if not count:
                print(
                    f"{kind} reads {measure_share(1):.0%} of what the blocks read with "
                    f"{size.setting}={unit} already, more than {budget:.0%}; left out",
                    file=sys.stderr,
                )
                continue
            memory = size.apply(base, count * unit)
            if all(variant.memory != memory for variant in variants):  # it cannot grow further
                variants.append(Variant(kind, budget, f"{size.setting}={count * unit}", memory))
    return variants


def load_memory(kind: str, config: Config, num_neurons: int) -> MemoryConfig:
    """Return the settings that a kind begins with; it reads as many slots at every size.

    Args:
        kind: name of the kind.
        config: settings of all runs.
        num_neurons: neurons of a block.
    """
    memory = config.memory
    if kind != memory.kind:
        memory = load_config(CATALOGUE / f"{kind}.yaml").memory
    return fix_reads(memory, max(1, num_neurons // DEFAULT_K_DIVISOR))


def fix_reads(memory: Any, mean_k: int) -> MemoryConfig:
    """Return settings with `mean_k` where they leave it to the number of slots."""
    if isinstance(memory, SumConfig):
        return replace(memory, parts=[fix_reads(part, mean_k) for part in memory.parts])
    if getattr(memory, "k", None) == "auto" and memory.mean_k is None:
        return replace(memory, mean_k=mean_k)
    return memory


def list_kinds(config: Config) -> list[str]:
    """Return the kind of a config, and those in the catalogue."""
    names = [path.stem for path in sorted(CATALOGUE.glob("*.yaml"))]
    return [config.memory.kind, *(name for name in names if name != config.memory.kind)]


def distill_variant(
    variant: Variant, seed: int, steps: int, config: Config, folder: Path
) -> DistillResult:
    """Distill a student, finish a run that was interrupted, or return one that is finished."""
    if has_results(read_record(folder)):
        return read_result(folder)
    layerwise = min(config.stages.layerwise_steps, steps // 2)
    stages = replace(config.stages, layerwise_steps=layerwise, end_to_end_steps=steps - layerwise)
    trainer = replace(config.trainer, progress_bar=False, validate_every=0)
    config = replace(config, memory=variant.memory, seed=seed, stages=stages, trainer=trainer)
    return dmt.distill(config.teacher, config.data.corpora, config, output=folder, resume=True)


def measure_run(result: DistillResult, teacher: Any) -> dict[str, Any]:
    """Return what a finished run is compared by; its checkpoints are removed."""
    student, tokenizer = result.load()
    record = result.record
    costs = record["costs"]
    shutil.rmtree(result.run_dir / "checkpoints", ignore_errors=True)
    num_new = min(NEW_TOKENS, teacher.config.max_position_embeddings - PROMPT_TOKENS)
    prompt = torch.arange(PROMPT_TOKENS).unsqueeze(0) % teacher.config.vocab_size
    seconds = medians(
        {
            "dense": lambda: generate(teacher, prompt, num_new),
            "memory": lambda: generate(student.eval(), prompt, num_new),
        },
        REPEATS,
    )
    return {
        "corpora": {
            name: {
                "kl": scores["kl"],
                "ppl_ratio": scores["ppl_ratio"],
                "recall": scores["recall"]["student"] if "recall" in scores else None,
            }
            for name, scores in record["fidelity"].items()
        },
        "train_seconds": record["seconds"]["train"],
        "tokens_per_second": num_new / seconds["memory"],
        "speedup": seconds["dense"] / seconds["memory"],
        "read_bytes": costs["total"]["read_bytes_per_token"],
        "dense_bytes": costs["dense"]["read_bytes_per_token"],
        "multiply_adds": costs["total"]["multiply_adds"],
        "ram_bytes": costs["total"]["ram_bytes"],
        "abilities": list_abilities(student, tokenizer, record["config"]["memory"]),
    }


def list_abilities(student: Any, tokenizer: Any, settings: Mapping[str, Any]) -> list[str]:
    """Return what can be done with the rows of a student, as its code has it.

    Read: a trace shows which rows a token read. Insert: rows are added without training. Edit:
    facts are trained into its slots (`dmt sleep`). On disk: rows may stay in a file
    (`memory.offload`).
    """
    traces = dmt.trace(student, tokenizer, "a memory")
    parts = [settings, *settings.get("parts", [])]
    checks = {
        "read": any(trace.activations for trace in traces),
        "insert": bool(get_associative_memories(student)),
        "edit": bool(get_featural_memories(student)),
        "on disk": any("offload" in part for part in parts),
    }
    return [name for name, is_possible in checks.items() if is_possible]


def choose_best(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the kinds with the lowest KL, by its geometric mean over budgets and corpora."""
    logs: dict[str, list[float]] = {}
    for record in records:
        logs.setdefault(record["kind"], []).extend(
            math.log(max(scores["kl"], MIN_KL)) for scores in record["corpora"].values()
        )
    return sorted(logs, key=lambda kind: statistics.mean(logs[kind]))[:NUM_BEST]


def build_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row of the table for each variant, means over seeds, the lowest KL first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["name"], []).append(record)
    rows = []
    for group in groups.values():
        first = group[0]

        def average(*path: str, group: Any = group) -> float:
            values = []
            for record in group:
                value = record
                for key in path:
                    value = value[key]
                values.append(value)
            return statistics.mean(values)

        row: Row = {
            "kind": first["kind"],
            "size": first["size"],
            "seeds": len(group),
            "read, kB": round(average("read_bytes") / 1e3),
            "of dense": f"{average('read_bytes') / average('dense_bytes'):.1%}",
            "RAM, MB": f"{average('ram_bytes') / 1e6:.1f}",
        }
        for corpus, scores in first["corpora"].items():
            row[f"{corpus}: KL"] = average("corpora", corpus, "kl")
            row[f"{corpus}: ratio"] = f"{average('corpora', corpus, 'ppl_ratio'):.4f}"
            if scores["recall"] is not None:
                row[f"{corpus}: recall"] = f"{average('corpora', corpus, 'recall'):.3f}"
        row |= {
            "train, s": round(average("train_seconds")),
            "tokens/s": round(average("tokens_per_second")),
            "times dense": f"{average('speedup'):.2f}",
            "possible": ", ".join(first["abilities"]),
        }
        rows.append(row)
    column = next((name for name in rows[0] if name.endswith("KL")), "") if rows else ""
    return sorted(rows, key=lambda row: row[column])


def draw_picture(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the KL on the first corpus by bytes read per token as an SVG file."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        kl = next(iter(record["corpora"].values()))["kl"]
        by_variant = points.setdefault(record["kind"], {})
        by_variant.setdefault(record["name"], []).append((record["read_bytes"] / 1e3, kl))
    series = []
    for index, (kind, by_variant) in enumerate(points.items()):
        means = sorted(
            tuple(statistics.mean(values) for values in zip(*pairs, strict=True))
            for pairs in by_variant.values()
        )
        xs, ys = zip(*means, strict=True)
        tips = [f"{kind}: {x:,.0f} kB, {y:.4f} nats" for x, y in means]
        series.append(Series(kind, xs, ys, tips, color=index, dash=index))
    corpus = next(iter(records[0]["corpora"]))
    plot = draw_plot(
        PICTURE_TITLE, "kB read per token", f"KL on {corpus}, nats per token", series, log_axes="xy"
    )
    css = (files("dmt.report") / "page.css").read_text(encoding="utf-8")
    colors = css[: css.index("* {")]
    rules = re.findall(r"^(?:figure svg|\.grid|\.point|\.c\d).*$", css, re.MULTILINE)
    style = colors + "\n".join(rules).replace("figure svg ", "")
    return str(plot.picture).replace(
        ">",
        f' xmlns="http://www.w3.org/2000/svg"><style>{style}</style>'
        '<rect width="100%" height="100%" style="fill: var(--card)"/>',
        1,
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none where there is no file yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Catalogue:
    """The runs of one comparison, and where their results are.

    Args:
        config: settings of all runs.
        conditions: what all runs have in common, for their records; among it their `steps`.
        out: folder for the results.
    """

    def __init__(self, config: Config, conditions: Mapping[str, Any], out: Path) -> None:
        self.config, self.conditions, self.out = config, conditions, out
        self.path, self.failed = out / RESULTS_FILE, 0
        self.teacher, tokenizer = load_teacher(config.teacher)
        data = TextDataModule(config, tokenizer, 1)
        data.setup()
        windows = data.calibration_windows(PROBE_WINDOWS * config.data.seq_len)
        self.probe = CostProbe(self.teacher, windows)
        self._seconds: list[float] = []

    def run(self, jobs: Sequence[tuple[Variant, int]], num_later: int) -> None:
        """Run the variants with their seeds, but for those with results, and write the results.

        A run that fails is reported on stderr, and the others go on.

        Args:
            jobs: variants and seeds.
            num_later: further runs that will follow, for the time left.
        """
        done = {(record["name"], record["seed"]) for record in read_records(self.path)}
        missing = [job for job in jobs if (job[0].name, job[1]) not in done]
        for position, (variant, seed) in enumerate(missing, 1):
            start = time.perf_counter()
            folder, steps = self.out / f"{variant.name}-seed{seed}", self.conditions["steps"]
            try:
                result = distill_variant(variant, seed, steps, self.config, folder)
            except UserError as error:
                print(f"{variant.name}, seed {seed} failed: {error}", file=sys.stderr, flush=True)
                self.failed += 1
                continue
            record = {
                "name": variant.name,
                "kind": variant.kind,
                "budget": variant.budget,
                "size": variant.size,
                "seed": seed,
                **self.conditions,
                **measure_run(result, self.teacher),
            }
            lines = [json.dumps(line) + "\n" for line in (*read_records(self.path), record)]
            atomic_write(self.path, "".join(lines))
            self.write_results()
            self._seconds.append(time.perf_counter() - start)
            num_left = len(missing) - position + num_later
            kl = next(iter(record["corpora"].values()))["kl"]
            left = "done"
            if num_left:
                duration = humanize_duration(statistics.mean(self._seconds) * num_left)
                left = f"{num_left} more, {duration} left"
            print(
                f"{time.strftime('%H:%M:%S')}  {variant.name}, seed {seed}: KL {kl:.4f}, "
                f"{record['read_bytes'] / record['dense_bytes']:.0%} of dense; {left}",
                file=sys.stderr,
                flush=True,
            )

    def write_results(self) -> str:
        """Write table and picture; return the table."""
        records = read_records(self.path)
        text = table(build_rows(records))
        (self.out / "table.md").write_text(text + "\n", encoding="utf-8")
        (self.out / "kl_by_bytes.svg").write_text(draw_picture(records) + "\n", encoding="utf-8")
        return text


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default="", help="some of the kinds (default: all)")
    parser.add_argument("--budgets", default="0.33,0.66", help="shares of what the blocks read")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best four kinds")
    parser.add_argument("--steps", type=int, default=1_400, help="steps of a run")
    parser.add_argument("--config", default="default", help="teacher, text and schedule")
    parser.add_argument("--out", type=Path, default=Path("lightning_logs/catalogue"))
    parser.add_argument("--resume", action="store_true", help="go on with what is missing")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_intermixed_args(arguments)
    try:
        budgets = [float(budget) for budget in args.budgets.split(",")]
        config = load_config(find_config(args.config), args.settings)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if min(budgets) <= 0 or args.seeds < 1 or args.steps < 1:
        parser.error("--budgets, --seeds and --steps must be positive")
    kinds = args.kinds.split(",") if args.kinds else list_kinds(config)
    if unknown := [kind for kind in kinds if kind not in list_kinds(config)]:
        parser.error(f"--kinds {unknown[0]}: there are {', '.join(list_kinds(config))}")
    conditions = {"steps": args.steps, "config": args.config, "settings": args.settings}
    earlier = read_records(args.out / RESULTS_FILE)
    if earlier and not args.resume:
        parser.error(f"{args.out} has results; add --resume, or choose another --out")
    for name, value in conditions.items():
        if others := [record for record in earlier if record[name] != value]:
            parser.error(
                f"{args.out} has results with {name}={others[0][name]}, not {value}; choose "
                "another --out"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    catalogue = Catalogue(config, conditions, args.out)
    variants = choose_variants(kinds, budgets, config, catalogue.probe)
    num_best = min(NUM_BEST, len(kinds))
    num_later = num_best * len(budgets) * (args.seeds - 1)
    catalogue.run([(variant, 0) for variant in variants], num_later)
    best = choose_best(record for record in read_records(catalogue.path) if record["seed"] == 0)
    repeated = [
        (variant, seed)
        for seed in range(1, args.seeds)
        for variant in variants
        if variant.kind in best
    ]
    catalogue.run(repeated, 0)
    if not read_records(catalogue.path):
        raise SystemExit("error: no run has results")
    print(catalogue.write_results())
    if catalogue.failed:
        raise SystemExit(f"error: runs that failed: {catalogue.failed}; --resume repeats them")


if __name__ == "__main__":
    main()
