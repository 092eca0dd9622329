"""`farcli leap -- CMD`: real scripts, leapt with as real processes; what they print and end with is their own."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from farcli.errors import UsageError
from farcli.integrations.script import leap_section, read_ledger
from farcli.speculation.arrays import read_part, read_rows
from farcli.speculation.options import Leaping
from tests.conftest import PROGRAM
from tests.recording.conftest import Ran, environment, same

SCRIPT = """
    model = net()
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), {steps})
    torch.save(model.state_dict(), "final.pt")
    {ending}
"""
CHECKS = """
import torch
from torch import nn

def held_out(model):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)

def not_a_number(model):
    return float("nan")

def failing(model):
    raise KeyError("batch")
"""
EVERY = ("--predictors", "outer", "--every", 5, "--window", 10, "--leap", "compute=100", "--snapshots", 10)
HELD = (*EVERY, "--verify-budget", "100%", "--validate")
NONSENSE = ("--predictors", "linear", "--strength", "1e6", "--gate", "strict")


def leap(bench, *options, command=None, output="leap.zarr") -> Ran:
    words = [PROGRAM, "leap", "-o", output, *map(str, options), "--", *map(str, command or bench.python())]
    done = subprocess.run(
        words, cwd=bench.folder, env=environment(), capture_output=True, text=True, check=False, timeout=240
    )
    return Ran(bench.folder, done.returncode, done.stdout, done.stderr)


def written(bench, steps=30, ending="", checks=CHECKS):
    bench.write(SCRIPT.format(steps=steps, ending=ending))
    (bench.folder / "checks.py").write_text(checks)


def test_a_script_leaps_and_its_recording_ends_in_the_weights_it_saved(bench):
    written(bench, ending="sys.exit(7)")
    plain = bench.plain()
    ran = leap(bench, *EVERY)
    assert ran.code == 7
    assert ran.out != plain.out, "leaps change what comes after them"
    assert ran.out.splitlines()[:10] == plain.out.splitlines()[:10], "and nothing before"
    store = ran.store("leap.zarr", partial=True)
    assert store.steps == [0, 10, 20, 30]
    assert store.header["leap"]["predictors"] == ["outer"]
    assert same(ran.state(name="leap.zarr", partial=True), ran.saved())
    rows = read_ledger(store.path)
    assert [row["step"] for row in rows] == [10, 15, 20, 25, 30][: len(rows)]
    assert all(row["verdict"] in ("accepted", "rolled back", "unverified") for row in rows)
    assert all("training loss" in row["reason"] for row in rows if row["verdict"] != "unverified")
    account = read_rows(store.path)[0]
    assert account["proposals"] == len(rows)
    assert [row["step"] for row in read_part(store.path, "proposal")] == [row["step"] for row in rows]
    assert f"{len(rows)} leaps proposed in 30 steps" in ran.said[0]
    assert list(store.verify()) == []


def test_where_all_is_rejected_the_script_does_as_without_us(bench):
    written(bench)
    plain = bench.plain()
    saved = bench.folder / "final.pt"
    before = saved.read_bytes()
    ran = leap(bench, *HELD, "checks:held_out", *NONSENSE)
    assert (ran.code, ran.out) == (0, plain.out)
    assert saved.read_bytes() == before
    store = ran.store("leap.zarr")
    assert store.finished
    rows = read_ledger(store.path)
    assert len(rows) >= 4
    assert {row["verdict"] for row in rows} == {"rejected"}


@pytest.mark.parametrize(
    ("validate", "said"),
    [
        ("checks:failing", "raised KeyError"),
        pytest.param("checks:held", "module 'checks' has no 'held'", marks=pytest.mark.slow),
        pytest.param("chekcs:held_out", "cannot import 'chekcs'", marks=pytest.mark.slow),
        pytest.param("checks:not_a_number", "returned NaN", marks=pytest.mark.slow),
    ],
)
def test_a_validation_that_does_not_work_ends_leaping_and_nothing_else(bench, validate, said):
    written(bench)
    plain = bench.plain()
    before = (bench.folder / "final.pt").read_bytes()
    ran = leap(bench, *HELD, validate, "--gate", "strict")
    assert (ran.code, ran.out) == (0, plain.out)
    assert (bench.folder / "final.pt").read_bytes() == before
    assert said in ran.said[0]
    assert "leaping stopped, the training goes on" in ran.said[0]
    assert ran.store("leap.zarr").finished, "the recording has gone on"


@pytest.mark.slow
def test_strict_ends_the_training(bench):
    written(bench)
    ran = leap(bench, *HELD, "checks:failing", "--gate", "strict", "--strict")
    assert ran.code == 1
    assert "--strict ends the training" in ran.said[0]
    assert "6 " not in ran.out


def test_a_signal_within_a_window_kills_as_ever_and_keeps_the_ledger(bench):
    bench.write("""
    import time
    model = net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 100, lambda step: step == 23 and time.sleep(30))
    """)
    words = [PROGRAM, "leap", "-o", "leap.zarr", *map(str, EVERY), "--", *bench.python()]
    with subprocess.Popen(
        words, cwd=bench.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("23 "):
                time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert "stopped by signal 15; saved up to step 23" in err
    rows = [json.loads(line) for line in (bench.folder / "leap.zarr" / "ledger.ndjson").read_text().splitlines()]
    assert rows[-1]["verdict"] == "unverified"
    assert "ended before the verdict" in rows[-1]["reason"]
    assert "had no verdict yet" in err
    assert read_rows(bench.folder / "leap.zarr")[0]["proposals"] == len(rows)


@pytest.mark.slow
def test_python_that_ignores_us_runs_as_it_is(bench):
    written(bench)
    ran = leap(bench, *EVERY, command=[sys.executable, "-I", "train.py"])
    assert ran.code == 0
    assert "-I makes Python ignore PYTHONPATH" in ran.said[0]
    assert not (bench.folder / "leap.zarr").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"predictors": ["outre"]}, "Did you mean 'outer'"),
        ({"validate": "checks"}, "expected package.module:function"),
        ({"leaping": Leaping(gate="strict")}, "verifies on held-out data"),
        ({"settings": {"momentun": "0.5"}}, "momentum"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(words, said):
    given = {"predictors": ["outer"], "strengths": [1.0], "leaping": Leaping(), "settings": {}, "validate": None}
    leap_section(**given)
    with pytest.raises(UsageError, match=said):
        leap_section(**given | words)


def test_options_of_workloads_do_not_go_with_a_command(bench):
    written(bench)
    ran = leap(bench, "--control")
    assert (ran.code, ran.out) == (2, "")
    assert "--control does not go with a command" in ran.err
    assert not (bench.folder / "leap.zarr").exists()


@pytest.mark.slow
def test_a_module_whose_own_function_validates(bench):
    written(bench)
    text = (bench.folder / "train.py").read_text()
    (bench.folder / "train.py").write_text(text.replace("def train(", CHECKS + "\n\ndef train("))
    ran = leap(bench, *HELD, "train:held_out", command=[sys.executable, "-m", "train"])
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == 30, "the script was not imported a second time"
    assert any(row["loss_after"] is not None for row in read_ledger(bench.folder / "leap.zarr")), "it has validated"


@pytest.mark.slow
def test_with_the_number_of_steps_known_the_last_leaps_are_verified_in_time(bench):
    written(bench, steps=43)
    ran = leap(bench, *EVERY, "--steps", 43)
    rows = read_ledger(bench.folder / "leap.zarr")
    assert rows
    assert {row["verdict"] for row in rows} <= {"accepted", "rolled back"}
    assert max(row["verdict_step"] for row in rows) <= 43
    assert len(ran.said) == 1


@pytest.mark.slow
def test_a_gradient_scaler_is_heard_through(bench):
    bench.write("""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10)
    for step in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    """)
    ran = leap(bench, *EVERY)
    assert ran.code == 0, ran.err
    losses = [row["loss_after"] for row in read_ledger(bench.folder / "leap.zarr") if row["loss_after"] is not None]
    assert losses
    assert all(0 < loss < 3 for loss in losses)


@pytest.mark.slow
def test_optimizers_in_turn_leap_together_and_others_are_refused(bench):
    bench.write("""
    model = net()
    both = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[3].parameters(), lr=0.01)]
    for step in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        for optimizer in both[: 1 if len(sys.argv) > 1 and step % 2 else 2]:
            optimizer.step()
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = leap(bench, *EVERY)
    assert ran.code == 0, ran.err
    assert read_ledger(bench.folder / "leap.zarr")
    assert same(ran.state(name="leap.zarr"), ran.saved())
    ran = leap(bench, *EVERY, output="other.zarr", command=[sys.executable, "train.py", "odd"])
    assert ran.code == 0, ran.err
    assert "not stepped in turn" in ran.said[0]
    assert ran.store("other.zarr").finished


DDP = """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    torch.manual_seed(rank)
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), 40)
    torch.save(model.module.state_dict(), f"final{rank}.pt")
    dist.destroy_process_group()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERY, (*HELD, "checks:held_out"), (*HELD, "checks:only_on_rank_1")])
def test_all_processes_leap_alike_and_one_writes(bench, options):
    bench.write(DDP)
    (bench.folder / "checks.py").write_text(
        f"import os\n{CHECKS}\n\ndef only_on_rank_1(model):\n"
        "    return held_out(model) if os.environ['RANK'] == '0' else {}[1]\n"
    )
    ran = leap(bench, *options, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert same(ran.saved("final0.pt"), ran.saved("final1.pt"))
    assert same(ran.state(name="leap.zarr"), ran.saved("final0.pt"))
    stopped = [line for line in ran.said if "leaping stopped" in line]
    assert len(stopped) == ("rank_1" in str(options[-1]))
    if not stopped:
        assert read_ledger(bench.folder / "leap.zarr")
    assert not (bench.folder / "leap-2.zarr").exists()


@pytest.mark.slow
def test_sharded_weights_are_recorded_and_not_leapt_with(bench):
    from tests.recording.test_frameworks import FSDP

    bench.write(FSDP.replace("DESTROY", "dist.destroy_process_group()"))
    ran = leap(bench, *EVERY, "--snapshots", 3, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert sum("FSDP" in line for line in ran.said) == 1
    assert ran.store("leap.zarr").steps == [0, 3, 6, 7]
    assert same(ran.state(name="leap.zarr"), ran.saved())


CHECKPOINTED = """
    import os
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(5)
    taken = 0
    if "--resume" in sys.argv:
        saved = torch.load("checkpoint.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        order.set_state(saved["order"])
        taken = saved["step"]
    for step in range(taken + 1, 41):
        rows = torch.randint(0, 64, (16,), generator=order)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 23 and "--resume" not in sys.argv:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order.get_state()}
            torch.save(state | {"step": step}, "checkpoint.pt")
        if step == 31 and "--break" in sys.argv:
            os._exit(9)
    torch.save(model.state_dict(), "final.pt")
"""


def test_a_script_that_resumes_goes_on_leaping_bit_for_bit_within_a_window(bench):
    bench.write(CHECKPOINTED)
    (bench.folder / "checks.py").write_text(CHECKS)
    words = ("--predictors", "outer", "--every", 3, "--window", 12, "--snapshots", 10, "--leap", "compute=100")
    words = (*words, "--leap", "look=false", "--verify-budget", "100%", "--validate", "checks:held_out", "--steps", 40)
    whole = leap(bench, *words, output="whole.zarr")
    assert whole.code == 0, whole.err
    expected = whole.saved()
    (kept,) = (bench.folder / "whole.zarr" / "leaper").iterdir()
    assert kept.name.startswith("23-")
    assert torch.load(kept)["window"] is not None
    broken = leap(bench, *words, command=[*bench.python(), "--break"])
    assert broken.code == 9
    resumed = leap(bench, *words, "--resume", command=[*bench.python(), "--resume"])
    assert resumed.code == 0, resumed.err
    assert not any("anew" in line for line in resumed.said)
    assert same(resumed.saved(), expected)

    def verdicts(name):
        return [(row["step"], row["verdict"], row["loss_after"]) for row in read_ledger(bench.folder / name)]

    assert verdicts("leap.zarr") == verdicts("whole.zarr")
    assert {verdict for _, verdict, _ in verdicts("whole.zarr")} <= {"accepted", "rolled back"}
    leap(bench, *words, command=[*bench.python(), "--break"], output="other.zarr")
    (bench.folder / "other.zarr" / "leaper" / kept.name).unlink()
    anew = leap(bench, *words, "--resume", command=[*bench.python(), "--resume"], output="other.zarr")
    assert anew.code == 0, anew.err
    assert sum("no state of leaping" in line and "begins anew" in line for line in anew.said) == 1
