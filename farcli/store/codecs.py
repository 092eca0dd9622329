"""How packed chunks are encoded: by name for writing, by the chain in an array's metadata for reading.

A codec is one function that returns a `Codec`, one line in `CODECS` and one golden fixture in `tests/golden`.
Chunks are in C order, time before coordinates; no codec may need another order, since numcodecs' pcodec and
delta do not round-trip behind a transpose (numcodecs #850; seen with zarr 3.1.6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from farcli.errors import UsageError
from farcli.registry import unknown

Encode = Callable[[np.ndarray], Any]
Decode = Callable[[memoryview, np.ndarray], None]

BLOCK_BYTES = 1 << 20
"""Bytes blosc compresses at once. Its own choice, which fits a small cache, costs half of the gain and of the speed."""
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_PCODEC_LEVEL = 8
_MANTISSA = {"float32": 23, "float64": 52, "float16": 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How chunks of one store are written.

    Attributes:
        name: as typed.
        chain: Zarr v3 codecs from array to bytes; the store appends a CRC-32C.
        encode: a contiguous chunk to bytes.
        keep_bits: bits of the mantissa that are kept; None where nothing is lost.
    """

    name: str
    chain: tuple[dict[str, Any], ...]
    encode: Encode
    keep_bits: int | None = None


def _none(argument: str | None, dtype: np.dtype) -> Codec:
    """Chunks as they are."""
    _no_argument("none", argument)
    return Codec(name="none", chain=(_LITTLE,), encode=lambda chunk: chunk.data.cast("B"))


def _zstd(argument: str | None, dtype: np.dtype) -> Codec:
    """Lossless: bytes of a kind together, then Zstandard level 1, all in Zarr's core specification."""
    from numcodecs.blosc import SHUFFLE, compress

    _no_argument("zstd", argument)
    item = dtype.itemsize
    settings = {"typesize": item, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOCK_BYTES}
    return Codec(
        name="zstd",
        chain=(_LITTLE, {"name": "blosc", "configuration": settings}),
        encode=lambda chunk: compress(chunk.view(f"u{item}"), b"zstd", 1, SHUFFLE, BLOCK_BYTES),
    )


def _pcodec(argument: str | None, dtype: np.dtype) -> Codec:
    """Lossless: Pco, an entropy coder of numbers; Zarr reads it where numcodecs and pcodec are installed."""
    from numcodecs.pcodec import PCodec

    _no_argument("pcodec", argument)
    try:
        encoder = PCodec(level=_PCODEC_LEVEL)
    except (ImportError, ValueError) as error:
        raise UsageError(
            "codec 'pcodec': the package pcodec is not installed.", hint="pip install 'numcodecs[pcodec]'"
        ) from error
    settings = {key: value for key, value in encoder.get_config().items() if key != "id"}
    return Codec(name="pcodec", chain=({"name": "numcodecs.pcodec", "configuration": settings},), encode=encoder.encode)


def _bitround(argument: str | None, dtype: np.dtype) -> Codec:
    """Lossy: `bitround:N` rounds to N bits of the mantissa (relative error at most 2^−(N+1)), then as `zstd`."""
    most = _MANTISSA[dtype.name]
    if argument is None or not argument.isdigit() or not 1 <= int(argument) < most:
        raise UsageError(f"codec 'bitround:{argument or ''}': expected bitround:N with N from 1 to {most - 1}.")
    inner = _zstd(None, dtype)
    return Codec(name=f"bitround:{argument}", chain=inner.chain, encode=inner.encode, keep_bits=int(argument))


CODECS: dict[str, Callable[[str | None, np.dtype], Codec]] = {
    "none": _none,
    "zstd": _zstd,
    "pcodec": _pcodec,
    "bitround": _bitround,
}


def choose(text: str, dtype: np.dtype) -> Codec:
    """The codec a user named, like "zstd" or "bitround:12".

    Raises:
        UsageError: there is none of that name, or its argument makes no sense.
    """
    name, colon, argument = text.partition(":")
    if name not in CODECS:
        raise unknown("codec", name, CODECS)
    return CODECS[name](argument if colon else None, dtype)


def _no_argument(name: str, argument: str | None) -> None:
    if argument is not None:
        raise UsageError(f"codec '{name}:{argument}': {name} takes no argument.")


def round_mantissa(values: np.ndarray, bits: int) -> None:
    """Round to nearest, ties to even, keeping `bits` bits of the mantissa; NaN and infinities stay. In place."""
    drop = _MANTISSA[values.dtype.name] - bits
    raw = values.view(f"u{values.itemsize}")
    one = raw.dtype.type
    finite = np.isfinite(values)
    odd = (raw >> one(drop)) & one(1)
    odd += one((1 << (drop - 1)) - 1)
    rounded = (raw + odd) & ~one((1 << drop) - 1)
    # Rounding up the largest numbers would make them infinite; those are cut instead.
    keep = finite & np.isfinite(rounded.view(values.dtype))
    cut = finite & ~keep
    np.copyto(raw, rounded, where=keep)
    np.copyto(raw, raw & ~one((1 << drop) - 1), where=cut)


def decoder(chain: list[Any]) -> Decode | None:
    """How chunks of an array are decoded, given its codecs but the checksum; None for chains we do not know."""
    names = [codec if isinstance(codec, str) else codec.get("name") for codec in chain]
    if names and names[0] == "bytes":
        first = chain[0]
        if not isinstance(first, dict) or first.get("configuration", {}).get("endian") != "little":
            return None
    if names == ["bytes"]:
        return _decode_none
    if names == ["bytes", "blosc"]:
        return _decode_blosc
    if names == ["numcodecs.pcodec"]:
        return _pcodec_decoder()
    return None


def _decode_none(data: memoryview, out: np.ndarray) -> None:
    target = out.data.cast("B")
    if data.nbytes != target.nbytes:
        raise ValueError(f"{data.nbytes} bytes, expected {target.nbytes}")
    target[:] = data


def _decode_blosc(data: memoryview, out: np.ndarray) -> None:
    from numcodecs.blosc import decompress

    # The header of a Blosc 1 frame: its decoded size at 4, its own size at 12.
    size, own = (int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
    if size != out.nbytes or own != data.nbytes:
        raise ValueError(f"{size} bytes in a frame of {own}, expected {out.nbytes} in {data.nbytes}")
    decompress(data, out)


def _pcodec_decoder() -> Decode | None:
    from numcodecs.pcodec import PCodec

    try:
        codec = PCodec()
    except (ImportError, ValueError):
        return None  # zarr-python says what to install

    def decode(data: memoryview, out: np.ndarray) -> None:
        codec.decode(data, out)

    return decode
