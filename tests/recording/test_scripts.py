"""`farcli record -- CMD`: each row of the table of recorded situations that needs nothing but torch."""

import signal
import sys
import time

import pytest

from farcli.recording.background import read_journal
from farcli.store import Trajectory
from tests.recording.conftest import same, state_of

SIMPLE = """
    model = net()
    torch.save(model.state_dict(), "first.pt")
    train(model, torch.optim.Adam(model.parameters(), lr=0.01))
    torch.save(model.state_dict(), "final.pt")
"""


def test_a_plain_script_trains_as_without_recording_and_ends_in_its_own_weights(bench):
    bench.write(SIMPLE)
    ran = bench.compared("--every", 5)
    assert ran.err == ""
    store = ran.store()
    assert store.steps == [0, 5, 10, 12]
    first = ran.state(0)
    assert all(
        first[name].equal(tensor)
        for name, tensor in ran.saved("first.pt").items()
        if "running" not in name and "tracked" not in name
    )  # fmt: skip - the forward pass before step 1 has moved the statistics
    journal = read_journal(store.path)
    assert sorted(journal) == store.steps
    assert all(note["lr"] == [0.01] for note in journal.values())
    for clock in ("time", "seconds"):  # of day, and since the recording began
        times = [journal[step][clock] for step in store.steps]
        assert times == sorted(times)
    assert 0 < time.time() - journal[12]["time"] < 100
    assert list(store.verify()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("bash", "-c", f"{sys.executable} -m train; true"),
        pytest.param((sys.executable, "-m", "train"), marks=pytest.mark.slow),
    ],
)
def test_modules_and_shells(bench, command):
    bench.write(SIMPLE)
    assert bench.compared("--every", 5, command=command).err == ""


@pytest.mark.parametrize(
    ("ending", "code", "text"),
    [
        ("sys.exit(7)", 7, ""),
        ("raise RuntimeError('the training broke')", 1, "the training broke"),
        pytest.param("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt", marks=pytest.mark.slow),
    ],
)
def test_endings(bench, ending, code, text):
    bench.write(f"""
    model = net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 7)
    torch.save(model.state_dict(), "final.pt")
    {ending}
    """)
    ran = bench.record("--every", 5)
    assert ran.code == code
    assert text in ran.err
    assert not ran.said
    store = ran.store(partial=True)
    assert not store.finished, "a training that failed can be resumed"
    assert store.steps == [0, 5, 7]
    assert same(ran.state(partial=True), ran.saved())


SLEEPING = """
    import time
    {handler}
    model = net()
    def after(step):
        torch.save(model.state_dict(), "final.pt")
        if step == 8:
            time.sleep(30)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 100, after)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_signals_save_everything_first_and_kill_as_ever(bench, number):
    bench.write(SLEEPING.format(handler=""))
    ran = bench.interrupted("--every", 3, at="8 ", number=number)
    assert ran.code == -number
    store = ran.store(partial=True)
    assert not store.finished
    assert store.steps == [0, 3, 6, 8]
    assert same(ran.state(partial=True), ran.saved())
    assert len(ran.said) == 1
    assert "step 8" in ran.said[0]


@pytest.mark.slow
def test_a_time_limit_is_a_sigterm_by_the_clock(bench):
    bench.write(SLEEPING.format(handler="time.sleep(1.1)"))
    ran = bench.record("--every", 3, "--time-limit", "1s")
    assert ran.code == -signal.SIGTERM
    assert "--time-limit is reached" in ran.said[0]
    assert "stopped by signal 15; saved up to step 1" in ran.said[1]
    assert ran.store(partial=True).steps == [0, 1]


@pytest.mark.slow
def test_a_handler_of_the_script_is_left_alone(bench):
    bench.write(SLEEPING.format(handler="import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(31))"))
    ran = bench.interrupted("--every", 3)
    assert ran.code == 31
    assert ran.store(partial=True).steps == [0, 3, 6, 8]
    assert same(ran.state(partial=True), ran.saved())


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_steps_that_a_grad_scaler_skips_are_none(bench, fused):
    bench.write(f"""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused={fused})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    taken = 0
    for step in range(10):
        loss = nn.functional.cross_entropy(model(x), y) * (float("inf") if step in (2, 5, 6) else 1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        taken += not torch.equal(before, model[0].weight)
        scaler.update()
        print(repr(loss.item()), taken)
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.compared("--every", 1)
    assert ran.out.endswith(" 7\n")
    assert ran.store().steps == list(range(8))


@pytest.mark.slow
def test_lbfgs_calls_its_closure_often_and_takes_one_step(bench):
    bench.write("""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss
    for step in range(3):
        print(repr(optimizer.step(closure).item()))
    torch.save(model.state_dict(), "final.pt")
    """)
    assert bench.compared("--every", 1).store().steps == [0, 1, 2, 3]


def test_several_optimisers_side_by_side(bench):
    bench.write("""
    netG, netD = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    optG, optD = torch.optim.Adam(netG.parameters()), torch.optim.SGD(netD.parameters(), lr=0.1)
    for step in range(6):
        for _ in range(2):
            optD.zero_grad()
            (netD(netG(torch.randn(8, 3)).detach()).mean() - netD(x[:8]).mean()).backward()
            optD.step()
        optG.zero_grad()
        loss = -netD(netG(torch.randn(8, 3))).mean()
        loss.backward()
        optG.step()
        print(repr(loss.item()))
        torch.save({**netG.state_dict(prefix="netG."), **netD.state_dict(prefix="netD.")}, f"after{2 * (step + 1)}.pt")
    torch.save({**netG.state_dict(prefix="netG."), **netD.state_dict(prefix="netD.")}, "final.pt")
    """)
    ran = bench.compared("--every", 4)
    assert ran.store().steps == [0, 4, 8, 12]
    for step in (4, 8, 12):
        assert same(ran.state(step), ran.saved(f"after{step}.pt"))


@pytest.mark.slow
def test_of_nested_optimisers_the_outermost_counts_also_after_a_step_that_raised(bench):
    bench.write("""
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {})
        def step(self, closure=None):
            for _ in range(3):
                self.inner.step()
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            if fails:
                raise ValueError("no step")
            super().step()
    model = net()
    warm = torch.optim.SGD(net().parameters())
    optimizer = Lookahead(Mine(model.parameters(), lr=0.1))
    fails = False
    train(model, optimizer, 4)
    fails = True
    try:
        train(model, optimizer, 1)
    except ValueError:
        fails = False
    train(model, optimizer, 3)
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.record("--every", 1, "--params", "[0-9].*")
    assert ran.store().steps == list(range(8))
    assert same(ran.state(), ran.saved())


def test_nothing_recorded_is_said(bench):
    bench.write("print('no training')")
    for options, flags in (((), ()), (("--every", 5), ("-I",))):
        ran = bench.record(*options, command=[sys.executable, *flags, "train.py"])
        assert (ran.code, ran.out) == (0, "no training\n")
        assert len(ran.said) == 1
        assert ("-I makes Python ignore" if flags else "no optimiser ran that could be recorded") in ran.said[0]
        assert not (bench.folder / "run.zarr").exists()
    strict = bench.record("--strict")
    assert strict.code == 1
    assert bench.record("--strict", command=[sys.executable, "-I", "train.py"]).code == 2


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_do_not_disturb(bench, method):
    bench.write("""
    def main():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = torch.utils.data.TensorDataset(x, y)
        for method in sys.argv[1:]:
            for a, b in torch.utils.data.DataLoader(data, 16, True, num_workers=1, multiprocessing_context=method):
                loss = nn.functional.cross_entropy(model(a), b)
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                print(repr(loss.item()))
        torch.save(model.state_dict(), "final.pt")
    if __name__ == "__main__":
        main()
    """)
    ran = bench.compared("--every", 3, command=[*bench.python(), method, method])
    assert ran.store().steps == [0, 3, 6, 8]


@pytest.mark.slow
def test_every_training_of_a_command_has_a_store_of_its_own(bench):
    bench.write("""
    for fold in range(3):
        model = net()
        train(model, torch.optim.Adam(model.parameters()), 4)
        torch.save(model.state_dict(), f"fold{fold}.pt")
    second = torch.optim.SGD(model.parameters(), lr=0.1)  # another phase of the same training
    train(model, second, 3)
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.record("--every", 3)
    assert len(ran.said) == 2
    assert "run-2.zarr" in ran.said[0]
    for name, saved in (("run.zarr", "fold0.pt"), ("run-2.zarr", "fold1.pt"), ("run-3.zarr", "final.pt")):
        assert same(ran.state(name=name), ran.saved(saved))
    assert ran.store("run-2.zarr").steps == [0, 3, 4]
    assert ran.store("run-3.zarr").steps == [0, 3, 6, 7]


def test_frozen_tied_and_odd_tensors(bench, farcli):
    bench.write("""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5, bias=False)
            self.head.weight = self.embed.weight
            self.base, self.copy = nn.Linear(40, 40), nn.Linear(40, 40)
            self.copy.weight = self.base.weight
            self.small = nn.Parameter(torch.randn(7).bfloat16())
            self.register_buffer("mask", torch.ones(40, 40).tril().bool())
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            self.register_buffer("scale", torch.ones(()))
        def forward(self, tokens):
            return self.head(self.body(self.embed(tokens))) + self.small.float().sum() * self.scale
    model = Model()
    for module in (model.base, model.copy):
        module.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(6):
        model.scale = model.scale + 0.5  # replaced, not changed in place
        loss = nn.functional.cross_entropy(model(torch.arange(5)), torch.arange(5))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.record("--every", 2)
    assert ran.err == ""
    store = ran.store()
    assert dict(store.layout.tied) == {"head.weight": "embed.weight"}
    assert {slot.name for slot in store.layout.slots} == {"embed.weight", "body.weight", "body.bias", "small", "scale"}
    assert sorted(entry["name"] for entry in store.header["frozen"]["tensors"]) == [
        "base.bias",
        "base.weight",
        "copy.bias",
        "mask",
    ]
    assert same(ran.state(), ran.saved())
    assert ran.state(4)["scale"] == 3.0
    assert farcli("export", "run.zarr", "-o", "out.safetensors", cwd=bench.folder).code == 0
    from safetensors.torch import load_file

    assert same(load_file(bench.folder / "out.safetensors"), ran.saved())


@pytest.mark.slow
def test_a_frozen_tensor_that_moves_after_all_is_stored_each_time_from_then_on(bench):
    bench.write("""
    model = nn.ModuleDict({"student": net(), "teacher": net().requires_grad_(False)})
    def after(step):
        if step >= 4:
            for a, b in zip(model["teacher"].parameters(), model["student"].parameters()):
                a.data = 0.9 * a.data + 0.1 * b.data
    train(model["student"], torch.optim.SGD(model["student"].parameters(), lr=0.1), 12, after)
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.record("--every", 3)
    assert ran.store().steps == [0, 3]
    assert ran.store("run-2.zarr").steps == [6, 9, 12]
    assert same(ran.state(name="run-2.zarr"), ran.saved())
    assert len(ran.said) == 1
    assert "teacher.0.weight" in ran.said[0]


def test_weights_changed_after_the_last_step_are_the_last_snapshot(bench):
    bench.write("""
    def main():
        model = net()
        average = torch.optim.swa_utils.AveragedModel(model)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 6, lambda step: average.update_parameters(model))
        model.load_state_dict(average.module.state_dict())
        model(x)  # BatchNorm sees more data
        torch.save(model.state_dict(), "final.pt")
    main()
    import gc; gc.collect()
    """)
    ran = bench.record("--every", 3)
    assert ran.store().steps == [0, 3, 6]
    assert same(ran.state(), ran.saved())


RESUMABLE = """
    import os
    model = net()
    optimizer = torch.optim.{optimizer}
    start, until = 0, int(os.environ["UNTIL"])
    if os.path.exists("ckpt.pt"):
        saved = torch.load("ckpt.pt")
        model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        torch.set_rng_state(saved["rng"])
    def after(step):
        if start + step == 8:
            torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 8,
                        "rng": torch.get_rng_state()}}, "ckpt.pt")
    train(model, optimizer, until - start, after)
    torch.save(model.state_dict(), "final.pt")
    if until < 20:
        sys.exit(75)
"""


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Adam(model.parameters())", ()),
        pytest.param("SGD(model.parameters(), lr=0.1, momentum=0.9)", ("--start-step", 8), marks=pytest.mark.slow),
    ],
)
def test_resuming_goes_on_from_the_step_the_script_goes_on_from(bench, optimizer, options):
    bench.write(RESUMABLE.format(optimizer=optimizer))
    first = bench.record("--every", 3, env={"UNTIL": "13"})
    assert first.code == 75
    assert first.store(partial=True).steps == [0, 3, 6, 9, 12, 13]
    before = [first.state(step, partial=True) for step in (0, 3, 6, 9, 12)]
    ran = bench.record("--every", 3, "--resume", *options, env={"UNTIL": "20"})
    assert (ran.code, ran.err) == (0, "")
    assert ran.store().steps == [0, 3, 6, 8, 9, 12, 15, 18, 20]
    assert all(same(ran.state(step), state) for step, state in zip((0, 3, 6, 9, 12), before, strict=True))
    assert same(ran.state(), ran.saved())
    again = bench.record("--every", 3, "--resume", env={"UNTIL": "20"})
    assert again.code == 0
    assert '"finished": true' in again.out
    assert "0." not in again.out.replace("run.zarr", ""), "nothing was trained"


@pytest.mark.slow
def test_a_changed_network_on_resume_is_not_mixed_in(bench):
    bench.write("""
    model = nn.Linear(6, int(sys.argv[1]))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    sys.exit(3)
    """)
    command = [*bench.python(), 3]
    bench.record("--every", 2, command=command)
    ran = bench.record("--every", 2, "--resume", command=[*bench.python(), 5])
    assert ran.code == 3
    assert len(ran.out.splitlines()) == 4
    assert len(ran.said) == 1
    assert "holds another network ('weight' is float32[3, 6] there, float32[5, 6] here)" in ran.said[0]
    assert ran.store(partial=True).steps == [0, 2, 4]
    assert bench.record("--resume", "--strict", command=[*bench.python(), 5]).code == 1


FULL = """
    import os, resource, time
    model = nn.Sequential(nn.Linear(6, 40000), nn.Linear(40000, 3))
    def after(step):
        if step == 5:
            while os.path.exists("run.zarr") and not os.path.exists("run.zarr/weights/c.0.2.0"):
                time.sleep(0.01)  # what was taken before is written beside the training
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    train(model, torch.optim.SGD(model.parameters(), lr=1e-4), 9, after)
    print("done")
"""


def test_a_full_disk_stops_the_recording_and_not_the_training(bench):
    bench.write(FULL)
    plain = bench.plain()
    ran = bench.record("--every", 2)
    assert (ran.code, ran.out) == (0, plain.out)
    assert len(ran.said) == 1
    assert "no space left" in ran.said[0]
    assert ran.store(partial=True).steps == [0, 2, 4]
    assert list(ran.store(partial=True).verify()) == []
    strict = bench.record("--every", 2, "--strict", "--force")
    assert strict.code == 1
    assert "--strict ends the training" in strict.said[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.seen = torch.cat([model.seen, loss.detach()[None]])", "'seen' is float32[2] now, float32[1] when"),
        pytest.param("model.seen = model.seen.double()", "'seen' is float64[1] now", marks=pytest.mark.slow),
        pytest.param("del model.seen", "'seen' is in the network no more", marks=pytest.mark.slow),
    ],
)
def test_a_network_that_becomes_another_ends_the_recording_and_not_the_training(bench, change, said):
    bench.write(f"""
    model = nn.Linear(6, 3)
    model.register_buffer("seen", torch.ones(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(9):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        print(repr(loss.item()))
        if step == 4:
            {change}
    """)
    plain = bench.plain()
    ran = bench.record("--every", 2)
    assert (ran.code, ran.out) == (0, plain.out)
    assert len(ran.err.splitlines()) == len(ran.said) == 1
    assert "recording stopped, the training goes on" in ran.said[0]
    assert said in ran.said[0]
    assert ran.store(partial=True).steps == [0, 2, 4]
    assert list(ran.store(partial=True).verify()) == []


@pytest.mark.slow
def test_a_network_that_is_rounded_in_the_end_is_recorded_as_it_was(bench):
    bench.write(SIMPLE + "    model.half()\n")
    ran = bench.record("--every", 6)
    assert ran.code == 0
    assert len(ran.said) == 1
    assert "'0.weight' is float16[8, 6] now, float32[8, 6] when the recording began. Its last" in ran.said[0]
    assert ran.store().steps == [0, 6, 12]
    assert same(ran.state(), ran.saved())


@pytest.mark.slow
def test_a_sitecustomize_of_the_environment_still_runs(bench):
    bench.write(SIMPLE)
    (bench.folder / "site").mkdir()
    (bench.folder / "site/sitecustomize.py").write_text("import builtins; builtins.here = 'yes'")
    with (bench.folder / "train.py").open("a") as file:
        file.write("\nprint(here)\n")
    ran = bench.record(env={"PYTHONPATH": str(bench.folder / "site")})
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("yes\n")
    assert ran.store().steps == [0, 12]


def test_selection_and_moments(bench):
    bench.write("""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 30)
    names = {p: n for n, p in model.named_parameters()}
    torch.save({f"{names[p]}.{k}": s[k] for p, s in optimizer.state.items() for k in ("exp_avg", "exp_avg_sq")}, "m.pt")
    torch.save(model.state_dict(), "final.pt")
    """)
    ran = bench.record("--log-spaced", 3, "--params", "*.weight", "--params", "!1.*", "--with-optimizer")
    assert ran.store().steps == [0, 1, 2, 5, 10, 22, 30]
    assert [slot.name for slot in ran.store().layout.slots] == ["0.weight", "3.weight"]
    moments = Trajectory.open(bench.folder / "run.zarr/optimizer.zarr")
    assert moments.steps == [1, 2, 5, 10, 22, 30]
    saved = ran.saved("m.pt")
    assert same(
        state_of(moments), {name: saved[name] for name in saved if name[:2] in ("0.", "3.") and ".weight." in name}
    )
    ran = bench.record("--at", "1,4", "--trainable-only", "--max-bytes", "2K", "--force")
    assert ran.store().steps == [0, 1, 4, 30]
    assert {slot.role for slot in ran.store().layout.slots} == {"parameter"}
    ran = bench.record("--every", 1, "--trainable-only", "--max-bytes", 5 * ran.store().size * 4, "--force")
    assert ran.store().steps == [0, 1, 2, 3, 30]
    assert len(ran.said) == 1
    assert "--max-bytes" in ran.said[0]
