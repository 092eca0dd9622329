"""The other doors to the same recorder: `farcli.Recorder`, checkpoints; and what the command line refuses."""

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import farcli
from farcli.errors import StoreError, UsageError
from farcli.recording.background import read_journal
from farcli.recording.checkpoints import step_of
from farcli.recording.plan import Plan
from farcli.store import Trajectory, TrajectoryWriter
from farcli.verbs.record_checkpoints import record_checkpoints
from farcli.verbs.record_command import expand_output
from tests.recording.conftest import environment, same, state_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = model(torch.randn(16, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class TestRecorder:
    def test_any_loop(self, tmp_path):
        model = net()
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters())
        with farcli.Recorder(model, optimizer, tmp_path / "a.zarr", every=4, header={"note": "mine"}) as recorder:
            train(model, optimizer, 6)
            recorder.loss(0.25)
            train(model, optimizer, 3)
        train(model, optimizer, 5)  # not recorded any more
        store = Trajectory.open(tmp_path / "a.zarr")
        assert store.steps == [0, 4, 8, 9]
        assert same(state_of(store, 0), first)
        assert store.header["note"] == "mine"
        assert read_journal(store.path)[8]["loss"] == 0.25

    def test_the_random_numbers_of_the_training_are_its_own(self, tmp_path):
        finals = []
        for recorded in (False, True):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if recorded:
                with farcli.Recorder(model, optimizer, tmp_path / "a.zarr", every=1):
                    train(model, optimizer, 5)
            else:
                train(model, optimizer, 5)
            finals.append(model.state_dict())
        assert same(*finals)

    def test_several_networks_by_name(self, tmp_path):
        a, b = net(), nn.Linear(2, 2)
        optimizers = [torch.optim.SGD(a.parameters()), torch.optim.SGD(b.parameters())]
        with farcli.Recorder({"a": a, "b": b}, optimizers, tmp_path / "a.zarr"):
            train(a, optimizers[0], 2)
        state = state_of(Trajectory.open(tmp_path / "a.zarr"))
        assert same(state, {**a.state_dict(prefix="a."), **b.state_dict(prefix="b.")})

    def test_an_exception_leaves_an_unfinished_store_that_resumes(self, tmp_path):
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        with pytest.raises(ZeroDivisionError), farcli.Recorder(model, optimizer, tmp_path / "a.zarr", every=2):  # noqa: PT012
            train(model, optimizer, 5)
            raise ZeroDivisionError
        assert Trajectory.open(tmp_path / "a.zarr", partial=True).steps == [0, 2, 4, 5]
        with farcli.Recorder(model, optimizer, tmp_path / "a.zarr", every=2, resume=True) as recorder:
            assert recorder.step == 5
            train(model, optimizer, 2)
        store = Trajectory.open(tmp_path / "a.zarr")
        assert store.steps == [0, 2, 4, 5, 6, 7]
        assert same(state_of(store), model.state_dict())

    def test_errors_are_raised_where_they_are_made(self, tmp_path):
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        (tmp_path / "a.zarr").mkdir()
        (tmp_path / "a.zarr/file").touch()
        with pytest.raises(UsageError, match="already exists"), farcli.Recorder(model, optimizer, tmp_path / "a.zarr"):
            pass
        with pytest.raises(UsageError, match="matches --params"):  # noqa: SIM117
            with farcli.Recorder(model, optimizer, tmp_path / "b.zarr", params=["nothing*"]):
                pass
        with pytest.raises(UsageError, match="at least 1"):
            farcli.Recorder(model, optimizer, tmp_path / "b.zarr", every=0)
        assert not (tmp_path / "b.zarr").exists()

    def test_float64_is_kept_or_rounded_as_asked(self, tmp_path):
        model = nn.Linear(3, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with farcli.Recorder(model, optimizer, tmp_path / "a.zarr"):
            pass
        with farcli.Recorder(model, optimizer, tmp_path / "b.zarr", dtype="float32"):
            pass
        a, b = (Trajectory.open(tmp_path / name) for name in ("a.zarr", "b.zarr"))
        assert (a.dtype, b.dtype) == ("float64", "float32")
        assert same(state_of(a), model.state_dict())
        assert torch.equal(state_of(b)["weight"], model.weight.detach().float().double())

    def test_rounded_to_bfloat16_on_request_and_said(self, tmp_path):
        model = nn.Linear(300, 20)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with farcli.Recorder(model, optimizer, tmp_path / "a.zarr", dtype="bfloat16"):
            pass
        stored = Trajectory.open(tmp_path / "a.zarr")
        assert torch.equal(state_of(stored)["weight"], model.weight.detach().bfloat16().float())
        assert not torch.equal(state_of(stored)["weight"], model.weight.detach())
        assert stored.header["recording"]["rounded"] == "bfloat16"

    @pytest.mark.parametrize(
        ("kind", "rounding"), [(torch.float32, "bfloat16"), (torch.bfloat16, "keep"), (torch.float64, "keep")]
    )
    def test_moments_are_never_stored_in_half_precision(self, tmp_path, kind, rounding):
        model = nn.Linear(30, 20).to(kind)
        optimizer = torch.optim.AdamW(model.parameters())
        with farcli.Recorder(model, optimizer, tmp_path / "a.zarr", every=2, with_optimizer=True, dtype=rounding):
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(8, 30, dtype=kind)).square().mean().backward()
                optimizer.step()
        moments = Trajectory.open(tmp_path / "a.zarr/optimizer.zarr")
        assert moments.steps == [2, 4]
        assert moments.dtype == ("float64" if kind == torch.float64 else "float32")
        names: dict[torch.Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
        wanted = {
            f"{names[tensor]}.{key}": state[key]
            for tensor, state in optimizer.state.items()
            for key in ("exp_avg", "exp_avg_sq")
        }
        assert same(state_of(moments), wanted)


def test_a_plan_survives_its_environment_variable():
    plan = Plan(output="x {rank}.zarr", at=(0, 1, 5), params=("!a*",), command=("python", "t.py"), seed=3)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 50, 100, 150]),
        ({"every": 60}, [0, 60, 120, 180]),
        ({"at": (3, 7)}, [3, 7]),
        ({"log_spaced": 1}, [0, 1, 10, 100]),
        ({"log_spaced": 3, "steps": 100}, [0, 1, 10, 100]),
    ],
)
def test_schedules(options, steps):
    schedule = Plan(output="x", **options).schedule()
    assert [step for step in range(200) if schedule.due(step)] == steps


def test_names_of_outputs():
    known = {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "4"}
    filled = expand_output("{job}-{task}-{seed}-{rank}.zarr", seed=2, environment=known)
    assert filled == "71-4-2-{rank}.zarr"
    assert expand_output("{rank}", seed=None, environment={"RANK": "3"}) == "3"
    assert expand_output("{date}", seed=None) == time.strftime("%Y%m%d")
    for template in ("{job}", "{task}", "{seed}", "{host}", "{}"):
        with pytest.raises(UsageError, match="-o"):
            expand_output(template, seed=None, environment={})
    assert expand_output("{rank}", seed=None, environment={}) == "{rank}"  # its processes know theirs
    with pytest.raises(UsageError, match="needs RANK, which is not set"):
        expand_output("{rank}", seed=None, launches=False, environment={})


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("checkpoint-500", 500),
            ("epoch=3-step=400.ckpt", 400),
            ("ckpt_000120.pt", 120),
            ("model_7.safetensors", 7),
            ("global_step88_v2", 88),
        ],
    )
    def test_steps_from_names(self, tmp_path, name, step):
        assert step_of(tmp_path / name) == step

    def test_every_layout(self, tmp_path):
        states = {}
        for step in (100, 20, 3, 50, 70, 80):
            model = net()
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), step % 7 + 1)
            states[step] = model.state_dict()
        save_file(states[3], tmp_path / "step3.safetensors")
        torch.save(states[20], tmp_path / "step20.pt")
        torch.save({"state_dict": states[50], "epoch": 3, "optimizer_states": []}, tmp_path / "epoch=3-step=50.ckpt")
        for step in (70, 80, 100):
            (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(states[70], tmp_path / "checkpoint-70/model.safetensors")
        torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "checkpoint-70/optimizer.pt")
        names = sorted(states[80])
        save_file({n: states[80][n] for n in names[:3]}, tmp_path / "checkpoint-80/model-1.safetensors")
        save_file({n: states[80][n] for n in names[3:]}, tmp_path / "checkpoint-80/model-2.safetensors")
        index = {n: f"model-{1 if n in names[:3] else 2}.safetensors" for n in names}
        (tmp_path / "checkpoint-80/model.safetensors.index.json").write_text(
            f'{{"weight_map": {str(index)!s}}}'.replace("'", '"')
        )
        torch.save({f"module.{n}": t for n, t in states[100].items()}, tmp_path / "checkpoint-100/pytorch_model.bin")
        row = record_checkpoints(
            [str(tmp_path / pattern) for pattern in ("step*", "*.ckpt", "checkpoint-*")], tmp_path / "a.zarr"
        )
        store = Trajectory.open(tmp_path / "a.zarr")
        assert (row["snapshots"], row["first_step"], row["last_step"]) == (6, 3, 100)
        assert store.steps == sorted(states)
        assert all(same(state_of(store, step), state) for step, state in states.items())
        assert {slot.name for slot in store.layout.slots if slot.role == "buffer"} == {
            "1.running_mean",
            "1.running_var",
        }

    def test_unequal_and_missing_tensors_leave_nothing(self, tmp_path):
        save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, tmp_path / "step1.safetensors")
        for state, text in (
            ({"a": torch.zeros(4), "b": torch.zeros(2)}, "its tensor 'a' is float32\\[4\\]"),
            ({"a": torch.zeros(3)}, "lacks the tensor 'b'"),
            ({"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}, "has a tensor 'c'"),
            ({"a": torch.zeros(3), "b": torch.zeros(2).half()}, "is float16"),
        ):
            save_file(state, tmp_path / "step2.safetensors")
            with pytest.raises(StoreError, match=text):
                record_checkpoints([str(tmp_path / "step*")], tmp_path / "a.zarr")
        assert sorted(os.listdir(tmp_path)) == ["step1.safetensors", "step2.safetensors"]

    def test_no_code_of_a_pickle_is_run(self, tmp_path, farcli):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"model": Bomb()}, tmp_path / "step1.pt")
        (tmp_path / "step2.pt").write_bytes(pickle.dumps(Bomb()))
        for name in ("step1.pt", "step2.pt"):
            outcome = farcli("record", "--from", name, "-o", "a.zarr", cwd=tmp_path)
            assert outcome.code == 3
            assert len([line for line in outcome.err.splitlines() if line.startswith("farcli: error: ")]) == 1
            assert "Traceback" not in outcome.err
        assert "wants to run code" in farcli("record", "--from", "step1.pt", "-o", "a.zarr", cwd=tmp_path).err
        assert sorted(os.listdir(tmp_path)) == ["step1.pt", "step2.pt"]

    def test_names_and_folders_that_say_nothing(self, tmp_path):
        with pytest.raises(StoreError, match="matches no checkpoint"):
            record_checkpoints([str(tmp_path / "nothing*")], tmp_path / "a.zarr")
        (tmp_path / "step1").mkdir()
        with pytest.raises(StoreError, match=r"holds no weights|matches no checkpoint"):
            record_checkpoints([str(tmp_path / "step1")], tmp_path / "a.zarr")
        save_file({"a": torch.zeros(1)}, tmp_path / "best.safetensors")
        with pytest.raises(StoreError, match="tells no step"):
            record_checkpoints([str(tmp_path / "best*")], tmp_path / "a.zarr")
        save_file({"a": torch.zeros(1)}, tmp_path / "x1.safetensors")
        save_file({"a": torch.zeros(1)}, tmp_path / "y1.safetensors")
        with pytest.raises(StoreError, match="tells step 1, as"):
            record_checkpoints([str(tmp_path / "*1.safetensors")], tmp_path / "a.zarr")
        (tmp_path / "z2.safetensors").write_bytes(b"garbage")
        with pytest.raises(StoreError, match="damaged or no checkpoint"):
            record_checkpoints([str(tmp_path / "z2.safetensors")], tmp_path / "a.zarr")

    def test_resume_and_force(self, tmp_path):
        for step in (1, 2, 3):
            save_file({"a": torch.full((3,), float(step))}, tmp_path / f"step{step}.safetensors")
        pattern = [str(tmp_path / "step[12]*")]
        record_checkpoints(pattern, tmp_path / "a.zarr")
        with pytest.raises(UsageError, match="already exists"):
            record_checkpoints(pattern, tmp_path / "a.zarr")
        record_checkpoints([str(tmp_path / "step*")], tmp_path / "a.zarr", resume=True)
        assert Trajectory.open(tmp_path / "a.zarr").steps == [1, 2, 3]
        record_checkpoints(pattern, tmp_path / "a.zarr", replace=True)
        assert Trajectory.open(tmp_path / "a.zarr").steps == [1, 2]


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (("record", "-o", "a.zarr", "--", "no-such-program-at-all"), "no-such-program-at-all: no such command"),
            (("record", "-o", "a.zarr", "--"), "no command behind"),
            (("record", "-o", "a.zarr"), "nothing to record"),
            (("record", "-o", "a.zarr", "linreg", "--", "true"), "give one of"),
            (("record", "-o", "a.zarr", "linreg", "true"), "unexpected 'true'"),
            (("record", "-o", "a.zarr", "--runs", "2", "--", "true"), "--runs does not go with a command"),
            (("record", "-o", "a.zarr", "--with-optimizer", "linreg"), "SGD, keeps no moments"),
            (("record", "-o", "a.zarr", "--every", "0", "--", "true"), "--every 0"),
            (("record", "-o", "a.zarr", "--every", "2", "--at", "1,2", "--", "true"), "contradict"),
            (("record", "-o", "a.zarr", "--at", "2,1", "--", "true"), "ascending"),
            (("record", "-o", "a.zarr", "--dtype", "float16", "--", "true"), "--dtype 'float16'"),
            (("record", "-o", "{task}.zarr", "--", "true"), "SLURM_ARRAY_TASK_ID"),
            (("record", "-o", "{rank}.zarr", "linreg"), "{rank} needs RANK"),
            (("record", "-o", "exists.zarr", "--", "true"), "already exists"),
            (("record", "-o", "exists.zarr", "--force", "--", "true"), "not a trajectory store"),
        ],
    )
    def test_usage(self, farcli, tmp_path, words, text):
        (tmp_path / "exists.zarr").mkdir()
        (tmp_path / "exists.zarr/file").touch()
        outcome = farcli(*words, cwd=tmp_path)
        assert outcome.code == 2
        errors = [line for line in outcome.err.splitlines() if line.startswith("farcli: error: ")]
        assert len(errors) == 1, outcome.err
        assert text in errors[0]
        assert os.listdir(tmp_path) == ["exists.zarr"]

    def test_a_store_that_another_process_writes(self, farcli, tmp_path):
        script = (
            "import sys, time; from farcli.store import TrajectoryWriter; from farcli.layout import layout_of;"
            "w = TrajectoryWriter.create('a.zarr', layout_of([('w', (2,), 'float32', 'parameter')]), [0]);"
            "print('open', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment()
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for options in ((), ("--resume",), ("--force",)):
                outcome = farcli("record", "-o", "a.zarr", *options, "--", "true", cwd=tmp_path)
                assert outcome.code == 2
                assert f"is being written by process {process.pid}" in outcome.err
            process.kill()

    def test_what_cannot_be_resumed(self, farcli, tmp_path):
        (tmp_path / "notes").mkdir()
        assert farcli("record", "-o", "notes", "--resume", "--", "true", cwd=tmp_path).code == 3
        assert farcli("record", "-o", "new.zarr", "--resume", "--", "true", cwd=tmp_path).code == 0

    def test_the_command_keeps_its_words_its_process_id_and_its_code(self, tmp_path):
        with subprocess.Popen(
            [sys.executable, "-m", "farcli", "record", "-o", "a.zarr", "--", "sh", "-c", 'echo $$ "$@"; exit 5', "x",
             "-o", "--", "--help", ""],
            cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment(),
        ) as process:  # fmt: skip
            out, _ = process.communicate()
        assert out == f"{process.pid} -o -- --help \n"
        assert process.returncode == 5


def test_a_writer_can_go_back(tmp_path):
    from farcli.layout import layout_of

    for size in (5, 300_000):
        layout = layout_of([("w", (size,), "float32", "parameter"), ("n", (), "int64", "integer")])
        path = tmp_path / f"{size}.zarr"
        with TrajectoryWriter.create(path, layout, [0], sync="none") as writer:
            for step in range(6):
                writer.append(step, torch.full((size,), float(step)).numpy(), torch.tensor([step]).numpy(), run=0)
            writer.rewind(3)
            writer.append(9, torch.full((size,), 9.0).numpy(), torch.tensor([9]).numpy(), run=0)
            writer.finish()
        store = Trajectory.open(path)
        assert store.steps == [0, 1, 2, 9]
        assert store.read([0], store.steps)[0, :, -1].tolist() == [0, 1, 2, 9]
        assert [int(store.integers(0, step)[0]) for step in store.steps] == [0, 1, 2, 9]
        assert list(store.verify()) == []
