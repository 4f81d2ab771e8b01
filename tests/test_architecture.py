"""The house: imports point one way, each room keeps to itself, every shipped config runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dmt import config_io
from dmt.cli.main import distill_main

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
ORDER = [
    "errors",
    "disk",
    "stopping",
    "starting",
    "config",
    "wording",
    "runs",
    "texts",
    "versions",
    "layers",
    "settings",
    "registration",
    "data.encoding",
    "data.people",
    "data.corpora",
    "data.blocks",
    "records",
    "memory.activation",
    "memory.nearest",
    "memory.indexes",
    "memory.straight_through",
    "memory.heat",
    "memory.together",
    "memory.histories",
    "memory.rows",
    "memory.admission",
    "memory.offers",
    "memory.products",
    "memory.search",
    "memory.finding",
    "memory.derived",
    "memory.compensation",
    "memory.paging",
    "memory.filed",
    "memory.table",
    "memory.featural",
    "memory.associative",
    "memory",
    "memory.mean_k",
    "memory.spotting",
    "memory.facts",
    "store.schema",
    "store.connect",
    "store.store",
    "store",
    "store.ledger",
    "models.architectures",
    "models.attention",
    "models.norms",
    "models.quick",
    "models.overlay",
    "models.fingerprint",
    "models.tokens",
    "models.books",
    "models.slots",
    "models.modeling",
    "models.loading",
    "models.resize",
    "models.surgery",
    "models.teacher",
    "models.smollm2",
    "distill.signals",
    "inspection",
    "facts.questions",
    "facts.sentences",
    "facts.states",
    "facts.calibration",
    "facts.drafting",
    "facts.beginning",
    "facts.lines",
    "facts.book",
    "facts.asking",
    "facts.containers",
    "facts.packs",
    "facts.exchange",
    "facts.opening",
    "facts.remembering",
    "facts.rowpacks",
    "facts",
    "commands.printing",
    "commands.changing",
    "commands.looking",
    "commands.asking",
    "commands.giving",
    "distill.sampling",
    "distill.packing",
    "distill.cached",
    "distill.finite",
    "distill.outliers",
    "distill.pieces",
    "distill.losses",
    "evaluate",
    "distill.sensitivity",
    "distill.calibrate",
    "distill.revive",
    "distill.lessons",
    "distill.keeper",
    "pages",
    "pages.curves",
    "pages.axes",
    "pages.plots",
    "pages.maps",
    "pages.page",
    "pages.distilled",
    "pages.overlaid",
    "pages.consolidated",
    "pages.pretrained",
    "pages.compared",
    "distill.continuing",
    "distill.budgets",
    "distill.stepping",
    "distill.module",
    "distill.callbacks",
    "distill.pretrain",
    "distill.folder",
    "distill.processes",
    "distill.checkpoints",
    "distill.ending",
    "distill.fitting",
    "distill.timing",
    "distill.planning",
    "distill.report",
    "distill.run",
    "consolidation",
    "consolidation.reading",
    "consolidation.hearing",
    "consolidation.asking",
    "consolidation.telling",
    "consolidation.writing",
    "consolidation.destinations",
    "consolidation.module",
    "consolidation.work",
    "consolidation.rows",
    "consolidation.report",
    "consolidation.run",
    "consolidation.dreaming",
    "consolidation.moving",
    "consolidation.rowing",
    "consolidation.night",
    "consolidation.sleep",
    "tasks",
    "commands.comparing",
    "commands.consolidating",
    "commands.sleeping",
    "main",
    "cli",
    "__main__",
]
"""Every module with something in it, lowest first: each may import those before it."""
SHORT = [
    "data.seq_len=16",
    "data.batch_size=2",
    "data.micro_batch_size=2",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "data.mixture_weights=[]",
    "stages.calibration_tokens=16",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=1",
    "pretrain.steps=1",
    "trainer.num_threads=1",
    "pretrain.vocabulary=300",
    "trainer.progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.validate_every=1",
]


def modules():
    for file in sorted((SOURCE / "dmt").rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE / "dmt").with_suffix("").parts).removesuffix(
            ".__init__"
        )
        yield ("" if name == "__init__" else name), ast.parse(file.read_text()), file


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    seen = 0
    for name, tree, file in modules():
        ours = {m.removeprefix("dmt.") for m in imported(tree) if m.startswith("dmt.")} & set(ORDER)
        if name not in ORDER:
            assert name in ("", "data", "models", "distill", "commands"), (
                f"{file}: give it a place in ORDER"
            )
            continue
        seen += 1
        wrong = [m for m in ours if ORDER.index(m) >= ORDER.index(name)]
        assert not wrong, f"{file} imports {wrong}, which stand above it"
    assert seen == len(ORDER)


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        (
            "memory",
            (
                "transformers",
                "pytorch_lightning",
                "dmt.models",
                "dmt.config",
                "dmt.data",
                "dmt.distillation",
            ),
        ),
        ("distill.losses", ("transformers", "pytorch_lightning", "dmt.models")),
        ("config", ("torch", "transformers", "omegaconf")),
        ("settings", ("torch", "transformers", "pytorch_lightning", "rich")),
        ("models", ("pytorch_lightning", "dmt.distillation", "dmt.data")),
    ],
)
def test_rooms_keep_to_themselves(room, forbidden):
    for name, tree, file in modules():
        if name == room or name.startswith(room + "."):
            assert not [m for m in imported(tree) if m.startswith(forbidden)], file


def test_one_module_knows_the_names_inside_a_model():
    inner = ("c_fc", "c_proj", "mlp", "transformer.h", "gate_proj", "up_proj")
    for name, tree, file in modules():
        if name == "models.architectures":
            continue
        texts = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        names = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        assert not {t for t in texts + names if t.startswith(inner)}, file


def test_files_stay_short():
    assert not {f: n for _, _, f in modules() if (n := len(f.read_text().splitlines())) > 300}


def test_nothing_unpickles():
    for _, tree, file in modules():
        assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve"} & set(imported(tree)), file
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [
            call
            for call in calls
            if call.startswith("torch.load(") and "weights_only=True" not in call
        ], file
        assert not [call for call in calls if "trust_remote_code=True" in call], file


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_promised_configs_are_there():
    assert {f.stem for f in CONFIGS} >= {"default", "seed", "gpt2", "mixed", "teacher"}
    assert config_io.load_config(ROOT / "configs" / "default.yaml") == config_io.load_config()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_config_parses_and_runs_a_step(file, tmp_path, text_file, monkeypatch):
    config = config_io.load_config(file)
    if config.teacher != "embedded" or any(c.startswith("hub:") for c in config.data.corpora):
        pytest.skip("needs a hub; parsed only")
    monkeypatch.chdir(ROOT)
    places = [
        f"data.corpora=[{text_file}]",
        f"trainer.log_dir={tmp_path / 'logs'}",
        f"pretrain.output={tmp_path / 'made'}",
    ]
    assert distill_main([str(file), *SHORT, *places]) == 0
    assert (tmp_path / "logs" / "version_0" / "run.json").exists()
    if config.task == "pretrain":
        student = [
            f"teacher={tmp_path / 'made'}",
            f"data.corpora=[{text_file}]",
            f"trainer.log_dir={tmp_path / 'logs'}",
        ]
        assert distill_main([*SHORT, *student]) == 0


@pytest.mark.parametrize(
    "module",
    ["models.books", "models.overlay", "models.quick", "models.surgery", "memory.featural"],
)
def test_any_module_may_be_imported_first(module):
    done = subprocess.run(
        [sys.executable, "-c", f"import dmt.{module}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
