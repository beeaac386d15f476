"""README and tutorials read easily: Flesch and Kincaid's grade of their prose, and no long README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

textstat = pytest.importorskip("textstat")

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("there is no documentation beside these tests", allow_module_level=True)
EASY = [ROOT / "README.md", *sorted((ROOT / "docs/tutorials").glob("*.md"))]
HARDEST = 10


def prose(text: str) -> str:
    """The sentences of a page: no code, tables, headings, comments or targets of links; code within them is a word."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?:\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"^ *(?:[-*]|\d+\.) (.*?[^.:;])$", r"\1.", text, flags=re.MULTILINE)
    return text.replace("*", "")


@pytest.mark.parametrize("page", EASY, ids=lambda page: page.stem)
def test_readme_and_tutorials_are_easy_to_read(page: Path) -> None:
    text = prose(page.read_text("utf-8"))
    assert len(text.split()) > 100
    assert textstat.flesch_kincaid_grade(text) <= HARDEST


def test_a_page_of_long_words_in_long_sentences_is_hard_to_read() -> None:
    hard = (
        "# Why\n\nUnderstanding preconditioned optimisation necessitates considerable familiarity with "
        "eigendecompositions of covariance matrices, notwithstanding `one` [introductory](page.md) exposition.\n"
    )
    assert "page.md" not in prose(hard)
    assert textstat.flesch_kincaid_grade(prose(hard)) > HARDEST


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
