"""A callback for Lightning's `Trainer`: `Trainer(…, callbacks=[RecorderCallback("run.zarr", every=50)])`."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports] - an extra

from farcli.recording.recorder import Recorder


class RecorderCallback(Callback):
    """Records a LightningModule; names are those of its own `state_dict`, step is the optimiser step.

    Args:
        store: path of the store to write.
        options: of `farcli.Recorder`: every, at, params, with_optimizer, …
    """

    def __init__(self, store: str | Path, **options: Any) -> None:
        self._store = store
        self._options = options
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start recording: optimisers are made, and a checkpoint is loaded if the Trainer resumes."""
        options = {"start_step": int(trainer.global_step), **self._options}
        self._recorder = Recorder(pl_module, list(trainer.optimizers), self._store, **options)
        self._recorder.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last snapshot and finish the store."""
        self._close(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the store unfinished, with everything up to here."""
        self._close(exception)

    def _close(self, error: BaseException | None) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None if error is None else type(error), error, None)
