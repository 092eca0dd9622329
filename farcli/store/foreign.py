"""Reading any other valid Zarr v3 layout through zarr-python: compressed, packed, rechunked by someone else."""

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from farcli.errors import DamagedError, StoreError
from farcli.store.metadata import ArrayMetadata
from farcli.store.native import group

_DECODING = (ValueError, RuntimeError, OSError, EOFError, KeyError, TypeError, zlib.error)
"""What the codecs raise on damaged bytes; there is no common base."""
_PIECE_BYTES = 8 << 20
"""Bytes decoded beside `out` at once."""


class ForeignArray:
    """An array in a layout of someone else's; same interface as `NativeArray`.

    Raises:
        StoreError: zarr-python cannot read it either.
    """

    def __init__(
        self, store: Path, name: str, metadata: ArrayMetadata, runs: Sequence[int], steps: Sequence[int]
    ) -> None:
        import zarr
        import zarr.errors

        self.metadata = metadata
        self._store = store
        self._name = name
        self._runs = runs
        self._steps = steps
        try:
            with warnings.catch_warnings():  # "… is not in the Zarr version 3 specification"
                warnings.simplefilter("ignore")
                self._array = zarr.open_array(str(store / name), mode="r", zarr_format=3)
        except (*_DECODING, zarr.errors.BaseZarrError) as error:
            raise StoreError(f"{store}: {name} cannot be read by zarr either ({error}).") from error

    def read(self, runs: Sequence[int], steps: Sequence[int], start: int, stop: int, out: np.ndarray) -> None:
        """Read a selection into `out`; see `NativeArray.read`. Checked as far as the codecs check."""
        meta = self.metadata
        for a, (to_run, from_run) in group(runs, meta.inner[0]).items():
            for b, (to_step, from_step) in group(steps, meta.inner[1]).items():
                cell = (runs[to_run[0]], steps[to_step[0]])
                # zarr-python returns fill values where a file is missing or empty.
                self._check_files(a * meta.inner[0], b * meta.inner[1], start, stop, cell)
                at_run, at_step = a * meta.inner[0] + min(from_run), b * meta.inner[1] + min(from_step)
                rows = (max(from_run) - min(from_run) + 1) * (max(from_step) - min(from_step) + 1)
                width = max(1, _PIECE_BYTES // (rows * meta.dtype.itemsize * meta.inner[2])) * meta.inner[2]
                low = start
                while low < stop:
                    high = min(stop, (low // width + 1) * width)
                    box = self._box(
                        (
                            slice(at_run, a * meta.inner[0] + max(from_run) + 1),
                            slice(at_step, b * meta.inner[1] + max(from_step) + 1),
                            slice(low, high),
                        ),
                        cell,
                    )
                    pick = np.ix_([i - min(from_run) for i in from_run], [j - min(from_step) for j in from_step])
                    out[..., low - start : high - start][np.ix_(to_run, to_step)] = box[pick]
                    low = high

    def check_first(self) -> None:
        """Check that the first file is there."""
        self._check_files(0, 0, 0, 1, (0, 0))

    def _damaged(self, cell: tuple[int, int], what: str) -> DamagedError:
        run, step = self._runs[cell[0]], self._steps[cell[1]]
        return DamagedError(f"{self._store}: run {run}, step {step} is damaged: {what}.")

    def _box(self, selection: tuple[slice, slice, slice], cell: tuple[int, int]) -> np.ndarray:
        try:
            return np.asarray(self._array[selection])
        except _DECODING as error:
            raise self._damaged(cell, f"{self._name} cannot be decoded ({error})") from error

    def _check_files(self, run: int, step: int, start: int, stop: int, cell: tuple[int, int]) -> None:
        outer = self.metadata.outer
        for part in range(start // outer[2], (stop - 1) // outer[2] + 1):
            key = self._array.metadata.encode_chunk_key((run // outer[0], step // outer[1], part))
            try:
                size = (self._store / self._name / key).stat().st_size
            except OSError:
                raise self._damaged(cell, f"file {self._name}/{key} is missing") from None
            if not size:
                raise self._damaged(cell, f"file {self._name}/{key} is empty")
