"""The update rules of `torch.optim`, as plain functions of weights, gradient and state: batched, in any precision.

Shape suffixes: leading axes are a batch; D coordinates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args, get_type_hints

import torch
from torch import Tensor

RuleName = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
_TINY = 1e-60
"""Below a square root, so that a gradient of exactly 0 has a derivative."""

State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRule:
    """An optimiser and its constants, which do not change during training.

    Attributes:
        name: which rule.
        lr: learning rate.
        weight_decay: decoupled for adamw, else added to the gradient.
        momentum: of sgd, without dampening.
        betas: of adam and adamw.
        alpha: of rmsprop.
        eps: of all but sgd.
    """

    name: RuleName
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    alpha: float = 0.99
    eps: float = 1e-8

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Self | None:
        """The rule of an optimiser; None where it is no plain one of these, does nothing, or has groups that differ."""
        name = type(optimizer).__name__.lower()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        first = groups[0]
        refined = ("nesterov", "amsgrad", "maximize", "centered", "dampening", "lr_decay", "initial_accumulator_value")
        if name not in get_args(RuleName) or any(group != first for group in groups):
            return None
        if (
            not first["lr"] > 0
            or any(first.get(key) for key in refined)
            or (name == "rmsprop" and first.get("momentum"))
        ):
            return None
        known = {key: first[key] for key in get_type_hints(cls) if key in first}
        return cls(name=name, **{key: _plain(value) for key, value in known.items()})  # pyright: ignore[reportArgumentType]

    @property
    def text(self) -> str:
        """As typed: "adam lr=0.01 weight_decay=0.0 …"; `parse` reads it."""
        values = {**asdict(self), "betas": ":".join(map(str, self.betas))}
        return " ".join([str(values.pop("name")), *(f"{key}={value}" for key, value in values.items())])

    def apart_from(self, other: "UpdateRule") -> str:
        """Its name, and the constants that the other does not share, of another kind the rate alone: "sgd lr=0.1"."""
        own, theirs = asdict(self), asdict(other)
        named = [key for key in own if key != "name"] if self.name == other.name else ["lr"]
        return " ".join([self.name, *(f"{key}={own[key]}" for key in named if own[key] != theirs[key])])

    @classmethod
    def parse(cls, text: str) -> Self:
        """The rule of a text like "sgd lr=0.1 momentum=0.9".

        Raises:
            ValueError: it is no such text.
        """
        name, *rest = text.split()
        if name not in get_args(RuleName):
            raise ValueError(f"optimizer {name!r}, expected one of {', '.join(get_args(RuleName))}.")
        values: dict[str, Any] = {}
        for part in rest:
            key, _, value = part.partition("=")
            if key == "name" or key not in get_type_hints(cls):
                raise ValueError(
                    f"optimizer constant {key!r}, expected lr, weight_decay, momentum, betas, alpha or eps."
                )
            numbers = tuple(float(number) for number in value.split(":"))
            values[key] = numbers if key == "betas" else numbers[0]
        if not values.get("lr", 0.0) > 0:
            raise ValueError(f"optimizer {text!r}: expected a learning rate above 0, as in {name} lr=0.01.")
        return cls(name=name, **values)  # pyright: ignore[reportArgumentType]

    def step(self, weights: Tensor, gradient: Tensor, state: State, count: int) -> tuple[Tensor, State]:
        """One update.

        Args:
            weights: [..., D].
            gradient: [..., D].
            state: what the update before returned; empty at the first.
            count: number of this update, from 1.

        Returns:
            Weights and state after it.
        """
        if self.name == "adamw":
            weights = weights * (1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * weights
        match self.name:
            case "sgd":
                if not self.momentum:
                    return weights - self.lr * gradient, ()
                velocity = self.momentum * state[0] + gradient if state else gradient
                return weights - self.lr * velocity, (velocity,)
            case "adam" | "adamw":
                one, two = self.betas
                first = (one * state[0] if state else 0.0) + (1 - one) * gradient
                second = (two * state[1] if state else 0.0) + (1 - two) * gradient * gradient
                scale = _root(second / (1 - two**count)) + self.eps
                return weights - self.lr / (1 - one**count) * first / scale, (first, second)
            case "rmsprop":
                second = (self.alpha * state[0] if state else 0.0) + (1 - self.alpha) * gradient * gradient
                return weights - self.lr * gradient / (_root(second) + self.eps), (second,)
            case "adagrad":
                total = (state[0] if state else 0.0) + gradient * gradient
                return weights - self.lr * gradient / (_root(total) + self.eps), (total,)


def roll(rule: UpdateRule, start: Tensor, marks: Sequence[int], gradient: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Run an optimiser: weights after each count of updates in `marks`, [..., marks, D].

    Args:
        rule: the optimiser.
        start: w_0, [..., D].
        marks: increasing counts of updates.
        gradient: the gradient at given weights, for the update of a given number, from 1.
    """
    weights, found = start, []
    held: State = ()
    for count in range(1, marks[-1] + 1):
        weights, held = rule.step(weights, gradient(weights, count), held, count)
        if count in marks:
            found.append(weights)
    return torch.stack(found, dim=-2)


def _root(values: Tensor) -> Tensor:
    return values.clamp(min=_TINY).sqrt()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(float(each) for each in value)
    return float(value)
