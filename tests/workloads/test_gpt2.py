import json
import math
import pydoc_data.topics
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farcli import weights
from farcli.errors import UsageError
from farcli.training import TrainingRun, run_seed, workload_from
from farcli.workloads.gpt2 import Gpt2
from tests.workloads.small import counting

pytest.importorskip("transformers")
SEED = run_seed(0, 0)
ENGLISH = str(Path(pydoc_data.topics.__file__))
"""Half a megabyte of English that every Python brings along."""
TINY = {"data": ENGLISH, "layers": "1", "heads": "2", "width": "32", "context": "48", "windows": "8", "batch": "8"}


def tiny(**options: str) -> Gpt2:
    workload = workload_from("gpt2", TINY | options)
    assert isinstance(workload, Gpt2)
    return workload


def byte_pairs(folder: Path) -> Path:
    """A vocabulary of single bytes and three pairs, as GPT-2's files have it."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(exist_ok=True)
    pieces = [*sorted(ByteLevel.alphabet()), "th", "the", "Ġthe"]
    (folder / "encoder.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    return folder


def test_it_is_the_network_of_the_paper():
    options = {"layers": "12", "heads": "12", "width": "768", "context": "64", "positions": "1024"}
    workload = tiny(**options)
    with torch.device("meta"):  # shapes only
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config.from_dict(workload._architecture | {"vocab_size": 50257}))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_tied_weights_are_one_tensor_of_the_layout():
    run = TrainingRun(tiny(), [SEED])
    assert run.layout.tied == (("lm_head.weight", "transformer.wte.weight"),)
    assert run.layout.size == sum(parameter.numel() for parameter in run.model.parameters())
    run.advance(3)
    state = run.model.state_dict()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    other = tiny().model([run_seed(0, 1)])
    weights.load(other, run.layout, run.vectors()[0])
    assert torch.equal(other.state_dict()["lm_head.weight"], state["lm_head.weight"])


def test_initialisation_is_that_of_gpt2():
    model = tiny(layers="8", width="128").model([SEED])
    state = model.state_dict()
    assert float(state["transformer.wte.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(state["transformer.h.3.attn.c_attn.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(state["transformer.h.3.mlp.c_proj.weight"].std()) == pytest.approx(0.02 / 4, rel=0.02)  # √(2·8) = 4
    assert not state["transformer.h.3.mlp.c_fc.bias"].any()


def test_a_window_is_followed_by_its_own_next_tokens():
    whole = Path(ENGLISH).read_bytes()
    workload = tiny()
    for tokens, following in islice(workload.batches([SEED]), 5):
        assert tokens.shape == following.shape == (8, 48)
        for window, after in zip(tokens, following, strict=True):
            piece = bytes(window.tolist()) + bytes(after[-1:].tolist())
            assert torch.equal(window[1:], after[:-1])
            assert piece in whole[: len(whole) * 91 // 100]


def test_the_future_is_hidden():
    model = tiny().model([SEED]).eval()
    tokens, _ = next(tiny().batches([SEED]))
    changed = tokens.clone()
    changed[:, 30:] = 7
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(a[:, :30], b[:, :30])
    assert not torch.allclose(a[:, 30:], b[:, 30:])


def test_the_first_loss_is_that_of_a_uniform_guess_and_chance_knows_the_frequencies():
    workload = tiny(windows="200")
    assert workload.evaluate(workload.model([SEED]), SEED)["loss"] == pytest.approx(math.log(256), rel=0.05)
    whole = np.frombuffer(Path(ENGLISH).read_bytes(), np.uint8)
    train, held_out = np.split(whole, [len(whole) * 9 // 10])
    frequency = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
    chance = workload.chance()
    assert chance["loss"] == pytest.approx(-np.log(frequency)[held_out].mean(), rel=0.05)
    assert chance["accuracy"] == pytest.approx((held_out == frequency.argmax()).mean(), rel=0.1)
    assert bytes([int(frequency.argmax())]) == b" "


def test_it_learns_english():
    workload = tiny(lr="0.003", windows="64")  # at .01 the order of sums decides over .1 of loss
    run = TrainingRun(workload, [SEED])
    run.advance(180)
    measured, chance = workload.evaluate(run.model, SEED), workload.chance()
    assert measured["loss"] < chance["loss"] - 0.5
    assert measured["accuracy"] > chance["accuracy"] + 0.05


def test_held_out_windows_are_spread_over_the_held_out_text(tmp_path: Path):
    path = counting(tmp_path)
    workload = tiny(data=str(path), windows="5")
    tokens, following = workload._held_out
    held_out = path.read_bytes()[-len(path.read_bytes()) // 10 :]
    assert bytes(tokens[0].tolist()) in held_out
    assert bytes(following[-1].tolist()) == path.read_bytes()[-48:]
    assert len({bytes(window.tolist()) for window in tokens}) == 5
    assert workload.evaluation_cost() == pytest.approx(5 / 8 / 3)


@pytest.mark.parametrize(("windows", "context"), [("1", "48"), ("5", "7"), ("64", "48"), ("500", "48")])
def test_what_leaps_are_verified_on_shares_no_token_with_what_is_reported(windows: str, context: str):
    workload = tiny(windows=windows, context=context)
    workload._text_held_out = torch.arange(len(workload._text_held_out))  # each token is its own place
    last = len(workload._text_held_out) - int(context) - 1
    reported = {
        place + ahead for place in np.linspace(0, last, int(windows)).astype(int) for ahead in range(int(context) + 1)
    }
    draws = [workload.verification(SEED, draw, 4) for draw in range(3)]
    places = [
        int(place) for draw in draws for batch in draw for row in torch.cat(batch, 1) for place in set(row.tolist())
    ]
    assert len(places) == 3 * 4 * 8 * (int(context) + 1) == len(set(places))
    assert not reported & set(places)
    assert max(places) < len(workload._text_held_out)


def test_text_that_comes_again_is_not_verified_on(tmp_path):
    """A held-out text of one passage over and over, and a passage of its own at the end."""
    passage, own = bytes(range(65, 65 + 49)), bytes(range(150, 150 + 49))
    (tmp_path / "train.txt").write_bytes(bytes(range(32, 128)) * 20)
    (tmp_path / "held.txt").write_bytes(passage * 6 + own + passage)
    workload = tiny(data=str(tmp_path / "train.txt"), held_out=str(tmp_path / "held.txt"), windows="2", context="48")
    ((tokens, _),) = workload.verification(SEED, 0, 1)
    assert {bytes(row.tolist()) for row in tokens} == {own[:48]}
    (tmp_path / "held.txt").write_bytes((bytes(range(32, 128)) * 20)[:500])
    with pytest.raises(UsageError, match="trained on"):
        tiny(data=str(tmp_path / "train.txt"), held_out=str(tmp_path / "held.txt"), windows="2").verification(
            SEED, 0, 1
        )


def test_windows_without_room_between_them_are_told_how_many_would_leave_some():
    with pytest.raises(UsageError, match="windows=2000 of 48 tokens leave no room") as caught:
        tiny(windows="2000").verification(SEED, 0, 1)
    assert caught.value.hint is not None
    fewer = caught.value.hint.removesuffix(".").rpartition("=")[2]
    assert tiny(windows=fewer).verification(SEED, 0, 1)


def test_dropout_is_drawn_from_the_seed():
    workload = tiny(dropout="0.2")
    first, again, other = (TrainingRun(workload, [seed]) for seed in (SEED, SEED, run_seed(0, 1)))
    losses = [run.advance(1)[0] for run in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    plain = TrainingRun(tiny(), [SEED])
    assert plain.advance(1)[0] != losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_number_formats(dtype: str):
    workload = tiny(dtype=dtype)
    run = TrainingRun(workload, [SEED])
    before = workload.evaluate(run.model, SEED)["loss"]
    run.advance(20)
    assert {tensor.dtype for tensor in run.model.state_dict().values()} == {getattr(torch, dtype)}
    assert workload.evaluate(run.model, SEED)["loss"] < before - 0.5


def test_byte_pairs_from_files(tmp_path: Path):
    (tmp_path / "own.txt").write_text("the other \u00fcber-the\n" * 50, encoding="utf-8")
    folder = byte_pairs(tmp_path / "bpe")
    workload = tiny(data=str(tmp_path / "own.txt"), tokens="bpe", vocabulary=str(folder), context="4")
    pieces = {number: piece for piece, number in json.loads((folder / "encoder.json").read_text()).items()}
    text = [pieces[number] for number in workload._train.tolist()[:13]]
    assert text == ["the", "Ġ", "o", "the", "r", "Ġ", "Ã", "¼", "b", "e", "r", "-", "the"]
    assert workload.model([SEED]).get_parameter("transformer.wte.weight").shape[0] == 259


def test_gpt2s_own_vocabulary():
    try:
        workload = tiny(tokens="bpe", context="16")
    except UsageError as error:
        pytest.skip(str(error))
    assert workload.model([SEED]).get_parameter("transformer.wte.weight").shape[0] == 50257
    from farcli.workloads.gpt2 import _byte_pairs

    encode, size = _byte_pairs(workload.config)
    assert size == 50257
    assert encode(b"Hello world").tolist() == [15496, 995]  # as OpenAI's own encoder has it


def test_a_pretrained_network_is_loaded_as_it_is(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = byte_pairs(tmp_path / "hub")
    sizes = {"vocab_size": 259, "n_layer": 2, "n_head": 2, "n_embd": 24, "n_positions": 40}
    with torch.random.fork_rng(devices=[]):
        original = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    (folder / "config.json").write_text(json.dumps(original.config.to_dict()))
    save_file(original.transformer.state_dict(), folder / "model.safetensors")  # without prefix, as OpenAI's is
    workload = workload_from("gpt2", {"data": ENGLISH, "pretrained": str(folder), "windows": "2"})
    config = workload.config
    assert isinstance(workload, Gpt2)
    assert (config.layers, config.heads, config.width, config.context, config.tokens) == (2, 2, 24, 40, "bpe")
    assert config.lr == 5e-5
    model = workload.model([SEED]).eval()
    tokens = next(workload.batches([SEED]))[0]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), workload.model([1]).parameters(), strict=True))
    adapted = workload_from("gpt2", {"data": ENGLISH, "pretrained": str(folder), "windows": "2", "adapters": "3"})
    run = TrainingRun(adapted, [SEED])
    with torch.no_grad():
        assert torch.equal(run.model(tokens).logits, original(tokens).logits)
    assert run.layout.size == sum(p.numel() for p in run.model.parameters()) == 2 * 2 * 2 * 3 * 24
    q, k, v = run.model.get_submodule("transformer.h.0.attn.c_attn")(torch.ones(1, 24)).chunk(3, dim=-1)
    run.advance(3)
    new = run.model.get_submodule("transformer.h.0.attn.c_attn")(torch.ones(1, 24)).chunk(3, dim=-1)
    assert [torch.equal(*pair) for pair in zip((q, k, v), new, strict=True)] == [False, True, False]
    shorter = workload_from("gpt2", {"data": ENGLISH, "pretrained": str(folder), "context": "8"})
    assert next(shorter.batches([SEED]))[0].shape == (16, 8)
    for options, message in (
        ({"width": "32"}, "has width=24, not 32"),
        ({"context": "41"}, "context=41 tokens, but there are 40 positions"),
    ):
        with pytest.raises(UsageError, match=message):
            workload_from("gpt2", {"data": ENGLISH, "pretrained": str(folder)} | options)
    save_file({name: t for name, t in original.state_dict().items() if name[:2] != "lm"}, folder / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(workload.model([SEED]).eval()(tokens).logits, original(tokens).logits)
    state = original.transformer.state_dict()
    save_file({name: t for name, t in state.items() if name != "h.1.ln_2.bias"}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"has no tensor 'transformer\.h\.1\.ln_2\.bias'"):
        workload.model([SEED])
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="is a network of type 'bert', expected 'gpt2'"):
        workload_from("gpt2", {"data": ENGLISH, "pretrained": str(folder)})


def test_a_head_of_its_own_is_loaded_too(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 24, "n_positions": 40}
    with torch.random.fork_rng(devices=[]):
        original = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    (tmp_path / "config.json").write_text(json.dumps(original.config.to_dict()))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    workload = workload_from("gpt2", {"data": ENGLISH, "pretrained": str(tmp_path), "tokens": "bytes"})
    run = TrainingRun(workload, [SEED])
    assert run.layout.tied == ()
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in run.model.state_dict().items())


def test_a_recording_knows_its_text_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = counting(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tiny(data="counting.txt").config
    assert isinstance(config, Gpt2.Config)
    assert config.data == str(path)
    assert config.digest is not None
    tiny(data=str(path), digest=config.digest)
    path.write_text(path.read_text() + "one more line\n")
    with pytest.raises(UsageError, match=f"but {config.digest} is asked for"):
        tiny(data=str(path), digest=config.digest)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="transformers") as caught:
        tiny()
    assert caught.value.hint == "pip install 'farcli[text]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "0"}, "layers=0"),
        ({"width": "33"}, "width=33 cannot be divided by heads=2"),
        ({"dropout": "1"}, "dropout=1"),
        ({"adapters": "2"}, "adapters=2, expected 0, or more with pretrained=FOLDER"),
        ({"positions": "20"}, "context=48 tokens, but there are 20 positions"),
        ({"context": "9999999"}, "expected more than context=9999999"),
        ({"data": "nowhere.txt"}, "there is no such file; the names are shakespeare, wikitext2"),
        ({"held_out": "nowhere.txt"}, "held_out=nowhere.txt"),
        ({"tokens": "bytes", "vocabulary": "x"}, "tokens=bytes and vocabulary"),
        ({"pretrained": "nowhere"}, "nowhere: cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        tiny(**options)
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused_as_byte_pairs(tmp_path: Path):
    (tmp_path / "own.bin").write_bytes(b"\xff\xfe" * 400)
    with pytest.raises(UsageError, match="is not UTF-8"):
        tiny(data=str(tmp_path / "own.bin"), tokens="bpe", vocabulary=str(byte_pairs(tmp_path / "bpe")))
    tiny(data=str(tmp_path / "own.bin"))
