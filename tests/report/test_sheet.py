from __future__ import annotations

import pytest

from flexifed.report.sheet import Column, Section, Sheet, latex, markdown, terminal_lines

SHEET = Sheet(
    "A title",
    (Column("V1", ("paper", "diff")), Column("share_of_it")),
    (
        Section(
            "cifar10 / vgg",
            (("max_common", (("80.6±0.3", "80.6", "+0.0"), ("5 %",))), ("alone", (("9.1",), ("",)))),
        ),
        Section("a_b", (("max_common", (("1.0", "2.0", "-1.0"), ("50 %",))),)),
    ),
    ("A note.",),
)


def lines(width: int) -> list[str]:
    return [line for line, _ in terminal_lines(SHEET, width)]


def test_parts_stand_beside_a_number_where_there_is_room() -> None:
    assert lines(44) == [
        "A title",
        "                  V1 paper diff  share_of_it",
        "cifar10 / vgg",
        "max_common  80.6±0.3  80.6 +0.0          5 %",
        "alone            9.1",
        "a_b",
        "max_common       1.0   2.0 -1.0         50 %",
        "A note.",
    ]


def test_parts_go_below_the_number_where_there_is_no_room() -> None:
    assert lines(43) == [
        "A title",
        "                    V1  share_of_it",
        "            paper diff",
        "cifar10 / vgg",
        "max_common    80.6±0.3          5 %",
        "             80.6 +0.0",
        "alone              9.1",
        "a_b",
        "max_common         1.0         50 %",
        "              2.0 -1.0",
        "A note.",
    ]


def test_markdown_puts_parts_in_brackets_and_names_a_section_once() -> None:
    assert markdown(SHEET).splitlines() == [
        "**A title**",
        "",
        "|  |  | V1 (paper, diff) | share\\_of\\_it |",
        "| :-- | :-- | --: | --: |",
        "| **cifar10 / vgg** | max\\_common | 80.6±0.3 (80.6, +0.0) | 5 % |",
        "|  | alone | 9.1 |  |",
        "| **a\\_b** | max\\_common | 1.0 (2.0, -1.0) | 50 % |",
        "",
        "A note.",
    ]


def test_latex_gives_parts_columns_of_their_own_and_escapes_special_characters() -> None:
    text = latex(SHEET, {"max_common": "Max-Common"}).splitlines()
    assert r"\caption{A title. A note.}" in text
    assert r"\begin{tabular}{lrrrr}" in text
    assert r" & \multicolumn{3}{c}{V1} & \multicolumn{1}{c}{share\_of\_it} \\" in text
    assert r" &  & paper & diff &  \\" in text
    assert r"Max-Common & 80.6$\pm$0.3 & 80.6 & $+0.0$ & 5 \% \\" in text
    assert r"alone & 9.1 &  &  &  \\" in text
    assert r"Max-Common & 1.0 & 2.0 & $-1.0$ & 50 \% \\" in text
    rows = [line for line in text if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") for line in rows} == {4}


@pytest.mark.parametrize("text", ["a_b", "50 %", "a & b", "#1", "${x}$", "a~b^c\\d"])
def test_special_characters_are_escaped_in_latex(text: str) -> None:
    caption = latex(Sheet(text, (), ())).split(r"\caption{")[1].splitlines()[0].removesuffix(".}")
    document = latex(Sheet("", (Column(text),), (Section(text, ((text, ((text,),)),)),)))
    column = next(line for line in document.splitlines() if line.startswith(r" & \multicolumn{1}{c}{"))
    name = column.removeprefix(r" & \multicolumn{1}{c}{").removesuffix(r"} \\")
    heading = next(line for line in document.splitlines() if r"\textbf{" in line)
    heading = heading.split(r"\textbf{")[1].removesuffix(r"}} \\")
    for escaped in (caption, name, heading):
        for character in "_%&#$":
            assert escaped.count(character) == escaped.count("\\" + character)
        assert "~" not in escaped.replace(r"\textasciitilde{}", "")
        assert "^" not in escaped.replace(r"\textasciicircum{}", "")


def test_a_sheet_without_columns_is_its_title_and_notes() -> None:
    empty = Sheet("Nothing", (), (), ("No cell is finished.",))
    assert [line for line, _ in terminal_lines(empty, 80)] == ["Nothing", "No cell is finished."]
    assert markdown(empty) == "**Nothing**\n\nNo cell is finished."
