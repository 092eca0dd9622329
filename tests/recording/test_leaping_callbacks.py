"""Leaping in other people's trainers: a training resumed from their checkpoints ends in the same bits."""

import pytest

from tests.recording.test_frameworks import HF, LIGHTNING

pytestmark = pytest.mark.slow

SAME = """
    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    rows = [[entry.row() for entry in each.leaper.entries] for each in made]
    assert rows[0] == rows[1]
    assert any(row["step"] < 13 for row in rows[0]) and any(row["step"] > 13 for row in rows[0]), rows[0]
    assert all(row["verdict"] in ("accepted", "rolled back") for row in rows[0]), rows[0]
    assert same(*models)
    assert not same(models[0], alone)
"""


def test_transformers_resumes_within_a_window(bench):
    pytest.importorskip("transformers")
    head, _, _ = HF.partition("    model = Model(PretrainedConfig())")
    bench.write(
        head
        + """
    from farcli.integrations.transformers import LeaperCallback
    data = [{"input": a, "labels": b} for a, b in zip(x, y)]
    models, made = [], []
    def run(resume, leap=True):
        torch.manual_seed(0)
        model = Model(PretrainedConfig())
        args = TrainingArguments("out", per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=24,
            use_cpu=True, report_to=[], save_steps=13, disable_tqdm=True, seed=1)
        callback = LeaperCallback(predictor="outer", every=2, window=6, freeze=0)
        Trainer(model, args, train_dataset=data, callbacks=[callback] if leap else []).train(
            resume_from_checkpoint="out/checkpoint-13" if resume else None)
        if leap:
            models.append(model)
            made.append(callback)
        return model
    run(False)
    assert os.path.exists("out/checkpoint-13/farcli-leaper.pt")
    state = torch.load("out/checkpoint-13/farcli-leaper.pt")
    assert state["window"] is not None and state["step"] == 13
    run(True)
    alone = run(False, leap=False)
"""
        + SAME
    )
    done = bench.plain()
    assert done.code == 0, done.err


def test_lightning_resumes_within_a_window(bench):
    pytest.importorskip("lightning")
    head, _, _ = LIGHTNING.partition("    data = torch.utils")
    bench.write(
        head
        + """
    from farcli.integrations.lightning import LeaperCallback
    # an epoch is a step: Lightning itself goes on exactly only from where an epoch ends
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), len(x))
    models, made = [], []
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.global_step == 13 and not os.path.exists("at13.ckpt"):
                trainer.save_checkpoint("at13.ckpt")
    def run(resume, leap=True):
        torch.manual_seed(0)
        model, callback = Model(), LeaperCallback(predictor="outer", every=2, window=6, freeze=0)
        trainer = L.Trainer(max_steps=24, accelerator="cpu", logger=False, enable_checkpointing=False,
            callbacks=[callback, Save()] if leap else [], enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(model, data, ckpt_path="at13.ckpt" if resume else None)
        if leap:
            models.append(model)
            made.append(callback)
        return model
    run(False)
    run(True)
    alone = run(False, leap=False)
"""
        + SAME
    )
    done = bench.plain()
    assert done.code == 0, done.err
