"""Recording under launchers and other people's loops: real ones, one process group at a time."""

import shutil
import sys

import pytest

from farcli.store import Trajectory
from tests.recording.conftest import Ran, same, state_of

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]

DDP = """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(net())
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), 7)
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), "final.pt")
    dist.barrier()
    dist.destroy_process_group()
"""

FSDP = """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), 7)
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(whole, "final.pt")
    DESTROY
"""


def test_torchrun_ddp(bench):
    bench.write(DDP)
    assert bench.compared("--every", 3, command=TORCHRUN).store().steps == [0, 3, 6, 7]
    assert not (bench.folder / "run-2.zarr").exists()


@pytest.mark.parametrize("destroy", ["dist.destroy_process_group()", ""])
def test_torchrun_fully_shard(bench, destroy):
    bench.write(FSDP.replace("DESTROY", destroy))
    assert bench.compared("--every", 3, command=TORCHRUN).store().steps == [0, 3, 6, 7]


LARGE = FSDP.replace("(6, 9)", "(6, 90000)").replace("(9, 3)", "(90000, 3)").replace("lr=0.01", "lr=1e-4")


@pytest.mark.parametrize("destroy", ["dist.destroy_process_group()", ""])
def test_torchrun_fully_shard_each_process_writes_its_part(bench, destroy):
    moments = """
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": state[key].full_tensor()
        for parameter, state in adam.state.items() for key in ("exp_avg", "exp_avg_sq")
    }
    if dist.get_rank() == 0:
        torch.save(moments, "moments.pt")
    """
    bench.write(LARGE.replace("DESTROY", moments + destroy).replace("torch.optim", "adam := torch.optim"))
    ran = bench.record("--every", 3, "--with-optimizer", command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert not ran.said
    store = ran.store()
    assert store.steps == [0, 3, 6, 7]
    assert same(ran.state(), ran.saved())
    files = sorted(path.name for path in (store.path / "weights").glob("c.*"))
    assert files == [f"c.0.{step}.{part}" for step in range(4) for part in range(2)]
    assert not (store.path / "parts").exists()
    assert not list(store.verify())
    moments = Trajectory.open(store.path / "optimizer.zarr")
    assert moments.steps == [3, 6, 7]
    assert same(state_of(moments), ran.saved("moments.pt"))


def test_weights_changed_behind_the_last_step_by_all_processes_replace_the_last_snapshot(bench):
    after = """
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.5)
    whole = {"""
    bench.write(LARGE.replace("DESTROY", "dist.destroy_process_group()").replace("\n    whole = {", after))
    ran = bench.record("--every", 7, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert ran.store().steps == [0, 7]
    assert same(ran.state(), ran.saved())


def test_a_killed_sharded_training_is_resumed_by_fewer_processes(bench):
    text = LARGE.replace("DESTROY", "dist.destroy_process_group()").replace("lr=1e-4), 7)", "lr=1e-4), 7, die)")
    bench.write(
        """
    import os
    def die(step):
        if step == 5 and os.environ["WORLD_SIZE"] == "2":
            os.kill(os.getpid(), 9)
    """
        + text.replace('"cpu", (2,)', '"cpu", (dist.get_world_size(),)')
    )
    killed = bench.record("--every", 2, command=TORCHRUN)
    assert killed.code != 0
    stored = killed.store(partial=True)
    assert stored.steps in ([0, 2], [0, 2, 4])
    assert not list(stored.verify())
    one = [*TORCHRUN[:-2], "1", TORCHRUN[-1]]
    ran = bench.record("--every", 2, "--resume", command=one)
    assert ran.code == 0, ran.err
    assert ran.store().steps == [0, 2, 4, 6, 7]
    assert same(ran.state(), ran.saved())


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_fully_shard_with_a_full_disk_on_one_rank_does_not_hang(bench, rank):
    text = LARGE.replace("DESTROY", "dist.destroy_process_group()").replace("lr=1e-4), 7)", "lr=1e-4), 7, full)")
    bench.write(
        f"""
    import os, resource, time
    def full(step):
        if step == 4 and os.environ["RANK"] == "{rank}":
            while not os.path.exists("run.zarr/weights/c.0.1.1"):
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    """
        + text.replace('torch.save(whole, "final.pt")', 'print("done")')
    )
    ran = bench.record("--every", 3, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert "done" in ran.out
    assert len(ran.said) == 1
    assert ran.store(partial=True).steps == [0, 3]


def test_flattened_parameters_are_refused_in_one_line_and_trained_as_ever(bench):
    bench.write("""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    dist.init_process_group("gloo")
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    dist.destroy_process_group()
    """)
    plain = bench.plain(*TORCHRUN)
    assert plain.code == 0, plain.err
    ran = bench.record("--every", 2, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert sorted(ran.out.splitlines()) == sorted(plain.out.splitlines())
    assert len(ran.said) == 2
    assert "use fully_shard (FSDP2)" in ran.said[0]  # from one of the processes
    assert "no optimiser ran that could be recorded" in ran.said[1]  # from the launcher


def test_spawned_ddp(bench):
    bench.write("""
    def work(rank):
        import os
        import torch.distributed as dist
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29613")
        dist.init_process_group("gloo", rank=rank, world_size=2)
        model = nn.parallel.DistributedDataParallel(net())
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
        if rank == 0:
            torch.save(model.module.state_dict(), "final.pt")
        dist.destroy_process_group()
    if __name__ == "__main__":
        torch.multiprocessing.spawn(work, nprocs=2)
    """)
    ran = bench.record("--every", 2)
    assert ran.code == 0, ran.err
    assert not ran.said
    assert ran.store().steps == [0, 2, 4, 5]
    assert same(ran.state(), ran.saved())


@pytest.mark.parametrize(
    ("what", "backend"), [("model", "eager"), ("step", "eager"), ("both", "eager"), ("both", "inductor")]
)
def test_torch_compile(bench, what, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile's own backend needs g++")
    bench.write(f"""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend={backend!r}) if {what!r} != "step" else model
    class Compiled:
        param_groups, zero_grad = optimizer.param_groups, optimizer.zero_grad
        step = staticmethod(torch.compile(lambda: optimizer.step(), backend={backend!r}))
    train(compiled, optimizer if {what!r} == "model" else Compiled())
    torch.save(model.state_dict(), "final.pt")
    """)
    assert bench.compared("--every", 5).store().steps == [0, 5, 10, 12]


def test_accelerate_launch(bench):
    pytest.importorskip("accelerate")
    bench.write("""
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for step in range(10):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        sys.stdout.write(f"{accelerator.num_processes} {loss.item()!r}\\n")
    if accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), "final.pt")
    accelerator.end_training()  # a process that ends before its group is torn down may abort
    """)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "train.py"]
    for command in (launch, TORCHRUN):
        ran = bench.compared("--every", 2, "--force", command=command)
        assert ran.store().steps == [0, 2, 4, 5]


HF = """
    import os
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
    class Model(PreTrainedModel):
        config_class = PretrainedConfig
        def __init__(self, config):
            super().__init__(config)
            self.net = net()
            self.post_init()
        def _init_weights(self, module):
            pass
        def forward(self, input, labels=None):
            out = self.net(input)
            return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}
    model = Model(PretrainedConfig())
    data = [{"input": a, "labels": b} for a, b in zip(x, y)]
    args = TrainingArguments("out", per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=9,
        use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, seed=1)
    callbacks = []
    CALLBACK
    Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
    torch.save(model.state_dict(), "final.pt")
"""


def losses(text):
    return [line.split("'grad_norm'")[0] for line in text.splitlines() if "'loss'" in line]


def test_transformers_trainer(bench):
    pytest.importorskip("transformers")
    bench.write(HF.replace("CALLBACK", ""))
    ran = bench.compared("--every", 4, heard=losses)
    assert ran.store().steps == [0, 4, 8, 9]


def with_callback(bench, script, callback, heard=str.splitlines):
    """Run a script without and with a callback of ours: nothing of it may differ, and its end is the last snapshot."""
    bench.write(script.replace("CALLBACK", ""))
    plain = bench.plain()
    assert plain.code == 0, plain.err
    (bench.folder / "final.pt").rename(bench.folder / "plain.pt")
    bench.write(script.replace("CALLBACK", callback))
    done = bench.plain()
    assert done.code == 0, done.err
    ran = Ran(bench.folder, done.code, done.out, done.err)
    assert heard(done.out) == heard(plain.out)
    assert same(ran.saved(), ran.saved("plain.pt"))
    assert same(ran.state(), ran.saved())
    return ran


def test_transformers_callback(bench):
    pytest.importorskip("transformers")
    callback = """from farcli.integrations.transformers import RecorderCallback
    callbacks = [RecorderCallback("run.zarr", every=4)]"""
    assert with_callback(bench, HF, callback, losses).store().steps == [0, 4, 8, 9]


def test_a_transformers_training_that_raised_lost_nothing_and_goes_on_from_its_checkpoint(bench):
    pytest.importorskip("transformers")
    callback = """from transformers import TrainerCallback
    from farcli.integrations.transformers import RecorderCallback
    resume = "out/checkpoint-4" if os.path.exists("out/checkpoint-4") else None
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 7 and resume is None:
                raise RuntimeError("the training broke")
    callbacks = [RecorderCallback("run.zarr", every=3, resume=True), Breaks()]"""
    text = HF.replace('save_strategy="no"', "save_steps=4").replace(".train()", ".train(resume_from_checkpoint=resume)")
    bench.write(text.replace("CALLBACK", callback))
    done = bench.plain()
    assert "the training broke" in done.err
    ran = Ran(bench.folder, done.code, done.out, done.err)
    assert ran.store(partial=True).steps == [0, 3, 6, 7]
    done = bench.plain()
    assert done.code == 0, done.err
    assert ran.store().steps == [0, 3, 4, 6, 9]
    assert same(ran.state(), ran.saved())


LIGHTNING = """
    import logging, os, warnings
    warnings.filterwarnings("ignore")
    import lightning as L
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            print(repr(loss.item()))
            return loss
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
    callbacks = []
    CALLBACK
    model = Model()
    trainer = L.Trainer(max_steps=7, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2)
    trainer.fit(model, data)
    torch.save(model.state_dict(), "final.pt")
"""


def test_lightning(bench):
    pytest.importorskip("lightning")
    bench.write(LIGHTNING.replace("CALLBACK", ""))
    assert bench.compared("--every", 4).store().steps == [0, 4, 7]


def test_lightning_callback(bench):
    pytest.importorskip("lightning")
    callback = """from farcli.integrations.lightning import RecorderCallback
    callbacks = [RecorderCallback("run.zarr", every=4)]"""
    assert with_callback(bench, LIGHTNING, callback).store().steps == [0, 4, 7]


def test_a_lightning_training_of_two_optimisers_that_raised_goes_on_from_its_checkpoint(bench):
    pytest.importorskip("lightning")
    bench.write("""
    import os, warnings
    warnings.filterwarnings("ignore")
    import lightning as L
    from farcli.integrations.lightning import RecorderCallback
    saved = "saved.ckpt" if os.path.exists("saved.ckpt") else None
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        def configure_optimizers(self):
            return torch.optim.Adam(self.body.parameters()), torch.optim.Adam(self.head.parameters())
        def on_train_batch_end(self, *given):
            if self.trainer.global_step == 8 and saved is None:  # of both together
                self.trainer.save_checkpoint("saved.ckpt")
                raise RuntimeError("the training broke")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    model = Model()
    trainer = L.Trainer(max_steps=16, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RecorderCallback("run.zarr", every=3, resume=True)])
    trainer.fit(model, data, ckpt_path=saved)
    torch.save(model.state_dict(), "final.pt")
    """)
    assert "the training broke" in bench.plain().err
    done = bench.plain()
    ran = Ran(bench.folder, done.code, done.out, done.err)
    assert ran.code == 0, ran.err
    assert ran.store().steps == [0, 3, 4, 6, 8]
    assert same(ran.state(), ran.saved())


def test_a_zero_redundancy_optimizer_counts_once(bench):
    bench.write(
        DDP.replace(
            "import torch.distributed as dist",
            "import torch.distributed as dist; from torch.distributed.optim import ZeroRedundancyOptimizer",
        ).replace(
            "torch.optim.Adam(model.parameters(), lr=0.01)",
            "ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)",
        )
    )
    ran = bench.record("--every", 3, command=TORCHRUN)
    assert ran.code == 0, ran.err
    assert ran.store().steps == [0, 3, 6, 7]
    assert same(ran.state(), ran.saved())
