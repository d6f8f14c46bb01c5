"""The report of `make chaos`: a run replaces the rows of the tests that it ran, and no others."""

from pathlib import Path

from tests.report import BEGIN, END, Row, write


def test_a_run_replaces_the_rows_of_its_tests_and_keeps_the_others(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write(page, {("R10", "poison is kept"): Row(1, False, ["1,000 of 1,000"]), ("R2", "workers join"): Row(3)})
    write(page, {("R2", "a control"): Row(1)})
    write(page, {("R2", "workers join"): Row(1, True, ["lost 1", "twice 2"])})
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    rows = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| R")]
    assert rows == [
        ["| R2", "a control", "1 case", "holds"],
        ["| R2", "workers join", "lost 1; twice 2", "FAILED"],
        ["| R10", "poison is kept", "1,000 of 1,000", "holds"],
    ]
