"""Tables in Markdown."""

from brixel.utils.markdown import markdown_table


def test_numbers_are_aligned_to_the_right() -> None:
    assert markdown_table(["name", "px"], [["a", "1"], ["b", "20"]], numeric=[False, True]) == [
        "| name | px |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 20 |",
    ]


def test_headings_alone_are_texts() -> None:
    assert markdown_table(["name", "note"], [("a", "")]) == ["| name | note |", "| --- | --- |", "| a |  |"]


def test_a_table_without_rows_has_its_heading() -> None:
    assert markdown_table(["name"], []) == ["| name |", "| --- |"]


def test_columns_can_be_as_wide_as_their_cells() -> None:
    assert markdown_table(["", "px"], [["name", "1"], ["b", "2000"]], numeric=[False, True], pad=True) == [
        "|      |   px |",
        "| ---- | ---: |",
        "| name |    1 |",
        "| b    | 2000 |",
    ]


def test_a_cell_cannot_break_the_table() -> None:
    assert markdown_table(["name"], [["a|b\nc \t d"]])[2] == "| a\\|b c d |"
