"""One table in all its formats."""

import csv
import io

import pytest
from page_checks import PageParser

from dmt.report.tables import Row, Table, escape_latex


@pytest.fixture
def table():
    rows = [
        Row("k=8 & 50%", ("0.125 ± 0.010", "1_000"), values=(0.125, 1000), best=frozenset({0})),
        Row("a|b", ("0.500", ""), "half <b>", values=(0.5, None)),
    ]
    return Table("Results", ("KL ↓", "rows"), rows, "A caption.", "run")


def test_markdown_has_best_values_in_bold(table):
    assert table.to_markdown().splitlines() == [
        "| run | KL ↓ | rows |",
        "|---|---:|---:|",
        "| k=8 & 50% | **0.125 ± 0.010** | 1_000 |",
        "| a\\|b | 0.500 |  |",
        "",
        "A caption.",
    ]


def test_latex_is_a_booktabs_tabular(table):
    lines = table.to_latex().splitlines()
    assert lines[1:3] == [r"\begin{tabular}{lrr}", r"\toprule"]
    assert r"run & KL $\downarrow$ & rows \\" in lines
    assert r"k=8 \& 50\% & \textbf{0.125 $\pm$ 0.010} & 1\_000 \\" in lines
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert escape_latex("a\\b{c}") == r"a\textbackslash{}b\{c\}"


def test_csv_has_unrounded_values(table):
    assert list(csv.reader(io.StringIO(table.to_csv()))) == [
        ["run", "KL ↓", "rows"],
        ["k=8 & 50%", "0.125", "1000"],
        ["a|b", "0.5", ""],
    ]


def test_html_is_escaped_and_marks_best_values(table):
    html = str(table.to_html())
    page = PageParser(html)
    assert "<td><b>0.125 ± 0.010</b></td>" in html
    assert "half &lt;b&gt;" in html
    assert page.words.startswith("run KL ↓ rows k=8 & 50%")
    assert table._repr_html_() == html


def test_text_shows_every_cell(table):
    text = str(table)
    assert "0.125 ± 0.010 *" in text
    assert "a|b" in text
    assert "[bold]" in Table("", ("[bold]",), [Row("a", ("[red]",))]).to_text()


def test_transposing_keeps_values_and_best_cells(table):
    transposed = table.transpose()
    assert transposed.columns == ("k=8 & 50%", "a|b")
    assert transposed.rows[0].cells == ("0.125 ± 0.010", "0.500")
    assert transposed.rows[0].best == {0}
    assert transposed.rows[1].values == (1000, None)
    assert transposed.transpose().rows[0].cells == table.rows[0].cells
