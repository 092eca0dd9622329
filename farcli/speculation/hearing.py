"""A training's losses, heard where its gradients begin."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Losses:
    """Hears the loss of every `backward`: on a batch that has not been trained on yet.

    Several between two steps (micro-batches, closures) are averaged. What a gradient scaler multiplies is heard as
    it was before. Gradients given to `backward` by hand, as by checkpointing, belong to no loss.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._undo: list[Callable[[], None]] = []
        self._open = True
        self._wrap(torch.autograd, "backward", self._listening)
        self._wrap(torch.amp.GradScaler, "scale", self._remembering)

    def take(self) -> Tensor | None:
        """The mean since the last call; None where nothing was heard."""
        total, count = self._sum, self._count
        self._sum, self._count = None, 0
        return None if total is None else total / count

    def close(self) -> None:
        """Listen no more."""
        self._open = False
        while self._undo:
            self._undo.pop()()
        self.take()

    def _wrap(self, owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        from torch._compile import _disable_dynamo

        before = getattr(owner, name)
        wrapped = functools.wraps(before)(_disable_dynamo(wrapper(before)))
        setattr(owner, name, wrapped)

        def undo() -> None:
            if getattr(owner, name) is wrapped:  # else somebody has wrapped us: we stay, and are silent
                setattr(owner, name, before)

        self._undo.append(undo)

    def _listening(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def listening(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> Any:
            if self._open and grad_tensors is None:
                self._add(tensors)
            return backward(tensors, grad_tensors, *args, **options)

        return listening

    def _remembering(self, scale: Callable[..., Any]) -> Callable[..., Any]:
        def remembering(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            if self._open and isinstance(scaled, Tensor) and isinstance(outputs, Tensor):
                scaled._farcli_unscaled = outputs.detach()  # pyright: ignore[reportAttributeAccessIssue]
            return scaled

        return remembering

    def _add(self, tensors: Any) -> None:
        loss = tensors[0] if isinstance(tensors, tuple | list) and len(tensors) == 1 else tensors
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        value = getattr(loss, "_farcli_unscaled", loss).detach().reshape(()).float()
        # A copy: scripts average a loss over processes in place, to log it.
        self._sum = value.clone() if self._sum is None else self._sum + value
        self._count += 1
