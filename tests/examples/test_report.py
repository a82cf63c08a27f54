"""Tables and figures of the benchmarks, with rows that are made up."""

from pathlib import Path

import pytest
from programs import load_program

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
PAGE = """# Title

<!-- a.py -->
old
<!-- end of a.py -->

Text with | bars.

<!-- b.py -->
<!-- end of b.py -->
"""


@pytest.fixture(scope="module")
def report():
    with load_program(FOLDER / "report.py") as module:
        yield module


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def row(name, time, **more):
    return {"side": name, "time (ms)": time, **more}


def lines_of(path):
    """Return the lines of the first table, without spaces."""
    lines = path.read_text(encoding="utf-8").split("<!-- end of a.py -->")[0]
    return [line.replace(" ", "") for line in lines.splitlines() if line[:1] == "|"]


def test_table_is_written_between_its_comments(report, page):
    report.write("a.py", [row("x", "1.5"), row("y", "20.0")], "A machine.", path=page)
    assert page.read_text(encoding="utf-8") == PAGE.replace(
        "old\n",
        """
A machine.

| side             | time (ms) |
| ---------------- | --------: |
| x                |       1.5 |
| y                |      20.0 |

""",
    )


def test_writing_twice_changes_nothing(report, page):
    report.write("b.py", [row("x", "1.5")], "A machine.", path=page)
    before = page.read_text(encoding="utf-8")
    report.write("b.py", [row("x", "1.5")], "A machine.", path=page)
    assert page.read_text(encoding="utf-8") == before


def test_other_rows_stay_only_if_they_are_of_the_same_machine(report, page):
    report.write("a.py", [row("x", "1"), row("y", "2")], "A machine.", path=page)
    report.write("a.py", [row("z", "4"), row("x", "3")], "A machine.", path=page)
    assert lines_of(page)[2:] == ["|x|3|", "|y|2|", "|z|4|"]
    report.write("a.py", [row("x", "5")], "Another machine.", path=page)
    assert lines_of(page)[2:] == ["|x|5|"]


def test_other_rows_are_dropped_if_the_columns_change(report, page):
    report.write("a.py", [row("x", "1"), row("y", "2")], "A machine.", path=page)
    new = row("x", "3", **{"x peer": "1.0"})
    report.write("a.py", [new], "A machine.", path=page)
    assert lines_of(page)[2:] == ["|x|3|1.0|"]


def test_page_without_the_comments_is_an_error(report, page):
    with pytest.raises(SystemExit, match=r"there must be <!-- c\.py -->"):
        report.write("c.py", [row("x", "1")], "A machine.", path=page)
    assert page.read_text(encoding="utf-8") == PAGE


def test_page_has_the_comments_of_every_program(report):
    text = report.README.read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        if path.name != "report.py":
            assert text.count(f"<!-- {path.name} -->\n") == 1
            assert text.count(f"<!-- end of {path.name} -->\n") == 1


def test_statement_has_the_cores_and_the_versions(report):
    statement = report.machine("numpy")
    assert f"; {report.count_cores()} cores; jbag " in statement
    assert ", numpy " in statement


def test_bars_of_ratios_start_at_one(report, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure", reason="it draws plots")
    figures = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure,
        "savefig",
        lambda figure, *args, **options: (
            figures.append(figure) or save(figure, *args, **options)
        ),
    )
    rows = [
        {"case": case, "what": what, "x a": "2.00", "x b": ratio}
        for case in ("small", "large")
        for what, ratio in (("sum", "0.50"), ("max", "-"))
    ]
    path = tmp_path / "a.png"
    report.plot(rows, "times as fast", str(path), names=2)
    assert path.read_bytes().startswith(b"\x89PNG")
    small, large = figures[0].axes
    titles = [axes.get_title(loc="left") for axes in (small, large)]
    assert titles == ["small", "large"]
    assert [bar.get_x() for bar in small.patches] == [1, 1, 1, 1]
    ends = [bar.get_x() + bar.get_width() for bar in small.patches]
    assert ends[:3] == [2, 2, 0.5]
    assert list(small.lines[0].get_xdata()) == [1, 1]
