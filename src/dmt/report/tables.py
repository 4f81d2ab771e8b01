"""One table of results and every way to show it: console, Markdown, HTML, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from rich.table import Table as RichTable

LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≠": r"$\neq$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "†": r"$\dagger$",
        "‡": r"$\ddagger$",
        "–": "--",
        "\N{NO-BREAK SPACE}": "~",
    }
)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: the first cell.
        cells: the others, formatted; one for each column.
        meaning: an explanation of the label; shown in HTML only.
        values: the numbers behind the cells, for CSV and JSON; empty means that there are none.
        best: indices of the cells that hold the best value of their column.
        is_different: whether to mark the row as one where the runs differ.
    """

    label: str
    cells: tuple[str, ...]
    meaning: str = ""
    values: tuple[Any, ...] = ()
    best: frozenset[int] = frozenset()
    is_different: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under the names of columns.

    Attributes:
        title: what the table shows; may be empty.
        columns: names of the columns after the first.
        rows: the rows; each has as many cells as there are `columns`.
        caption: a sentence below the table.
        label_column: name of the first column.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row] = field(default_factory=list)
    caption: str = ""
    label_column: str = ""

    @property
    def header(self) -> tuple[str, ...]:
        """Names of all columns, the first included."""
        return (self.label_column, *self.columns)

    def to_rich(self) -> RichTable:
        """Return the table for a rich console; best values are bold and end in `*`."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title) if self.title else None)
        for name in self.header:
            table.add_column(Text(name), justify="left" if name == self.label_column else "right")
        for row in self.rows:
            cells = (
                Text(f"{cell} *", style="bold") if index in row.best else Text(cell)
                for index, cell in enumerate(row.cells)
            )
            table.add_row(Text(row.label), *cells)
        return table

    def to_text(self, width: int = 160) -> str:
        """Return the table as plain text, at most `width` characters wide."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.to_rich())
        lines = (line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the table in Markdown, best values in bold."""
        lines = [_markdown_row(self.header), "|---" + "|---:" * len(self.columns) + "|"]
        for row in self.rows:
            cells = (
                f"**{cell}**" if index in row.best else cell for index, cell in enumerate(row.cells)
            )
            lines.append(_markdown_row((row.label, *cells)))
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])

    def to_html(self) -> Markup:
        """Return the table as an HTML `<table>`, everything escaped, best values in `<b>`."""
        head = Markup("").join(Markup('<th scope="col">%s</th>') % name for name in self.header)
        rows = Markup("\n").join(_html_row(row) for row in self.rows)
        return Markup("<table>\n<thead><tr>%s</tr></thead>\n<tbody>\n%s\n</tbody>\n</table>") % (
            head,
            rows,
        )

    def to_latex(self) -> str:
        """Return a LaTeX `tabular` for the package booktabs, best values in bold."""
        lines = [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
            r"\toprule",
            _latex_row(map(escape_latex, self.header)),
            r"\midrule",
        ]
        for row in self.rows:
            cells = (
                rf"\textbf{{{escape_latex(cell)}}}" if index in row.best else escape_latex(cell)
                for index, cell in enumerate(row.cells)
            )
            lines.append(_latex_row((escape_latex(row.label), *cells)))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])

    def to_csv(self) -> str:
        """Return the table as CSV with unrounded numbers; missing values are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        for row in self.rows:
            values = row.values or row.cells
            writer.writerow([row.label, *("" if value is None else value for value in values)])
        return text.getvalue()

    def transpose(self) -> Table:
        """Return the table with its rows as columns."""
        rows = [
            Row(
                name,
                tuple(row.cells[index] for row in self.rows),
                values=tuple((row.values or row.cells)[index] for row in self.rows),
                best=frozenset(i for i, row in enumerate(self.rows) if index in row.best),
            )
            for index, name in enumerate(self.columns)
        ]
        return replace(
            self, columns=tuple(row.label for row in self.rows), rows=rows, label_column=""
        )

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return str(self.to_html())


def escape_latex(text: str) -> str:
    """Return `text` with LaTeX's special characters escaped."""
    return text.translate(LATEX_ESCAPES)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    return "| " + " | ".join(escaped) + " |"


def _latex_row(cells: Any) -> str:
    return " & ".join(cells) + r" \\"


def _html_row(row: Row) -> Markup:
    label = Markup('<th scope="row" title="%s">%s%s</th>') % (
        row.meaning,
        row.label,
        Markup("<small>%s</small>") % row.meaning if row.meaning else "",
    )
    cells = Markup("").join(
        Markup("<td>%s</td>") % (Markup("<b>%s</b>") % cell if index in row.best else escape(cell))
        for index, cell in enumerate(row.cells)
    )
    return Markup("<tr%s>%s%s</tr>") % (
        Markup(' class="differs"') if row.is_different else "",
        label,
        cells,
    )
