"""`spell prepare` on the command line."""

from __future__ import annotations


def test_prepare_writes_clusters(spell, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, subject in enumerate(("sea", "sky", "sun", "fog")):
        (folder / f"{i}.txt").write_text(f"Document {i} tells of the {subject}. " * 20)
    words = ["--out", "corpus.parquet", "--documents-per-cluster", "2"]
    status, output, errors = spell("prepare", "texts", *words)
    assert status == 0 and not errors.strip()
    assert (tmp_path / "corpus.parquet").is_file() and output
    before = (tmp_path / "corpus.parquet").read_bytes()
    status, output, errors = spell("prepare", "texts", *words, "--seed", "1")
    assert status == 2 and "corpus.parquet exists already" in errors and not output
    assert (tmp_path / "corpus.parquet").read_bytes() == before
