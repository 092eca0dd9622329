"""A callback for Hugging Face's `Trainer`: `Trainer(…, callbacks=[RecorderCallback("run.zarr", every=50)])`."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback  # pyright: ignore[reportMissingImports] - an extra

from farcli.recording.recorder import Recorder


class RecorderCallback(TrainerCallback):
    """Records a `Trainer`'s training; step is the optimiser step, which accumulation does not multiply.

    A training that goes on from a checkpoint begins at the Trainer's own `global_step`.

    Args:
        store: path of the store to write.
        options: of `farcli.Recorder`: every, at, params, with_optimizer, …
    """

    def __init__(self, store: str | Path, **options: Any) -> None:
        self._store = store
        self._options = options
        self._recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start recording: the Trainer has made its optimiser, and loaded a checkpoint if it resumes."""
        options = {"start_step": int(state.global_step), **self._options}
        self._recorder = Recorder(given["model"], given["optimizer"], self._store, **options)
        self._recorder.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Note the loss the Trainer reports."""
        if self._recorder is not None and logs and "loss" in logs:
            self._recorder.loss(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take the last snapshot and finish the store."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)
