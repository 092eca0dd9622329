"""Callbacks for Hugging Face's `Trainer`: `Trainer(…, callbacks=[RecorderCallback("run.zarr", every=50)])`."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback  # pyright: ignore[reportMissingImports] - an extra

from farcli.files import staged_file
from farcli.recording.messages import say
from farcli.recording.recorder import Recorder, inner_optimizer
from farcli.speculation.hearing import Losses
from farcli.speculation.leaper import Leaper
from farcli.speculation.options import enough_to_verify


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
        if self._recorder is not None:  # callbacks are not told of the exception that ended the last training
            self._recorder.__exit__(RuntimeError, None, None)
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


class LeaperCallback(TrainerCallback):
    """Leaps while a `Trainer` trains: `Trainer(…, callbacks=[LeaperCallback(every=100, validate=held_out_loss)])`.

    Where the `Trainer` saves a checkpoint, all that leaping goes on from is saved in it, as `farcli-leaper.pt`, and
    found there again when the training is resumed. The last leaps are made early enough to be verified by the end.

    Args:
        options: of `farcli.Leaper`: predictor, validate, every, gate, …; without `validate` leaps are verified by the
            losses of batches not trained on yet.
        checkpoint: folder of the checkpoint that the training resumes from, where it is not
            `OUTPUT_DIR/checkpoint-STEP`.

    Attributes:
        leaper: the `Leaper`, once the training has begun; `leaper.account` says what came of it.
    """

    FILE = "farcli-leaper.pt"

    def __init__(self, *, checkpoint: str | Path | None = None, **options: Any) -> None:
        self.leaper: Leaper | None = None
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._options = options
        self._losses: Losses | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, or go on with what the checkpoint holds."""
        step = int(state.global_step)
        options = enough_to_verify(self._options, int(state.max_steps))
        leaper = self.leaper = Leaper(given["model"], inner_optimizer(given["optimizer"]), step=step, **options)
        if step:
            file = (self._checkpoint or self._folder(args, state)) / self.FILE
            if file.exists():
                leaper.load_state_dict(torch.load(file, map_location=leaper.device, weights_only=True))
            else:
                say(f"{file}: is not there; the training goes on from step {step}, and leaping begins anew.")
        self._losses = Losses()
        leaper.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tell the loss of the step."""
        if self.leaper is not None and self._losses is not None and (loss := self._losses.take()) is not None:
            self.leaper.loss(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The verdict on a last window, before anything is saved."""
        if self.leaper is not None and (state.global_step >= state.max_steps or control.should_training_stop):
            self.leaper.finish()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save beside the checkpoint."""
        if self.leaper is not None and state.is_world_process_zero:
            file = self._folder(args, state) / self.FILE
            with staged_file(file, replace=True) as temporary:
                torch.save(self.leaper.state_dict(), temporary)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let go; where the best checkpoint was loaded, the weights are no longer the training's to judge."""
        if self._losses is not None:
            self._losses.close()
        if self.leaper is not None:
            self.leaper.detach()
            if not args.load_best_model_at_end:
                self.leaper.finish()

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
