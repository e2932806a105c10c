"""Overlap with evaluation sets, in all formats that they come in."""

from __future__ import annotations

import json
import unicodedata
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spell_megatron.corpus.evaluation_sets import evaluation_sequences, shared_sequence
from spell_megatron.corpus.texts import words
from spell_megatron.corpus.word_sequences import word_hashes
from spell_megatron.errors import UserError

PHRASE = "the quick brown fox jumps over a lazy dog while seven cats look on"  # 14 words


def write_set(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_overlap_is_found_wherever_the_text_stands(tmp_path, suffix):
    rows = [
        {"id": 1, "question": "Too short to look for?", "context": {"titles": ["a"], "parts": [["x y z", PHRASE]]}},
        {"id": 2, "question": " ".join(f"q{i}" for i in range(13)), "context": None},
    ]
    other = write_set(tmp_path / f"b{suffix}", [{"text": " ".join(f"other{i}" for i in range(20))}])
    known, owners = evaluation_sequences([write_set(tmp_path / f"a{suffix}", rows), other], 13)
    assert len(known) == 2 + 1 + 8 and (np.diff(known.astype(object)) > 0).all()

    def owner(text):
        place = shared_sequence(word_hashes(words(text)), 13, known)
        return None if place is None else int(owners[place])

    assert owner("And then " + PHRASE + ", they said.") == 0
    assert owner("THE quick, brown\nfox -- jumps over a (lazy) dog; while seven cats look!") == 0  # 13 of 14
    assert owner(PHRASE.removeprefix("the quick ")) is None  # 12
    assert owner(PHRASE.replace("lazy", "sleepy")) is None
    assert owner("so " + " ".join(f"Q{i}" for i in range(13))) == 0
    assert owner(" ".join(f"other{i}" for i in range(3, 19))) == 1
    assert owner("") is None


def shares(text: str, question: str, folder, n: int = 13) -> bool:
    known, _ = evaluation_sequences([write_set(folder / "set.jsonl", [{"question": question}])], n)
    return shared_sequence(word_hashes(words(text)), n, known) is not None


def test_overlap_is_found_however_letters_are_written(tmp_path):
    question = "Près du café où s’étaient échouées des péniches, la société a réparé l’écluse détériorée"
    for form in ("NFC", "NFD"):
        assert shares("Alors, " + unicodedata.normalize(form, question.upper()), question, tmp_path)


def test_seven_words_of_hindi_are_seven(tmp_path):
    """Vowel signs do not cut words into several."""
    shared = "बंदरगाह कार्यालय हर जहाज़ की गहराई लिखता"
    question = f"{shared} है क्योंकि नदी में रेत जमती रहती है"
    assert not shares(f"पुराने नियम से {shared} था पर अब नहीं लिखता", question, tmp_path)
    assert shares(f"पुराने नियम से {shared} था", question, tmp_path, 7)
    assert shares(f"नियम: {question}।", question, tmp_path)


def test_overlap_in_scripts_without_blanks(tmp_path):
    for question in ("港务局每年春天登记每艘挖泥船的吃水深度", "ท่าเรือจดความลึกของเรือทุกลำ"):
        assert shares(f"前言{question}結語", question, tmp_path)
        assert not shares(question[:12] + "。" + question[13:], question, tmp_path)


@pytest.mark.parametrize("content", ["\ufeff{}\r\n\r\n{}", "{}\n", "\ufeff \n[{}]", "[\n{},\n{}\n]", "{}"])
@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl"])
def test_json_files_of_either_kind(name, content, tmp_path):
    """Files of the hub named .json hold a list of rows, or a row a line."""
    if name == "a.jsonl" and "[" in content:
        pytest.skip("no JSON lines")
    row = json.dumps({"question": PHRASE})
    (tmp_path / name).write_text(content.replace("{}", row), encoding="utf-8")
    known, _ = evaluation_sequences([tmp_path / name], 13)
    assert len(known) == 2
    assert shared_sequence(word_hashes(words("So " + PHRASE)), 13, known) is not None


def test_an_archive_is_read_as_the_files_in_it(tmp_path):
    """LongBench comes as one: data.zip holds data/hotpotqa.jsonl and others."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps({"context": PHRASE}))
        archive.writestr("../data/short.json", "[]")
        archive.writestr("data/README.md", "[a link](to) " * 20)
    known, owners = evaluation_sequences([tmp_path / "data.zip"], 13)
    assert len(known) == 2 and set(owners) == {0}
    assert shared_sequence(word_hashes(words("So " + PHRASE)), 13, known) is not None
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("data/a.jsonl", "{broken")
    with pytest.raises(UserError, match=r"bad.zip: not a readable archive .*a.jsonl: line 1 is not JSON"):
        evaluation_sequences([tmp_path / "bad.zip"], 13)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK", "a.zip: not a readable archive"),
        ("a.jsonl", b'{"q": "one two three"}\n', "a.jsonl: no text of 13 words"),
        ("a.jsonl", b'{"q": "x"}\n{broken\n', "a.jsonl: line 2 is not JSON"),
        ("a.json", b"[1, ", "a.json: not a readable JSON file"),
        ("a.json", b'{"q": "x"}\n{broken\n', "a.json: line 2 is not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
    ],
)
def test_bad_evaluation_sets(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluation_sequences([tmp_path / name], 13)
