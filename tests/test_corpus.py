"""Which clips are found, with which captions."""

import os
from pathlib import Path

import pytest
from made import clip

from fvdm_jax.data.captions import beside, table
from fvdm_jax.data.corpus import find
from fvdm_jax.data.cutting import Cut, rows
from fvdm_jax.program import Refusal


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """The tests run in an empty folder with a folder of clips."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()


def captions(*given: str, **options) -> dict[str, str | None]:
    """The caption of each clip that is found, by its path."""
    return {str(source.path): source.caption for source in find(list(map(Path, given)), **options)}


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name,text\r\na.mp4,\"one, and\nmore\"\r\nunter/ü b.mp4,größer\r\n"),
        ("x.csv", "\ufeffid, Video ,PROMPT\n1,a.mp4,\"one, and\nmore\"\n2,unter/ü b.mp4,größer\n\n"),
        ("x.jsonl", '{"path": "a.mp4", "caption": "one, and\\nmore"}\n\n'
                    '{"path": "unter/ü b.mp4", "caption": "größer"}'),
    ],
)  # fmt: skip
def test_tables_of_captions(name, content):
    os.mkdir("clips/unter")
    for path in ("a.mp4", "unter/ü b.mp4", "c.mp4"):
        clip(path, 1, caption=None)
    Path("clips", name).write_text(content, "utf-8")
    expected = {"clips/a.mp4": "one, and\nmore", "clips/unter/ü b.mp4": "größer", "clips/c.mp4": None}
    assert captions("clips") == expected
    assert captions("clips", caption="any")["clips/c.mp4"] == "any"
    # A table alone names its clips, and no others.
    assert captions(f"clips/{name}") == {k: v for k, v in expected.items() if v}


def test_pusas_layout_and_texts_beside():
    os.makedirs("clips/train")
    clip("train/a.mp4", 1, caption=None)
    clip("b.mp4", 1, caption=" beside \n")
    clip("b.v2.mp4", 1, caption=None)
    Path("clips/metadata.csv").write_text("file_name,text\na.mp4,of the table\ngone.mp4,of nothing\n")
    found = captions("clips")
    assert found == {
        "clips/b.mp4": "beside", "clips/b.v2.mp4": None, "clips/gone.mp4": "of nothing",
        "clips/train/a.mp4": "of the table",
    }  # fmt: skip
    # What a table names and is not there is listed, not skipped.
    (gone,) = (row for row in rows(find([Path("clips")]), Cut((9,), ((32, 48),), 8)) if "gone" in str(row))
    assert "No such file" in gone.reason
    assert beside(Path("clips/b.mp4")) == "beside" and beside(Path("clips/train")) is None


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.csv", "file,text\n,one\n", "line 2 names no file"),
        ("a.csv", "file,text\na.mp4,one\na.mp4,two\n", "line 3 gives a.mp4 another caption"),
        ("a.csv", b"file,text\na.mp4,\xff\n", "is not UTF-8"),
        ("a.csv", "name,text\na.mp4,one\n", "names no clips"),
        ("a.csv", "", "names no clips"),
        ("a.jsonl", '{"file": "a.mp4", "text": "b"}\n{"file": ', "line 2 is not JSON"),
        ("a.jsonl", '["a.mp4", "b"]', "line 1 is no JSON object"),
        ("a.jsonl", '{"file": "a.mp4", "text": 7}', "line 1 has a caption that is no text"),
        ("a.jsonl", '{"file": "a.mp4", "text": "b"}\n{"text": "b"}', "line 2 names no file"),
    ],
)
def test_tables_that_are_no_use_are_refused(name, content, what):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refusal, match=what):
        find([Path(name)])


def test_a_table_of_something_else_is_let_alone():
    clip("a.mp4")
    Path("clips/stats.csv").write_text("epoch,loss\n1,2\n")
    assert table(Path("clips/stats.csv")) == {} and captions("clips") == {"clips/a.mp4": "it moves"}


def test_two_tables_that_differ_are_refused():
    Path("a.csv").write_text("file,text\nclips/a.mp4,one\n")
    Path("b.csv").write_text("file,text\nclips/a.mp4,two\n")
    with pytest.raises(Refusal, match="another caption than another table"):
        find([Path("a.csv"), Path("b.csv")])


def test_each_file_is_found_once_and_hidden_ones_are_not():
    clip("a.mp4"), clip(".b.mp4")
    os.symlink(".", "clips/round")
    assert list(captions("clips", "clips/a.mp4", "./clips")) == ["clips/a.mp4"]
    with pytest.raises(Refusal, match="is no file and no folder"):
        find([Path("gone.mp4")])
    os.mkdir("empty")
    with pytest.raises(Refusal, match="holds no clips"):
        find([Path("empty")])
