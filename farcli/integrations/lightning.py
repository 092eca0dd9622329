"""Callbacks for Lightning's `Trainer`: `Trainer(…, callbacks=[RecorderCallback("run.zarr", every=50)])`."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports] - an extra

from farcli.recording.recorder import Recorder, inner_optimizer
from farcli.speculation.hearing import Losses
from farcli.speculation.leaper import Leaper
from farcli.speculation.options import enough_to_verify


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
        # Lightning counts the steps of several optimisers together; their own states count each.
        start = int(trainer.global_step) if len(trainer.optimizers) == 1 else None
        options = {"start_step": start, **self._options}
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


class LeaperCallback(Callback):
    """Leaps while a `Trainer` trains: `Trainer(…, callbacks=[LeaperCallback(every=100, validate=held_out_loss)])`.

    All that leaping goes on from is in Lightning's own checkpoints. The last leaps are made early enough to be
    verified by the end, where the number of steps is known.

    Args:
        options: of `farcli.Leaper`: predictor, validate (called with the LightningModule), every, gate, …; without
            `validate` leaps are verified by the losses of batches not trained on yet.

    Attributes:
        leaper: the `Leaper`, once the training has begun; `leaper.account` says what came of it.
    """

    def __init__(self, **options: Any) -> None:
        self.leaper: Leaper | None = None
        self._options = options
        self._losses: Losses | None = None
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on with what the checkpoint holds: by now the optimisers have their state."""
        total = trainer.estimated_stepping_batches
        options = enough_to_verify(self._options, int(total) if total < float("inf") else None)
        optimizers = [inner_optimizer(each) for each in trainer.optimizers]
        leaper = self.leaper = Leaper(pl_module, optimizers, step=int(trainer.global_step), **options)
        if self._saved is not None:
            leaper.load_state_dict(self._saved)
            self._saved = None
        self._losses = Losses()
        leaper.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the loss of a step, where this batch ended one; the verdict on a last window, before it is saved."""
        leaper, losses = self.leaper, self._losses
        if leaper is None or losses is None:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and (loss := losses.take()) is not None:
            leaper.loss(loss)
        if trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches:
            leaper.finish()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last verdict."""
        self._close(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take back what is not verified."""
        self._close(exception)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.leaper is None else self.leaper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._saved = dict(state_dict) or None

    def _close(self, error: BaseException | None) -> None:
        if self._losses is not None:
            self._losses.close()
        if self.leaper is not None:
            self.leaper.__exit__(None if error is None else type(error), error, None)
