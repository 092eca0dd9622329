from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farcli.config import (
    configure,
    format_size,
    options_of,
    parse_assignments,
    parse_duration,
    parse_selection,
    parse_size,
)
from farcli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "bytes_"), [("512M", 512e6), ("2G", 2e9), ("1Gi", 2**30), ("1.5k", 1500), ("4096", 4096), ("3MB", 3e6)]
)
def test_sizes(text, bytes_):
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "G", "-1", "2X", "1 2"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_format_size():
    assert [format_size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]


@pytest.mark.parametrize(("text", "seconds"), [("3h50m", 13800), ("90s", 90), ("15m", 900), ("120", 120)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "soon", "1d"])
def test_durations_that_are_none(text):
    with pytest.raises(UsageError, match="time"):
        parse_duration(text)


@given(st.sets(st.integers(0, 500), min_size=1).map(sorted), st.data())
def test_a_slice_takes_values_like_python(available, data):
    low = data.draw(st.integers(0, available[-1]))
    high = data.draw(st.integers(low, available[-1] + 1))
    expected = [v for v in available if low <= v < high]
    if expected:
        assert parse_selection(f"{low}:{high}", available, "runs") == expected
    else:
        with pytest.raises(UsageError):
            parse_selection(f"{low}:{high}", available, "runs")


def test_selections():
    steps = [0, 20, 40, 60]
    assert parse_selection("all", steps, "steps") == steps
    assert parse_selection("20,60", steps, "steps") == [20, 60]
    assert parse_selection("-1", steps, "steps") == [60]
    assert parse_selection("::2", steps, "steps") == [0, 40]
    assert parse_selection("0:80", steps, "steps") == steps


@pytest.mark.parametrize("text", ["8:12", "7", "a", "1:2:3:4", "0:10:0", ""])
def test_selections_out_of_range_name_what_there_is(text):
    with pytest.raises(UsageError, match="runs"):
        parse_selection(text, [0, 1, 2], "runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    rate: float = field(default=0.1, metadata={"help": "learning rate"})
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: int | None = None
    file: str | None = "x"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError("rate must be positive")


def test_configure():
    assert configure(Config, {"rate": "1e-3", "kind": "b", "flag": "yes", "limit": "none"}, "toy") == Config(
        rate=1e-3, kind="b", flag=True
    )
    assert configure(Config, {"limit": "3"}, "toy").limit == 3
    assert [configure(Config, {"file": text}, "toy").file for text in ("none", "y")] == [None, "y"]
    assert options_of(Config)[0].help == "learning rate"
    assert options_of(Config)[1].type == "a|b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raet": "1"}, "Did you mean 'rate'"),
        ({"rate": "fast"}, "expected float"),
        ({"kind": "c"}, r"expected a\|b"),
        ({"flag": "maybe"}, "expected bool"),
        ({"rate": "-1"}, "rate must be positive"),
    ],
)
def test_configure_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        configure(Config, options, "toy")


def test_assignments():
    assert parse_assignments(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="key=value"):
        parse_assignments(["a"])
