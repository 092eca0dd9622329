import gzip
import os
import pickle
import struct
import tarfile
from collections.abc import Iterable
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numcodecs.zstd import Zstd

from farcli.errors import UsageError
from farcli.training import describe_workload, run_seed, workload_from, workload_of
from farcli.workloads.base import Batch
from farcli.workloads.images import CIFAR10, load_images

SEED = run_seed(0, 0)
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No data but those of the test, and a cache of its own."""
    monkeypatch.setenv("FARCLI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FARCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    whole = BytesIO()
    with tarfile.open(fileobj=whole, mode=mode, **({"compresslevel": 1} if mode == "w:gz" else {})) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return whole.getvalue()


def pickled_batch(first: int) -> bytes:
    """Ten thousand images, of the number of the image modulo 251, as Python 2 and its numpy pickled them."""
    numbers = np.arange(first, first + 10_000)
    data = np.repeat((numbers % 251).astype(np.uint8)[:, None], 3072, axis=1)
    batch = {b"data": data, b"labels": [int(number % 10) for number in numbers], b"batch_label": b"x"}
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {f"cifar-10-batches-py/{name}": pickled_batch(10_000 * index) for index, name in enumerate(names)}
    path = tmp_path_factory.mktemp("official") / "cifar-10-python.tar.gz"
    path.write_bytes(tar_of(files, "w:gz"))
    return path


def test_leaps_are_verified_on_what_training_leaves_out():
    workload = workload_from("nas-cnn", {"data": "digits", "train": "1000", "batch": "32"})
    images = [image for draw in range(4) for batch in workload.verification(SEED, draw, 2) for image in batch[0]]
    assert len({image.numpy().tobytes() for image in images}) == 4 * 2 * 32
    assert [len(batch[1]) for batch in workload.verification(SEED, 0, 99)] == [32] * 9
    whole = workload_from("nas-cnn", {"data": "digits", "batch": "32"})
    with pytest.raises(UsageError, match="train=1297 leaves no images") as caught:
        whole.verification(SEED, 0, 1)
    assert caught.value.hint == "Record with fewer to train on: --set train=1037."


@pytest.mark.parametrize(("name", "left"), [("image-mlp", {"train": "997"}), ("digits-cnn", {"held_back": "300"})])
def test_runs_that_draw_their_own_images_hold_back_others_each(name: str, left: dict[str, str]):
    workload = workload_from(name, {"own_split": "true", "batch": "60", **left})

    def pixels(batches: Iterable[Batch]) -> set[bytes]:
        return {image.numpy().tobytes() for images, _ in batches for image in images}

    trained, back = [], []
    for seed in (run_seed(0, run) for run in range(12)):
        trained.append(pixels(chain(islice(workload.batches([seed]), 64), workload.calibration(seed))))
        back.append(pixels(workload.verification(seed, 0, 5)))
        assert len(trained[-1]) <= 997
        assert len(back[-1]) == 300
        assert not trained[-1] & back[-1]
    assert all(len(back[0] & other) < 110 for other in back[1:])  # of 300 that are drawn from 1297, 69 are expected
    assert len(set.union(*back)) > 1200  # 1297 (1 − (997 / 1297)^12) = 1242 are expected
    assert len(set.union(*trained, *back)) == 1297


def test_no_image_is_left_where_each_run_draws_all_of_them():
    workload = workload_from("image-mlp", {"own_split": "true"})
    with pytest.raises(UsageError, match="train=1297 leaves no images"):
        workload.verification(SEED, 0, 1)


def test_an_image_that_comes_twice_or_is_held_out_too_is_not_drawn(tmp_path: Path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    parts = {"train": np.concatenate([images, images[:10]]), "t10k": images[30:]}
    for part, pixels in parts.items():
        labels = np.arange(len(pixels), dtype=np.uint8) % 10
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            magic = {"images-idx3": 2051, "labels-idx1": 2049}[kind]
            header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    options = {"data": str(tmp_path), "own_split": "true", "batch": "5", "hidden": "4"}
    assert workload_from("image-mlp", options).config.train == 30


def test_the_official_archive_is_read_in_its_order(official: Path, tmp_path: Path):
    data, images = load_images(str(official))
    assert (data, images.title) == (str(official), "CIFAR-10")
    for (pixels, labels), first, count in ((images.train, 0, 50_000), (images.held_out, 50_000, 10_000)):
        numbers = np.arange(first, first + count)
        assert pixels.shape == (count, 3, 32, 32)
        assert np.array_equal(labels, numbers % 10)
        assert np.array_equal(pixels[:, 1, 5, 30], numbers % 251)
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    assert np.array_equal(load_images(str(official))[1].train[0][-5:], images.train[0][-5:])
    assert kept.stat().st_mtime_ns == before
    short = kept.read_bytes()[:1000]
    kept.unlink()  # not truncated in place: the arrays above are views of it
    kept.write_bytes(short)
    assert np.array_equal(load_images(str(official))[1].train[0][-5:], images.train[0][-5:])
    assert kept.stat().st_size > 180e6


def test_by_name_the_official_archive_goes_before_its_copy(official: Path, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cifar10_jpeg_q75.tar.zst").write_bytes(b"unread")
    (folder / "cifar-10-python.tar.gz").symlink_to(official)
    data, images = load_images("cifar10")
    assert (data, images.title) == ("cifar10", "CIFAR-10")
    with pytest.raises(UsageError, match=r"q75\.tar\.zst: is damaged"):
        load_images("cifar10-jpeg75")
    (folder / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UsageError, match=r"q75\.tar\.zst: is damaged"):
        load_images("cifar10")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path):
    files = {"cifar-10-batches-py/data_batch_1": pickle.dumps({b"data": Bomb(), b"labels": []}, protocol=2)}
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(tar_of(files, "w:gz"))
    with pytest.raises(UsageError, match=r"damaged, or not the official .* asks for posix.mkdir"):
        load_images(str(path))
    assert not (tmp_path / "exploded").exists()


def jpeg(colour: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    whole = BytesIO()
    image.new("RGB", (32, 32), (colour, 0, 255 - colour)).save(whole, "JPEG", quality=75)
    return whole.getvalue()


def test_a_copy_that_lacks_images_is_named(tmp_path: Path):
    path = tmp_path / "copy.tar.zst"
    path.write_bytes(bytes(Zstd().encode(tar_of({"README.md": b"hi", "train/cat/0000.jpg": jpeg(9)}))))
    with pytest.raises(UsageError, match=r"holds no test/airplane/0000.jpg, and 59998 more"):
        load_images(str(path))
    path.write_bytes(bytes(Zstd().encode(tar_of({"train/cat/0000.jpg": b"no image"}))))
    with pytest.raises(UsageError, match=r"copy.tar.zst: is damaged"):
        load_images(str(path))


@pytest.mark.slow
def test_the_jpeg_copy_has_each_image_in_its_place(tmp_path: Path):
    jpegs = [jpeg(25 * index) for index in range(10)]
    files = {
        f"{part}/{name}/{number:04}.jpg": jpegs[index]
        for part, count in (("train", 5000), ("test", 1000))
        for index, name in enumerate(CIFAR10)
        for number in range(count)
    }
    path = tmp_path / "copy.tar.zst"
    path.write_bytes(bytes(Zstd().encode(tar_of(files))))
    _, images = load_images(str(path))
    assert images.title == "CIFAR-10 (JPEG-75 copy)"
    for pixels, labels in (images.train, images.held_out):
        assert np.bincount(labels).tolist() == [len(labels) // 10] * 10
        wanted = 25 * labels[:, None, None]
        assert np.abs(pixels[:, 0].astype(int) - wanted).max() <= 3
        assert np.abs(pixels[:, 2].astype(int) - 255 + wanted).max() <= 3


def write_idx(folder: Path, name: str, array: np.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}I", {1: 2049, 3: 2051}[array.ndim], *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count, end in (("train", 300, ".gz"), ("t10k", 100, "")):
        write_idx(folder, f"{part}-images-idx3-ubyte{end}", generator.integers(0, 256, (count, 28, 28)))
        write_idx(folder, f"{part}-labels-idx1-ubyte{end}", np.arange(count) % 10)
    return folder


def test_idx_files_are_read_plain_or_compressed_and_framed(idx: Path):
    data, images = load_images("shapes")
    assert (data, images.title) == (str(idx), "shapes")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 28, 28))
    assert images.train[0].shape == (300, 1, 32, 32)
    assert np.array_equal(images.train[0][:, 0, 2:-2, 2:-2], pixels)
    assert not images.train[0][:, 0, :2].any()
    assert images.held_out[1].tolist() == [number % 10 for number in range(100)]


def test_damaged_idx_files_are_named(idx: Path):
    labels = idx / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for broken in (whole[:50], b"", b"\0\0\0\1" + whole[4:], gzip.compress(whole)):
        labels.write_bytes(broken)
        with pytest.raises(UsageError, match="t10k-labels-idx1-ubyte: is damaged"):
            load_images(str(idx))
    write_idx(idx, labels.name, np.arange(99) % 10)
    with pytest.raises(UsageError, match="100 images but 99 labels"):
        load_images(str(idx))
    write_idx(idx, labels.name, np.arange(100))
    with pytest.raises(UsageError, match="labels of 10 classes"):
        load_images(str(idx))
    labels.unlink()
    with pytest.raises(UsageError, match="t10k-labels-idx1-ubyte or"):
        load_images(str(idx))


def test_what_is_nowhere_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=r"cifar-10-python.tar.gz or cifar10_jpeg_q75.tar.zst is in none") as caught:
        load_images("cifar10")
    assert "FARCLI_DATA" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no such file or folder; the names are cifar10"):
        load_images("imagenet")
    monkeypatch.setattr("farcli.workloads.images._FASHION", Path("/nowhere"))
    with pytest.raises(UsageError, match="there is no folder"):
        load_images("fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_whole():
    data, images = load_images("fashion-mnist")
    assert (data, images.title) == ("fashion-mnist", "Fashion-MNIST")
    assert [len(part[1]) for part in (images.train, images.held_out)] == [60_000, 10_000]
    assert np.bincount(images.train[1]).tolist() == [6000] * 10
    assert images.train[1][:5].tolist() == [9, 0, 0, 3, 0]


@pytest.mark.parametrize("name", ["vit", "nas-cnn"])
def test_subsets_are_fixed_mixed_and_standardised(name: str, idx: Path):
    options = {"data": str(idx), "train": "200", "held_out": "50", "batch": "100"}
    workload = workload_from(name, options)
    config = workload.config
    assert (config.train, config.held_out, config.data) == (200, 50, str(idx))
    batches = workload.batches([SEED])
    images, labels = (torch.cat(parts) for parts in zip(next(batches), next(batches), strict=True))
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert len(torch.unique(images.flatten(1), dim=0)) == 200
    assert len(torch.unique(labels)) == 10
    known = {image.tobytes(): label for image, label in zip(*load_images(str(idx))[1].train, strict=True)}
    assert len(known) == 300
    other = workload.batches([run_seed(0, 1)])
    again, _ = (torch.cat(parts) for parts in zip(next(other), next(other), strict=True))
    assert not torch.equal(images, again)
    assert torch.equal(torch.unique(images.flatten(1), dim=0), torch.unique(again.flatten(1), dim=0))


def test_labels_stay_with_their_images(idx: Path):
    workload = workload_from("nas-cnn", {"data": str(idx), "batch": "300"})
    images, labels = next(workload.batches([SEED]))
    raw = torch.tensor(load_images(str(idx))[1].train[0]).float()
    standard = (raw - raw.mean()) / raw.std(correction=0)
    distance = torch.cdist(images.flatten(1), standard.flatten(1))
    assert torch.equal(distance.argmin(1) % 10, labels)
    assert float(distance.min(1).values.max()) < 0.1


def test_other_images_under_the_same_name_are_noticed(idx: Path):
    options = {"data": str(idx), "batch": "20"}
    header = {"workload": describe_workload("vit", workload_from("vit", options))}
    assert len(header["workload"]["options"]["digest"]) == 16
    again = workload_of(header)
    assert again is not None
    write_idx(idx, "t10k-images-idx3-ubyte", np.zeros((100, 28, 28)))
    with pytest.raises(UsageError, match="vit: the data have the digest"):
        workload_of(header)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "0"}, "train=0"),
        ({"held_out": "0"}, "held_out=0"),
        ({"batch": "0"}, "batch=0"),
        ({"batch": "200", "train": "100"}, "batch=200, but there are 100 images"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("nas-cnn", {"data": "digits"} | options)
    assert message in str(caught.value)
