"""Reading files: kinds, fields, chats, folders, and what is skipped."""

import csv
import gzip
import json
import sys
import types

import pytest

from dmt.data.documents import RecordReader, read_documents
from dmt.errors import UserError


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_texts(path, **kwargs):
    return read_documents(path, RecordReader(**kwargs)).texts


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a.txt.gz", "A.MD.GZ"])
def test_plain_text_of_any_name_is_one_document(tmp_path, name):
    data = "first\n\nsecond é".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert read_texts(tmp_path / name) == ["first\n\nsecond é"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a, b"}\r\n{"text": "c\\nd"}\r\n'),
        ("a.JSONL.gz", '{"text": "a, b"}\n\n{"text": "c\\nd"}'),
        ("a.json", '[{"text": "a, b"},\n {"text": "c\\nd"}]'),
        ("b.json", '{"text": "a, b"}\n{"text": "c\\nd"}\n'),
        ("a.csv", 'id,text\n1,"a, b"\n2,"c\nd"\n'),
        ("a.csv.gz", '\ufefftext,id\r\n"a, b",1\r\n"c\r\nd",2\r\n'),
    ],
)
def test_records_are_one_document_each(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_texts(tmp_path / name) == ["a, b", "c\nd"]


def test_a_cell_may_be_long_and_the_limit_of_the_process_stays(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000 + "\n")
    limit = csv.field_size_limit()
    assert read_texts(tmp_path / "a.csv") == ["a" * 200_000]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "content": "b"}, "a"),
        ({"content": "b", "lang": "en"}, "b"),
        ({"prompt": "Who? ", "completion": "Ada."}, "Who? Ada."),
        (
            {
                "messages": [
                    {"role": "user", "content": "Who?"},
                    {"role": "assistant", "content": [{"type": "text", "text": "Ada."}]},
                    {"role": "assistant", "content": None},
                ]
            },
            "Who?\n\nAda.\n\n",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Who?"}],
                "completion": [{"role": "assistant", "content": "Ada."}],
            },
            "Who?\n\nAda.",
        ),
    ],
)
def test_the_usual_fields_are_found(tmp_path, record, text):
    path = write_lines(tmp_path / "a.jsonl", [record])
    assert read_texts(path) == [text]


def test_a_field_can_be_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "body": "b"}])
    assert read_texts(path, field_name="body") == ["b"]
    with pytest.raises(UserError, match=r"line 1 has no text in data.field=x \(its fields are"):
        read_texts(path, field_name="x")


def test_a_chat_is_rendered_by_the_template_of_the_tokenizer(tmp_path, tokenizer, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert read_texts(path, tokenizer=tokenizer) == ["<user>Hi<assistant>Ho"]
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"line 1: .*template refuses .*roles must alternate"):
        read_texts(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"line 2 has no text in text, as the first one"),
        ("a.jsonl", '{"txt": 1, "id": 2}', r"line 1 .*\(its fields are txt, id\); .* data.field"),
        ("a.jsonl", '{"text": ["a"]}', r'line 1 has no text in its field "text"'),
        ("a.json", "[1]", "item 1 is not an object"),
        ("a.json", '{"text": ', "line 1 is not a JSON object"),
        ("a.csv", "a,b\n1,2\n", r"line 2 .*\(its fields are a, b\)"),
        ("a.csv", "text;label\na;b\n", r"\(its fields are text;label\)"),
        ("a.csv", "text,id\na,b,c\n", "line 2 has more cells than columns"),
        ("a.csv", 'text\n"a"b"\n', "line 2: .*correct the line"),
        ("a.txt.gz", "no gzip", "is not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], "is not a complete gzip file"),
        ("a.parquet.gz", "x", "is none of .txt, .md, .jsonl, .json, .csv, .parquet"),
        ("a.docx", "x", "is none of .txt, .md"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_texts(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_counts_what_it_leaves_out(tmp_path):
    for name in ("b.txt", "a.md", "C.TXT", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".git/x.txt", ".ipynb_checkpoints/b.txt", "sub/._d.txt", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hidden")
    for name in ("e.pdf", "f.PDF", "LICENSE"):
        (tmp_path / name).write_text("x")
    (tmp_path / "labels.csv").write_text("id,label\n1,2\n")
    (tmp_path / "config.json").write_text('{"layers": 3}')
    (tmp_path / "blank.txt").write_text(" \n")
    documents = read_documents(tmp_path, RecordReader())
    assert sorted(documents.texts) == ["C.TXT", "a.md", "b.txt", "sub/d.txt"]
    assert documents.num_files == 5
    assert documents.skipped == {
        "hidden": 4,
        ".pdf": 2,
        "files without an ending": 1,
        "tables without a field of text": 2,
        "blank documents": 1,
    }


def test_lines_without_text_in_a_folder_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"id": 1}])
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(UserError, match=r"a.jsonl line 1 .* its fields are id|its fields are id"):
        read_documents(tmp_path, RecordReader())


def test_blank_and_missing_texts_are_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"text": " "}])
    documents = read_documents(path, RecordReader())
    assert (documents.texts, documents.skipped["blank documents"]) == (["a"], 2)


def test_parquet_needs_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow: pip install pyarrow"):
        read_texts(tmp_path / "a.parquet")


def test_rows_of_a_parquet_file_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "content": ["a", None, "c"]}), path)
    documents = read_documents(path, RecordReader())
    assert (documents.texts, documents.skipped["blank documents"]) == (["a", "c"], 1)
    with pytest.raises(UserError, match=r"a.parquet has no text .*its fields are id, content"):
        read_texts(path, field_name="body")
    path.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match=r"a.parquet cannot be read \("):
        read_texts(path)


def test_a_parquet_file_is_read_by_its_columns_of_text(tmp_path, monkeypatch):
    """The same with a stand-in for pyarrow, which not every machine has."""
    requests = []

    class ParquetFile:
        schema_arrow = types.SimpleNamespace(names=["image", "text"])

        def __init__(self, path):
            assert path.name == "a.parquet"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def iter_batches(self, batch_size, columns):
            requests.append(columns)
            for texts in (["a", "b"], ["c"]):
                rows = [{"text": text} for text in texts]
                yield types.SimpleNamespace(to_pylist=lambda rows=rows: rows)

    pyarrow = types.SimpleNamespace(ArrowException=ValueError)
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    module = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert read_texts(tmp_path / "a.parquet") == ["a", "b", "c"]
    assert requests == [["text"]]
