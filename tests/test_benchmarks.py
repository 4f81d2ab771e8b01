"""The benchmarks of speed run and write what they print; two files of figures can be compared."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import consolidation, tables  # noqa: E402
from benchmarks.__main__ import TABLES  # noqa: E402
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.where import Clocks, kind_of  # noqa: E402


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_tables_are_printed_and_written(tmp_path):
    path = tmp_path / "deep" / "figures.json"
    process = run_benchmarks(
        "--quick", "--only", "products,decode", "--threads", "1", "--out", str(path)
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(path.read_text())
    assert set(figures["tables"]) == {"products", "decode"}
    assert {"commit", "processor", "torch", "transformers", "when"} <= set(figures["machine"])
    assert "## decode" in process.stdout
    variants = [row["variant"] for row in figures["tables"]["decode"] if "variant" in row]
    assert {"dense (transformers)", "exact, float32 keys", "int8 keys", "ivf"} <= set(variants)
    for row in figures["tables"]["decode"]:
        if row.get("variant", "").startswith(("dense", "exact")):
            assert row["logits differ by"] < 1e-4  # the fast paths compute the same
    for row in figures["tables"]["decode"]:
        assert f"{row.get('variant', row.get('search'))}" in process.stdout
    comparison = run_benchmarks("--compare", str(path), str(path))
    assert comparison.returncode == 0
    assert "| decode | tiny, int8 keys | ms a token |" in comparison.stdout


def test_the_table_of_consolidation_reaches_its_targets(monkeypatch):
    monkeypatch.chdir(ROOT)
    [row] = consolidation.figures(quick=True, only="memory, gradient")
    assert float(row["as written: benefit"]) >= 0.9
    assert float(row["in other words: benefit"]) >= 0.7
    assert float(row["KL"]) <= 1e-3
    assert row["tokens saved"] > 30
    assert {target.name.partition(",")[0] for target in consolidation.TARGETS} == {
        "memory",
        "weights",
        "prompt",
    }
    assert {
        objective for target in consolidation.TARGETS for objective in target.objectives
    } == set(consolidation.OBJECTIVES)


def test_every_table_has_a_module_with_figures():
    for name in TABLES:
        assert "def figures(quick: bool" in (ROOT / "benchmarks" / f"{name}.py").read_text(), name


def test_figures_that_changed_most_come_first():
    def make_figures(fast, slow):
        rows = [
            {"variant": "a", "k": 3, "ms": fast},
            {"variant": "b", "k": 3, "ms": slow},
            {"variant": "c", "ms": float("nan")},
        ]
        return {"machine": {}, "tables": {"t": rows, "gone": [{"variant": "a", "ms": 1.0}]}}

    old, new = make_figures(1.0, 4.0), make_figures(1.1, 1.0)
    del new["tables"]["gone"]
    rows = tables.compared(old, new)
    assert [(row["line"], row["ratio"]) for row in rows] == [
        ("b, 3", 0.25),
        ("a, 3", pytest.approx(1.1)),
    ]
    assert "0.25" in tables.table(rows)


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "not json", '{"format": 99, "machine": {}, "tables": {}}']
)
def test_files_without_figures_are_rejected_in_one_line(tmp_path, text, monkeypatch):
    path = tmp_path / "odd.json"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--compare", str(path), str(path)])
    with pytest.raises(SystemExit) as raised:
        benchmarks_main()
    assert re.fullmatch(rf"error: {re.escape(str(path))}.+", str(raised.value)), (
        "Python prints it, and ends with 1"
    )


def test_unknown_tables_are_rejected(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "decod"])
    with pytest.raises(SystemExit, match=r"^2$"):
        benchmarks_main()
    assert "--only decod: there are products" in capsys.readouterr().err


def test_numbers_in_cells():
    assert [tables.cell(value) for value in (1.23456, 12345.6, 12345, "x", float("nan"))] == [
        "1.235",
        "12,346",
        "12,345",
        "x",
        "",
    ]


def test_clocks_exclude_inner_time():
    class Part:
        def outer(self):
            return self.inner() + 1

        def inner(self):
            sum(range(300_000))
            return 1

    clocks = Clocks()
    clocks.around(Part, "outer", "outside")
    clocks.around(Part, "inner", "inside")
    assert Part().outer() == 2
    assert clocks.seconds["outside"][0] < clocks.seconds["inside"][0]


def test_operations_have_kinds():
    kinds = {
        "aten::addmm": "matrix products",
        "mkldnn::_linear_pointwise": "matrix products",
        "aten::topk": "choosing slots",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::copy_": "copies",
        "aten::mul": "other arithmetic",
        "aten::_fused_adamw_": "optimizer",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
