"""Images to classify, as arrays: CIFAR-10, Fashion-MNIST and scikit-learn's digits; and what workloads on them share.

N images of C channels, height H and width W. What is held out is the test part of the data, where there is one;
subsets are chosen by the data alone, never by a seed. CIFAR-10 is decoded once and kept as an array in a cache.
"""

import gzip
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from farcli.errors import FarcliError, UsageError
from farcli.files import staged_file
from farcli.workloads.base import Batch, Workload, evaluating
from farcli.workloads.folders import VARIABLE, find, folders
from farcli.workloads.optimisation import TrainingOptions, dtype_of, resolved
from farcli.workloads.randomness import divided, fresh, shuffled
from farcli.workloads.texts import require_digest

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Classes in the order of the official labels."""
_CLASSES = 10
_SPLIT_SEED = 0
_CHUNK = 500
_CALIBRATION = (8, 250)
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_IDX_DIMENSIONS = {2049: 1, 2051: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images to train on and held out.

    Attributes:
        title: what a result must call the data.
        train: uint8 images [N, C, H, W] and int64 labels [N].
        held_out: the same.
    """

    title: str
    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions(TrainingOptions):
    """Options that workloads on images share."""

    data: str = field(
        default="cifar10",
        metadata={
            "help": "cifar10 (the official cifar-10-python.tar.gz, or where only that is there its JPEG-75 copy, then "
            "called cifar10-jpeg75), fashion-mnist, digits (8×8, of scikit-learn), or the path of such data"
        },
    )
    train: int = field(
        default=10_000,
        metadata={"help": "images to train on, always the same; all, where there are fewer; leaps verify on the rest"},
    )
    held_out: int = field(
        default=2_000, metadata={"help": "images of the test part that a loss is taken over, likewise"}
    )
    own_split: bool = field(
        default=False,
        metadata={"help": "whether each run draws the images that it trains on, so that each has others to verify on"},
    )
    batch: int = field(default=128, metadata={"help": "images a step, drawn by reshuffling every epoch"})
    digest: str | None = field(
        default=None, metadata={"help": "of the images, to make sure of them; none takes any, a recording says which"}
    )

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        for name, value in (("train", self.train), ("held_out", self.held_out), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")


OptionsT = TypeVar("OptionsT", bound=ImageOptions)


class ImageWorkload(Workload):
    """Classification of images by cross-entropy; a subclass adds its network.

    Pixels are standardised by mean and standard deviation of each channel over the images trained on; where each run
    draws its own, over all that it may draw.
    """

    name: ClassVar[str]
    """In messages."""
    lockstep = False
    fused = True
    needs = "demo"

    def _prepare(self, config: OptionsT, lr: Mapping[str, float], weight_decay: Mapping[str, float]) -> OptionsT:
        """Load the images, and fill in the options that depend on them."""
        data, images = load_images(config.data)
        self._title = images.title
        self._held_out = _subset(images.held_out, config.held_out)
        if config.own_split:
            self._train = _subset(_once(images.train, but=self._held_out), len(images.train[1]))
            self._whole = tuple(part.numpy() for part in self._train)
        else:
            self._train, self._whole = _subset(images.train, config.train), images.train
        train, held_out = min(config.train, len(self._train[1])), len(self._held_out[1])
        if config.batch > train:
            raise UsageError(f"{self.name}: batch={config.batch}, but there are {train} images to train on.")
        digest = sha256(b"".join(part.numpy().tobytes() for part in (*self._train, *self._held_out))).hexdigest()[:16]
        require_digest(self.name, config.digest, digest)
        self._shift, self._scale = _moments(self._train[0])
        self._dtype = dtype_of(config)
        filled = replace(config, data=data, digest=digest, train=train, held_out=held_out)
        return resolved(filled, lr=lr, weight_decay=weight_decay, span=self.default_steps)

    @property
    def title(self) -> str:
        """What a result must call the data."""
        return self._title

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of an image."""
        _, channels, height, width = self._train[0].shape
        return channels, height, width

    @property
    def _options(self) -> ImageOptions:
        config = self.config
        assert isinstance(config, ImageOptions)
        return config

    def _batch(self, part: tuple[Tensor, Tensor], chosen: Tensor | slice) -> Batch:
        images, labels = part
        return ((images[chosen].float() - self._shift) / self._scale).to(self._dtype), labels[chosen]

    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """Pairs (images, labels); what is left of an epoch after the last whole batch is dropped."""
        (seed,) = seeds
        mine, _ = self._parts(seed)
        for chosen in shuffled(seed, len(mine), self._options.batch, start):
            yield self._batch(self._train, mine[chosen])

    def _parts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Of the images that may be trained on: numbers of those a run is trained on, and of its others, if any."""
        return divided(seed, len(self._train[1]), self._options.train, self._options.own_split)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Cross-entropy and accuracy on the held-out images, the same for every run."""
        loss, correct, labels = 0.0, 0, self._held_out[1]
        with evaluating(model):
            for first in range(0, len(labels), _CHUNK):
                images, answers = self._batch(self._held_out, slice(first, first + _CHUNK))
                scores = model(images).double()
                loss += float(cross_entropy(scores, answers, reduction="sum"))
                correct += int((scores.argmax(1) == answers).sum())
        return {"loss": loss / len(labels), "accuracy": correct / len(labels)}

    def verification(self, seed: int, draw: int, batches: int) -> Sequence[Batch]:
        """Pairs (images, labels) of what the option `train` leaves out of the training part."""
        images, labels = self._whole
        left = self._parts(seed)[1].numpy() if self._options.own_split else self._left_out
        if not len(left):
            raise UsageError(
                f"{self.name}: train={self._options.train} leaves no images to verify on.",
                f"Record with fewer to train on: --set train={self._options.train * 4 // 5}.",
            )
        parts = [left[part.numpy()] for part in fresh(seed, draw, batches, len(left), self._options.batch)]
        return [
            self._batch((torch.from_numpy(images[part]), torch.from_numpy(labels[part])), slice(None)) for part in parts
        ]

    @cached_property
    def _left_out(self) -> np.ndarray:
        """Numbers of the images of the training part that no run uses; nor are their pixels, elsewhere in the data."""
        images, labels = self._whole
        used = _pixels(self._train[0].numpy()) | _pixels(self._held_out[0].numpy())
        rest = np.sort(np.random.default_rng(_SPLIT_SEED).permutation(len(labels))[self._options.train :])
        return rest[[_digest(images[number]) not in used for number in rest]]

    def calibration(self, seed: int) -> Iterator[Batch]:
        """At most 2,000 training images, in batches of 250."""
        number, size = _CALIBRATION
        mine, _ = self._parts(seed)
        size = min(size, len(mine))
        for index in range(min(number, len(mine) // size)):
            yield self._batch(self._train, mine[index * size : (index + 1) * size])

    def calibration_cost(self) -> float:
        """A forward pass over these images."""
        number, size = _CALIBRATION
        return min(number * size, self._options.train) / self._options.batch / 3

    def chance(self) -> dict[str, float]:
        """Always answer with the class frequencies of the training images."""
        frequencies = torch.bincount(self._train[1], minlength=_CLASSES).double() / len(self._train[1])
        labels = self._held_out[1]
        return {
            "loss": float(-frequencies.log()[labels].mean()),
            "accuracy": float((labels == frequencies.argmax()).double().mean()),
        }

    def evaluation_cost(self) -> float:
        """A forward pass over the held-out images."""
        return len(self._held_out[1]) / self._options.batch / 3


def _subset(part: tuple[np.ndarray, np.ndarray], count: int) -> tuple[Tensor, Tensor]:
    """At most `count` images, with their labels, in an order that mixes the classes."""
    images, labels = part
    order = np.random.default_rng(_SPLIT_SEED)
    chosen = np.sort(
        order.permutation(len(labels))[:count]
    )  # the rest is left to verify on; sorted, to read the file from front to back
    mixed = order.permutation(len(chosen))
    return torch.from_numpy(np.ascontiguousarray(images[chosen])[mixed]), torch.from_numpy(labels[chosen][mixed])


def _once(part: tuple[np.ndarray, np.ndarray], but: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The images, each once and without those of another part, so that however they are divided none is on both sides.

    Args:
        part: images and labels.
        but: the other part.
    """
    images, labels = part
    seen, chosen = _pixels(but[0].numpy()), []
    for number, image in enumerate(images):
        if (digest := _digest(image)) not in seen:
            seen.add(digest)
            chosen.append(number)
    return images[chosen], labels[chosen]


def _pixels(images: np.ndarray) -> set[bytes]:
    return {_digest(image) for image in images}


def _digest(image: np.ndarray) -> bytes:
    return sha256(image.tobytes()).digest()


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, both of shape [1, C, 1, 1]."""
    counts_CV = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in images.split(_CHUNK):
        counts_CV += torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in part.unbind(1)])
    share_CV, values_V = counts_CV / counts_CV.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
    mean_C = share_CV @ values_V
    variance_C = (share_CV * (values_V - mean_C[:, None]).square()).sum(1)
    return mean_C.float().reshape(1, -1, 1, 1), variance_C.sqrt().float().reshape(1, -1, 1, 1)


def load_images(data: str) -> tuple[str, Images]:
    """Images by name or path.

    Args:
        data: see the option.

    Returns:
        What the option has to be to mean these data from any folder, and the images.

    Raises:
        UsageError: they are not there, are damaged, or need a package that is not there.
    """
    get = f"Put the file into ./data, or name its folder in {VARIABLE}; its path goes as data=PATH."
    match data:
        case "digits":
            return data, _digits()
        case "fashion-mnist":
            places = [*(folder / data for folder in folders()), _FASHION]
            for place in places:
                if place.is_dir():
                    return data, _idx(place, "Fashion-MNIST")
            raise UsageError(
                f"data={data}: there is no folder {' or '.join(map(str, places))}.",
                "apt install dataset-fashion-mnist brings it; a folder with the four IDX files goes as data=PATH.",
            )
        case "cifar10":
            path = find(["cifar-10-python.tar.gz", "cifar10_jpeg_q75.tar.zst"], f"data={data}", get)
            return ("cifar10" if path.name.endswith(".gz") else "cifar10-jpeg75"), _cifar10(path)
        case "cifar10-jpeg75":
            return data, _cifar10(find(["cifar10_jpeg_q75.tar.zst"], f"data={data}", get))
    path = Path(data)
    if not path.exists():
        names = "cifar10, cifar10-jpeg75, fashion-mnist, digits"
        raise UsageError(f"data={data}: there is no such file or folder; the names are {names}.")
    if path.is_dir():
        return str(path.resolve()), _idx(path, path.resolve().name)
    return str(path.resolve()), _cifar10(path)


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"data=digits: the images come with scikit-learn, which cannot be imported ({error}).",
            f"pip install 'farcli[{ImageWorkload.needs}]'",
        ) from error
    pixels, answers = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(answers))
    images, labels = pixels[order].astype(np.uint8).reshape(-1, 1, 8, 8), answers[order].astype(np.int64)
    return Images(
        title="scikit-learn's digits", train=(images[500:], labels[500:]), held_out=(images[:500], labels[:500])
    )


def _idx(folder: Path, title: str) -> Images:
    """A folder with the four files of MNIST's format, plain or .gz; 28×28 images get a border of 2 zeros.

    Source: http://yann.lecun.com/exdb/mnist (the IDX format).
    """
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx_array(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if len(images) != len(labels):
            raise UsageError(f"{folder}: has {len(images)} images but {len(labels)} labels in {part}.")
        if len(labels) == 0 or labels.max() >= _CLASSES:
            raise UsageError(f"{folder}: expected labels of {_CLASSES} classes in {part}.")
        border = 2 if images.shape[1:] == (28, 28) else 0
        images = np.pad(images, ((0, 0), (border, border), (border, border)))
        parts.append((images[:, None], labels.astype(np.int64)))
    return Images(title=title, train=parts[0], held_out=parts[1])


def _idx_array(folder: Path, name: str) -> np.ndarray:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise UsageError(f"{folder}: {name} or {name}.gz is not in this folder.")
    try:
        data = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        axes = _IDX_DIMENSIONS[struct.unpack_from(">I", data)[0]]
        shape = struct.unpack_from(f">{axes}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, KeyError, ValueError, struct.error) as error:
        raise UsageError(f"{path}: is damaged, or no IDX file of bytes ({error}).") from error


def _cifar10(path: Path) -> Images:
    """CIFAR-10 from the official archive or its JPEG-75 copy; the array lies in the cache afterwards."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    copy = path.name.endswith(".zst")
    rows = _cached(
        f"cifar10{'-jpeg75' if copy else ''}-{sha256(content).hexdigest()[:16]}.npy",
        (60_000, 3073),
        lambda: _from_jpegs(path, content) if copy else _from_pickles(path, content),
    )
    images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)
    return Images(
        title="CIFAR-10 (JPEG-75 copy)" if copy else "CIFAR-10",
        train=(images[:50_000], labels[:50_000]),
        held_out=(images[50_000:], labels[50_000:]),
    )


def _cached(name: str, shape: tuple[int, ...], build: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of bytes that was built before, or is built now and kept if the cache can be written to."""
    home = os.environ.get("FARCLI_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farcli"
    path = Path(home) / name
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.shape == shape and found.dtype == np.uint8:
            return found
    except (OSError, ValueError, EOFError):
        pass
    rows = build()
    assert rows.shape == shape
    try:
        with staged_file(path, replace=True) as temporary:
            np.save(temporary, rows)
    except FarcliError:
        return rows
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _from_jpegs(path: Path, content: bytes) -> np.ndarray:
    """Rows of label and pixels from a tar.zst of `{train,test}/{class}/NNNN.jpg`, class by class."""
    try:
        from numcodecs.zstd import Zstd
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            f"{path}: decoding needs Pillow ({error}).", f"pip install 'farcli[{ImageWorkload.needs}]' brings it."
        ) from error
    counts = {"train": 5000, "test": 1000}
    rows = np.zeros((60_000, 3073), np.uint8)
    places = [(part, kind, number) for part in counts for kind in CIFAR10 for number in range(counts[part])]
    at = {f"{part}/{kind}/{number:04}.jpg": row for row, (part, kind, number) in enumerate(places)}
    try:
        with tarfile.open(fileobj=BytesIO(bytes(Zstd().decode(content)))) as archive:
            for member in archive:
                row = at.pop(member.name.removeprefix("./"), None)
                if row is None:
                    continue
                file = archive.extractfile(member)
                pixels = np.asarray(Image.open(file).convert("RGB"))  # pyright: ignore[reportArgumentType]
                rows[row, 0] = CIFAR10.index(places[row][1])
                rows[row, 1:] = pixels.transpose(2, 0, 1).reshape(3072)
    except (RuntimeError, ValueError, OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"{path}: is damaged, or not CIFAR-10's images in a tar.zst ({error}).") from error
    if at:
        raise UsageError(f"{path}: holds no {min(at)}, and {len(at) - 1} more of 60000 images are missing.")
    return rows


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays, and refuses whatever else a pickle could call."""

    _ALLOWED: ClassVar[set[str]] = {
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """The function or class, if it is among those that arrays need."""
        if f"{module_name}.{global_name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name.replace("numpy.core.", "numpy._core."), global_name)


def _from_pickles(path: Path, content: bytes) -> np.ndarray:
    """Rows of label and pixels from the official cifar-10-python.tar.gz, in its order.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "python version".
    """
    rows = []
    try:
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
                file = archive.extractfile(f"cifar-10-batches-py/{name}")
                assert file is not None  # or KeyError was raised
                batch = _ArraysOnly(file, encoding="bytes").load()
                labels = np.array(batch[b"labels"], np.uint8)[:, None]
                rows.append(np.concatenate([labels, batch[b"data"].astype(np.uint8)], axis=1))
        return np.concatenate(rows).reshape(60_000, 3073)
    except (KeyError, ValueError, TypeError, OSError, EOFError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path}: is damaged, or not the official cifar-10-python.tar.gz ({error}).") from error
