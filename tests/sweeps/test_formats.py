"""Every output says the same: read back by a parser of its format."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cliplab.sweeps.formats import FORMATS, write_table
from cliplab.sweeps.table import Cell, Row, SweepTable

SETTING = {"data": "fashioniq", "split": "val", "protocol": "clip4cir"}
TIRG = {"A": Cell(50.125, 1.5, 45.0, 55.0, 0.01, True), "B_x": Cell(2.0, 0.25, p=0.2)}
ROWS = [
    Row("sum | 50 %", "ours", {"A": Cell(40.0, None, 35.0, 45.0), "B_x": Cell(1.0)}, 1, setting=SETTING),
    Row("tirg <x> & {y}", "ours", TIRG, 3, 12.34, setting=SETTING),
    Row("lost_row", "ours", {}, 0, None, "seed 0 FAILED: runs/x/seed-0.log: error: out of memory", SETTING),
    Row("TIRG [ResNet-18]", "published", {"A": Cell(14.87)}, note="published, 2019, reprint"),
    Row("VAL [ResNet-50]", "foreign", {"A": Cell(22.53)}, note="published; another protocol: gallery=val_split"),
]  # fmt: skip
TABLE = SweepTable(
    "exp: data fashioniq, protocol clip4cir (recalls in %)", ["A", "B_x"], ROWS, ["± & more", "last_note"], []
)
NUMBERS = [
    ["40.00 [35.0, 45.0]", "1.00", "1", ""],
    ["50.12 ± 1.50† [45.0, 55.0]", "2.00 ± 0.25", "3", "12.3"],
    ["-", "-", "0", ""],
    ["14.87", "", "", ""],
    ["22.53", "", "", ""],
]
BEST = "50.12 ± 1.50†"


def shown(output, table=TABLE):
    file = io.StringIO()
    write_table(table, output, file)
    return file.getvalue()


def test_markdown():
    lines = [line for line in shown("markdown").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["", "A", "B_x", "seeds", "fit s"] and set(cells[1]) == {"---", "---:"}
    body = cells[2:]
    assert [row[0] for row in body][:2] == ["sum \\| 50 %", "tirg &lt;x> & {y}"]
    assert body[2][0] == "lost_row (seed 0 FAILED: runs/x/seed-0.log: error: out of memory)"
    assert body[1][1] == f"**{BEST}** [45.0, 55.0]"
    assert all(cell.startswith("*") and cell.endswith("*") for cell in body[4] if cell)
    plain = [[cell.replace("*", "") for cell in row[1:]] for row in body]
    assert plain == NUMBERS
    assert "**exp: data fashioniq" in shown("markdown") and "last_note" in shown("markdown")


class Cells(HTMLParser):
    """The rows of a table, with the attributes of each and what is bold."""

    def __init__(self):
        super().__init__()
        self.rows, self.attributes, self.bold, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.attributes.append(dict(attrs))
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
            if "b" in self.open:
                self.bold.append(data)


def test_html():
    parser = Cells()
    parser.feed(shown("html"))
    assert parser.open == [] and parser.rows[0] == ["", "A", "B_x", "seeds", "fit s"]
    assert [row[1:] for row in parser.rows[1:-1]] == NUMBERS
    assert parser.rows[2][0] == "tirg <x> & {y}" and "out of memory" in parser.rows[3][0]
    assert parser.bold == [BEST] and "± & more" in parser.rows[-1][0]
    assert [a.get("style") for a in parser.attributes[1:-1]] == [None, None, None, None, "color: gray"]
    assert "gallery=val_split" in parser.rows[5][0]


def test_csv():
    rows = list(csv.DictReader(io.StringIO(shown("csv"))))
    assert [row["row"] for row in rows] == [row.label for row in ROWS]
    assert [row["kind"] for row in rows] == ["ours", "ours", "ours", "published", "foreign"]
    assert float(rows[1]["A"]) == 50.125 and float(rows[1]["A std"]) == 1.5 and float(rows[1]["A p"]) == 0.01
    assert (rows[1]["A low"], rows[1]["A high"], rows[1]["seeds"], rows[1]["fit seconds"]) == ("45", "55", "3", "12.3")
    assert rows[0]["A std"] == rows[2]["A"] == "" and rows[0]["protocol"] == "clip4cir"
    assert "out of memory" in rows[2]["note"]


def unescaped(text):
    for tex, plain in ((r"$\pm$", "±"), (r"$^{\dagger}$", "†"), ("{\\scriptsize ", ""), ("\\textcolor{gray}{", "")):
        text = text.replace(tex, plain)
    text = re.sub(r"\\textbf\{([^}]*)\}", r"\1", text)
    return re.sub(r"(?<!\\)\}", "", text).strip()


def test_latex():
    text = shown("latex")
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert [
        [unescaped(cell) for cell in re.split(r"(?<!\\)&", line.removesuffix(r" \\"))][1:] for line in body
    ] == NUMBERS
    assert body[1].startswith(r"{}tirg $<$x$>$ \& \{y\} & ") and r"\textbf{50.12 $\pm$ 1.50$^{\dagger}$}" in body[1]
    assert r"lost\_row" in body[2] and body[4].count(r"\textcolor{gray}") == 2 and r"gallery=val\_split" in body[4]
    assert not re.search(r"(?<!\\)[_%#]", text.split("\n", 1)[1])
    for opened in ("table", "tabular"):
        assert text.count(f"\\begin{{{opened}}}") == text.count(f"\\end{{{opened}}}") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles(tmp_path):
    document = "\\documentclass{article}\\usepackage{booktabs,xcolor}\\begin{document}\n%s\\end{document}\n"
    (tmp_path / "t.tex").write_text(document % shown("latex"))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_label_is_text_in_any_format():
    """A bracket or a star behind LaTeX's line end would be its argument; a tag in Markdown would be a tag."""
    odd = SweepTable("t", ["A"], [Row(label, "ours", {"A": Cell(1.0)}) for label in ("a", "[b]", "* <i>x")], [], [])
    rows = [line for line in shown("latex", odd).splitlines() if line.endswith(r"\\") and "1.00" in line]
    assert [row[:3] for row in rows] == ["{}a", "{}[", "{}*"]
    assert "| \\* &lt;i>x |" in shown("markdown", odd)


def test_terminal():
    text = " ".join(shown("terminal").split())
    for part in (
        "sum | 50 %",
        "tirg <x>",
        BEST,
        "[45.0, 55.0]",
        "TIRG [ResNet-18]",
        "(published, 2019, reprint)",
        "12.3",
    ):
        assert part in text
    assert "FAILED: runs/x/seed-0.log" in text and "gallery=val_split" in text and "last_note" in text


@pytest.mark.parametrize("output", ["terminal", *FORMATS])
def test_a_setting_that_varies_is_a_column(output):
    varying = SweepTable(TABLE.title, TABLE.columns, ROWS, [], ["protocol"])
    assert "protocol" in shown(output, varying) and shown(output, varying).count("clip4cir") >= 3


def test_an_output_is_what_the_key_may_be():
    from typing import get_args, get_type_hints

    from cliplab.sweeps.spec import Spec

    assert set(get_args(get_type_hints(Spec)["output"])) == {"terminal", *FORMATS}
