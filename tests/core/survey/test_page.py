"""The page of a survey: untrusted names and metadata are escaped; the values are those of the survey."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from legomole.core.adapter import Adapter, Source
from legomole.core.survey.page import html_page
from legomole.core.survey.survey import survey

from .test_survey import A, B, adapter, layers, part

Image = pytest.importorskip("PIL.Image")
HOSTILE = """</title><script>alert("x")</script><img src=x onerror='alert(1)'>&amp;{{7*7}}"""


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of every cell."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def page_of(*adapters: Adapter) -> str:
    return html_page(survey(adapters), adapters)


def test_text_from_a_file_never_becomes_markup():
    """Neither the file's name, nor a layer's name, nor the base model."""
    modules = {f"blocks.0.{HOSTILE}{x}.{i}": part((1, 0, 0)) for i, x in enumerate("ab")}
    metadata = {"modelspec.architecture": HOSTILE, "title": HOSTILE}
    hostile = Adapter(modules, metadata=metadata, source=Source(HOSTILE.replace("/", "|"), HOSTILE, "comfy"))
    text = page_of(hostile, Adapter(modules, source=Source("y")))
    found = Tags(text)
    assert "<script" not in text
    assert not {"script", "iframe", "object", "link", "a"} & set(found.tags)
    assert found.tags.count("img") == 1
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert HOSTILE in found.cells  # unchanged, as text


def test_the_page_loads_nothing():
    text = page_of(A, B)
    assert "default-src 'none'" in text
    assert set(re.findall(r"(?:src|href|url)\W*=?\W*(\w+:)", text)) == {"data:"}
    assert "http" not in text.replace("http-equiv", "")


def test_the_picture_is_embedded():
    data = re.search(r"base64,([^\"]+)", page_of(A))
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as picture:
        assert picture.size[0] == 1590


def test_values_of_the_tables():
    """The cases of `test_survey`: energies 9, 4, 1 and 16, 4, 29; overlaps 1, -1, 0; sums 49, 0, 30."""
    cells = Tags(page_of(A, B)).cells
    at = cells.index("blocks.0")
    rows = [cells[at + 6 * i : at + 6 * i + 6] for i in range(3)]
    assert rows == [
        ["blocks.0", "2", "1", "+1.00", "64.3%", "32.7%"],
        ["blocks.1", "2", "1", "-1.00", "28.6%", "8.2%"],
        ["blocks.2", "2", "2", "0.00", "7.1%", "59.2%"],
    ]
    at = cells.index("common outputs")
    # (12 - 4 + 0) of (12 + 4 + sqrt 29)
    assert cells[at + 1 : at + 7] == ["a", "b", "6", "+0.37", "100%", "67%"]
    at = cells.index("the sum")
    assert cells[at + 3 : at + 7] == ["1", "93.7%", "100.0%", "91.8%"]  # 74 of 79, 45 of 49


def test_one_alone_has_no_pairs():
    text = page_of(A)
    assert "Pairs" not in text
    assert "the sum" not in Tags(text).cells


def test_the_table_of_pairs_is_limited():
    several = [adapter(f"n{i}", layers(part((1, i % 6, i % 5)))) for i in range(21)]
    text = page_of(*several)
    assert "and 10 pairs that overlap less" in text
    assert text.count("<tr>") < 300
