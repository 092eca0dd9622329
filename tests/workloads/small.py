"""Options that make each workload small enough for the contract, on data made here where the real ones are packages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

WORDS = [f"word{number}" for number in range(60)]
FEELINGS = ("good", "bad", "plain")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def small_options(name: str, folder: Path) -> dict[str, str]:
    """Options as typed; skips the test, by name, where a package is missing."""
    match name:
        case "gpt2":
            pytest.importorskip("transformers")
            return {
                "data": str(counting(folder)),
                "layers": "1",
                "heads": "2",
                "width": "32",
                "context": "32",
                "lr": "0.01",
                "windows": "128",
            }
        case "distilbert":
            pytest.importorskip("transformers")
            options = {"data": str(feelings(folder)), "pretrained": str(tiny_distilbert(folder)), "lr": "0.003"}
            return options | {"batch": "16", "length": "32", "sentences": "120", "held_back": "90"}
        case "digits-cnn":
            return {"held_back": "400"}
        case "image-mlp":
            return {"train": "900"}
        case "image-cnn":
            return {"data": "digits", "train": "900", "batch": "64", "lr": "0.01"}
        case "nas-cnn":
            cell = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|skip_connect~2|"
            options = {"arch": cell, "width": "8", "stride": "1", "optimizer": "adam", "lr": "0.01"}
            return {"data": "digits", "train": "900", "batch": "64"} | options
        case "vit":
            options = {"patch": "4", "hidden": "32", "depth": "1", "dropout": "0.1", "lr": "0.003"}
            return {"data": "digits", "train": "900", "batch": "64"} | options
        case _:
            return {}


def counting(folder: Path) -> Path:
    """Text that a small network learns: numbered lines."""
    path = folder / "counting.txt"
    path.write_text("".join(f"This is line {number:05d}.\n" for number in range(6000)))
    return path


def feelings(folder: Path) -> Path:
    """Sentences whose label is one of their words."""
    generator = np.random.default_rng(0)
    path = folder / "feelings.tsv"
    rows = []
    for number in range(1500):
        words = list(generator.choice(WORDS, 7))
        label = FEELINGS[number % 3]
        words.insert(int(generator.integers(8)), label)
        rows.append(f"{label}\t{' '.join(words)}\n")
    path.write_text("label\ttext\n" + "".join(rows))
    return path


def tiny_distilbert(folder: Path, **config: object) -> Path:
    """A folder with a DistilBERT as hubs hand it out, of random weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import DistilBertConfig, DistilBertModel

    place = folder / "tiny"
    place.mkdir()
    tokens = {token: number for number, token in enumerate((*SPECIAL, *FEELINGS, *WORDS))}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])]
    )
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(place / "tokenizer.json"))
    sizes = {"vocab_size": len(tokens), "max_position_embeddings": 32, "dim": 32, "n_layers": 1, "n_heads": 2}
    architecture = DistilBertConfig(**{**sizes, "hidden_dim": 64, **config})
    (place / "config.json").write_text(json.dumps(architecture.to_dict()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = DistilBertModel(architecture).state_dict()
    save_file(weights, place / "model.safetensors")
    return place
