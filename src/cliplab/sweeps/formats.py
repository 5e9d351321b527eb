"""A table for the terminal, as Markdown, LaTeX (booktabs), CSV or HTML.

Published rows are set in grey where they were measured under another protocol, in italics where a format has no grey.
"""

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cliplab.sweeps.table import ALPHA, SETTING, Cell, Row, SweepTable

_LATEX = {"†": r"$^{\dagger}$"}
_LATEX |= {"\\": r"\textbackslash{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "~": r"\textasciitilde{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"} | {"^": r"\textasciicircum{}"}


def write_table(table: SweepTable, output: str, file: TextIO) -> None:
    """Write the table in one of FORMATS, or as a rich table."""
    if output == "terminal":
        plain = Console(file=file)
        (plain if plain.is_terminal else Console(file=file, width=200)).print(_terminal(table))
        return
    file.write(FORMATS[output](table))


def _number(cell: Cell) -> str:
    spread = "" if cell.std is None else f" ± {cell.std:.2f}"
    return f"{cell.mean:.2f}{spread}{'†' if cell.p is not None and cell.p < ALPHA else ''}"


def _interval(cell: Cell) -> str:
    return "" if cell.low is None or cell.high is None else f"[{cell.low:.1f}, {cell.high:.1f}]"


def _header(table: SweepTable) -> list[str]:
    return ["", *table.varying, *table.columns, "seeds", "fit s"]


def _tail(row: Row) -> list[str]:
    """Seeds and seconds of a row of ours."""
    if row.kind != "ours":
        return ["", ""]
    return [str(row.seeds), "" if row.fit_seconds is None else f"{row.fit_seconds:.1f}"]


def _lines(table: SweepTable, row: Row, text: Callable[[Cell], str], plain: Callable[[str], str] = str) -> list[str]:
    """The cells of a row behind its label; a row without any number says so in each."""
    varying = [plain(row.setting.get(key, "")) for key in table.varying]
    absent = "-" if row.kind == "ours" else ""
    numbers = [text(row.cells[title]) if title in row.cells else absent for title in table.columns]
    return [*varying, *numbers, *_tail(row)]


def _terminal(table: SweepTable) -> Table:
    shown = Table(title=escape(table.title), caption=escape("\n".join(table.notes)), caption_justify="left")
    for number, title in enumerate(_header(table)):
        shown.add_column(escape(title), justify="left" if number <= len(table.varying) else "right")
    for row in table.rows:
        label = f"{row.label}\n  ({row.note})" if row.note else row.label
        style = {"foreign": "dim", "published": "italic", "ours": None}[row.kind]
        shown.add_row(escape(label), *_lines(table, row, _terminal_cell, escape), style=style)
    return shown


def _terminal_cell(cell: Cell) -> str:
    number = f"[bold]{_number(cell)}[/]" if cell.is_best else _number(cell)
    return f"{number}\n{escape(_interval(cell))}" if cell.low is not None else number


def _one_line(bold: Callable[[str], str], small: Callable[[str], str] = str) -> Callable[[Cell], str]:
    def text(cell: Cell) -> str:
        number = bold(_number(cell)) if cell.is_best else _number(cell)
        return f"{number} {small(_interval(cell))}".strip()

    return text


def markdown(table: SweepTable) -> str:
    """A table of GitHub's Markdown, title above and notes below."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def plain(text: str) -> str:
        text = re.sub(r"<(?=[A-Za-z/!])", "&lt;", text)  # no tag
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")

    text = _one_line(lambda number: f"**{number}**")
    header = [plain(title) for title in _header(table)]
    left = 1 + len(table.varying)
    lines = [f"**{plain(table.title)}**", "", line(header)]
    lines.append(line(["---"] * left + ["---:"] * (len(header) - left)))
    for row in table.rows:
        label = plain(row.label) + (f" ({plain(row.note)})" if row.note else "")
        cells = [label, *_lines(table, row, text, plain)]
        if row.kind == "foreign":
            cells = [f"*{cell}*" if cell else "" for cell in cells]
        lines.append(line(cells))
    return "\n".join([*lines, "", *(f"{plain(note)}  " for note in table.notes)]) + "\n"


def latex(table: SweepTable) -> str:
    """A table environment; needs the packages booktabs and xcolor."""
    text = _one_line(lambda number: f"\\textbf{{{number}}}", lambda part: f"{{\\scriptsize {part}}}" if part else "")
    columns = "l" * (1 + len(table.varying)) + "r" * (len(table.columns) + 2)
    lines = ["% \\usepackage{booktabs,xcolor}", "\\begin{table}", f"\\caption{{{_tex(table.title)}}}"]
    header = " & ".join(map(_tex, _header(table)))
    lines += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", header + r" \\", "\\midrule"]
    for row in table.rows:
        label = _tex(row.label) + (f" {{\\scriptsize ({_tex(row.note)})}}" if row.note else "")
        cells = [label, *_lines(table, row, lambda cell: _symbols(text(cell)), _tex)]
        if row.kind == "foreign":
            cells = [f"\\textcolor{{gray}}{{{cell}}}" if cell else "" for cell in cells]
        lines.append("{}" + " & ".join(cells) + r" \\")  # or else a first [ or * would belong to the \\ before
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"\\par {{\\footnotesize {_tex(note)}}}" for note in table.notes]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _symbols(text: str) -> str:
    return text.replace("±", _LATEX["±"]).replace("†", _LATEX["†"])


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text.replace("\n", " "))


def html_table(table: SweepTable) -> str:
    """A <table> with its title as caption and the notes in a last row."""
    text = _one_line(lambda number: f"<b>{number}</b>", lambda part: f"<small>{part}</small>" if part else "")
    head = "".join(f"<th>{html.escape(title)}</th>" for title in _header(table))
    lines = ["<table>", f"<caption>{html.escape(table.title)}</caption>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for row in table.rows:
        note = f" <small>({html.escape(row.note)})</small>" if row.note else ""
        cells = "".join(f"<td>{cell}</td>" for cell in _lines(table, row, text, html.escape))
        style = ' style="color: gray"' if row.kind == "foreign" else ""
        lines.append(f'<tr class="{row.kind}"{style}><th>{html.escape(row.label)}{note}</th>{cells}</tr>')
    notes = "<br>".join(html.escape(note) for note in table.notes)
    lines += ["</tbody>", f'<tfoot><tr><td colspan="{len(_header(table))}">{notes}</td></tr></tfoot>', "</table>"]
    return "\n".join(lines) + "\n"


def csv_table(table: SweepTable) -> str:
    """One line per row, and per column its mean, std, interval and p; no notes but the rows' own."""
    parts = ("mean", "std", "low", "high", "p")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"{title} {part}" if part != "mean" else title for title in table.columns for part in parts]
    writer.writerow(["row", "kind", *SETTING, *columns, "seeds", "fit seconds", "note"])
    for row in table.rows:
        setting = [row.setting.get(key, "") for key in SETTING]
        values = [getattr(row.cells.get(title), part, None) for title in table.columns for part in parts]
        shown = ["" if value is None else f"{value:.6g}" for value in values]
        writer.writerow([row.label, row.kind, *setting, *shown, *_tail(row), row.note])
    return file.getvalue()


FORMATS: dict[str, Callable[[SweepTable], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": csv_table,
    "html": html_table,
}
