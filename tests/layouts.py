"""A small sample of each layout that ``--data.path`` reads or refuses: the tests read them, docs/reference/layouts.md lists them.

A layout is a function that writes a sample into a folder and returns the path to give; ``@layout`` says what must be read.
"""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import encoded

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Layout:
    """One layout.

    Args:
        data: what is stored so, such as ``"CIFAR-10, binary version"``.
        tree: the files, in one line; `…` for more of the same.
        build: writes a sample into an empty folder and returns the path to give as ``--data.path``.
        sizes: training, validation and test images that must be read.
        classes: the class names that must be read.
        about: what else to know, one or more sentences for the docs.
        refused: a part of the message, where the layout is refused; else empty.
    """

    data: str
    tree: str
    build: Callable[[Path], Path]
    sizes: tuple[int, int, int] = (0, 0, 0)
    classes: tuple[str, ...] = ()
    about: str = ""
    refused: str = ""


LAYOUTS: list[Layout] = []


def layout(data: str, tree: str, **what: object) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Return a decorator that adds a builder to ``LAYOUTS``."""

    def decorate(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        LAYOUTS.append(Layout(data, tree, build, **what))
        return build

    return decorate


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(count: int, classes: int) -> np.ndarray:
    """Return 0, 1, …, classes - 1, 0, 1, … as uint8."""
    return (np.arange(count) % classes).astype(np.uint8)


def write(path: Path, content: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save_npy(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


# ----------------------------------------------------------------------------------------- folders, Parquet


def class_folders(root: Path, per_class: int, classes: tuple[str, ...] = ("cat", "dog"), kind: str = "png") -> None:
    """Write ``per_class`` pictures into root/CLASS/."""
    for label, name in enumerate(classes):
        for row in range(per_class):
            write(root / name / f"{row:03}.{kind}", encoded(noise(8, 8, 3, seed=100 * label + row), kind.upper()))


@layout("Your own pictures", "train/CLASS/*.png …, test/CLASS/*.png …", sizes=(6, 0, 4), classes=("cat", "dog"))
def folder(root: Path) -> Path:
    class_folders(root / "train", 3)
    class_folders(root / "test", 2)
    return root


@layout(
    "Your own pictures, splits of other names",
    "images/Training/CLASS/…/*.jpg, images/valid/CLASS/…/*.jpg",
    sizes=(6, 4, 0),
    classes=("9", "10"),
    about="`train|training`, `val|valid|validation|dev`, `test|testing`, also one folder deeper; class folders at any depth. "
    "Class folders that are numbers are in the order of numbers. Without test images, the validation images are those of the test.",
)
def other_splits(root: Path) -> Path:
    for split, count in (("Training", 3), ("valid", 2)):
        for name in ("10", "9"):
            class_folders(root / "images" / split / name / "2024", count, ("may",), "jpeg")
    return root


@layout(
    "Your own pictures without splits",
    "CLASS/*.tif …",
    sizes=(6, 0, 0),
    classes=("cat", "dog"),
    about="To evaluate a model all of them serve; to train one, a fixed fifth is the test.",
)
def no_splits(root: Path) -> Path:
    class_folders(root, 3, kind="tiff")
    return root


@layout("Pictures in no class folder", "train/*.png, test/*.png", refused="lie in no class folder")
def flat_splits(root: Path) -> Path:
    class_folders(root, 2, ("train", "test"))
    return root


@layout("The training folder alone is given", "photos/train/CLASS/*.png", refused="give the folder above: --data.path")
def split_itself(root: Path) -> Path:
    return folder(root) / "train"


def table_of(path: Path, count: int, image: str = "image", label: str = "label", texts: bool = False) -> None:
    """Write a Parquet file of pictures of cats and dogs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    info = {"huggingface": json.dumps({"info": {"features": {label: {"names": ["cat", "dog"]}}}})}
    images = [{"bytes": encoded(noise(8, 8, 3, seed=row)), "path": None} for row in range(count)]
    labels = labels_of(count, 2).astype(int)
    table = pa.table({image: images, label: np.array(["cat", "dog"])[labels].tolist() if texts else labels})
    pq.write_table(table if texts else table.replace_schema_metadata(info), path)


@layout(
    "Hugging Face data sets, as downloaded",
    "data/train-*.parquet, data/test-*.parquet",
    sizes=(6, 0, 4),
    classes=("cat", "dog"),
    about="Images: `image`, `img`, `pixel_values`, `picture`, `photo` …; labels: `label`, `labels`, `fine_label`, `class`, "
    "`category`, `target` …, integers or text.",
)
def parquet(root: Path) -> Path:
    for part, count in (("train", 6), ("test", 4)):
        table_of(root / f"data/{part}-00000-of-00001.parquet", count)
    return root


@layout(
    "The same, in the folder of a configuration",
    "plain_text/train-*.parquet, plain_text/validation-*.parquet",
    sizes=(6, 4, 0),
    classes=("cat", "dog"),
    about="Splits as for folders; of several configurations, give the folder of one.",
)
def parquet_configuration(root: Path) -> Path:
    for part, count in (("train", 6), ("validation", 4)):
        table_of(root / f"plain_text/{part}-00000-of-00001.parquet", count, "img", "labels")
    return root


@layout(
    "The same, as the hub converts them",
    "default/train/0000.parquet, default/test/0000.parquet",
    sizes=(6, 0, 4),
    classes=("cat", "dog"),
)
def parquet_converted(root: Path) -> Path:
    for part, count in (("train", 6), ("test", 4)):
        table_of(root / f"default/{part}/0000.parquet", count, "pixel_values", "category", texts=True)
    return root


@layout("Several configurations", "digits/train-*.parquet, letters/train-*.parquet", refused="give the folder of one")
def parquet_configurations(root: Path) -> Path:
    for name in ("digits", "letters"):
        table_of(root / f"{name}/train-00000-of-00001.parquet", 4)
    return root


def pictures(folder: Path, count: int, ending: str = "png", first: int = 0) -> list[str]:
    """Write pictures and return their names without ending."""
    for row in range(first, first + count):
        write(folder / f"p{row}.{ending}", encoded(noise(8, 8, 3, seed=row)))
    return [f"p{row}" for row in range(first, first + count)]


@layout(
    "Kaggle competitions",
    "train.csv with id,label; train/*.png; test.csv without labels",
    sizes=(8, 0, 0),
    classes=("cat", "dog"),
    about="The folder or the CSV. Paths are relative to the CSV, to a folder of its name or to `images/`, with or without ending.",
)
def kaggle(root: Path) -> Path:
    names = pictures(root / "train", 8)
    pictures(root / "test", 2, first=8)
    write(
        root / "train.csv", "id,label\n" + "".join(f"{name},{('cat', 'dog')[k % 2]}\n" for k, name in enumerate(names))
    )
    write(root / "test.csv", "id\np8\np9\n")
    return root


@layout(
    "A table of paths and labels",
    "labels.csv, .tsv, .jsonl or .json with path,label,split",
    sizes=(4, 2, 2),
    classes=("0", "1"),
    about="Columns of other names are common ones such as `filename`, `image`, `class`, `category`; the remaining columns can be "
    "asked for: `--data.only 'hospital=2'`, `--data.group_by`.",
)
def table(root: Path) -> Path:
    names = pictures(root / "images", 8)
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [
        f"images/{name}.png;{k % 2};{split};{k % 3}" for k, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    return write(root / "labels.csv", "\n".join(["path;label;split;hospital", *rows]))


@layout(
    "Hugging Face's imagefolder with metadata",
    "train/metadata.jsonl with file_name and label, train/*.png, test/…",
    sizes=(4, 0, 4),
    classes=("cat", "dog"),
    about="`metadata.csv`, too; in each split, or one above them.",
)
def imagefolder_metadata(root: Path) -> Path:
    for part, first in (("train", 0), ("test", 4)):
        rows = [
            json.dumps({"file_name": f"{name}.png", "label": ("cat", "dog")[k % 2]})
            for k, name in enumerate(pictures(root / part, 4, first=first))
        ]
        write(root / part / "metadata.jsonl", "\n".join(rows) + "\n")
    return root


@layout(
    "COCO",
    "annotations.json with images, annotations, categories",
    refused="COCO's format of objects in images",
    about="Write a CSV with one label for each image.",
)
def coco(root: Path) -> Path:
    return write(root / "annotations.json", json.dumps({"images": [], "annotations": [], "categories": []}))


@layout(
    "Tiny-ImageNet, as unpacked",
    "tiny-imagenet-200/train/WNID/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, wnids.txt, words.txt",
    sizes=(6, 4, 0),
    classes=("goldfish", "fire salamander"),
    about="Classes in the order of `wnids.txt`. The images in `test/` have no labels: those of `val/` are measured.",
)
def tiny_imagenet(root: Path) -> Path:
    top, wnids = root / "tiny-imagenet-200", ("n02", "n01")
    for label, wnid in enumerate(wnids):
        for row in range(3):
            write(
                top / f"train/{wnid}/images/{wnid}_{row}.JPEG", encoded(noise(8, 8, 3, seed=10 * label + row), "JPEG")
            )
    for row in range(4):
        write(top / f"val/images/val_{row}.JPEG", encoded(noise(8, 8, 3, seed=20 + row), "JPEG"))
        write(top / f"test/images/test_{row}.JPEG", encoded(noise(8, 8, 3, seed=30 + row), "JPEG"))
    write(
        top / "val/val_annotations.txt", "".join(f"val_{row}.JPEG\t{wnids[row % 2]}\t0\t0\t7\t7\n" for row in range(4))
    )
    write(top / "wnids.txt", "n02\nn01\n")
    write(top / "words.txt", "n00\tentity\nn01\tfire salamander\nn02\tgoldfish\n")
    return root


# -------------------------------------------------------------------------------------------------------- npz


@layout(
    "Arrays of NumPy",
    "FILE.npz with x_train, y_train, x_test, y_test",
    sizes=(12, 0, 6),
    classes=("0", "1", "2"),
    about="Images are (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float in [0, 1]; `classes` holds names.",
)
def npz(root: Path) -> Path:
    path = root / "images.npz"
    x_train, x_test = noise(12, 8, 8, 3), noise(6, 8, 8, 3, seed=1)
    np.savez(path, x_train=x_train, y_train=labels_of(12, 3), x_test=x_test, y_test=labels_of(6, 3))
    return path


@layout(
    "Arrays of NumPy, other names",
    "FILE.npz with x and y, images and labels, X_test …, class_names",
    sizes=(0, 0, 6),
    classes=("cat", "dog", "é"),
    about="Class names may be bytes, labels texts. Labels 1 … K are numbered from 0, which is said.",
)
def npz_pair(root: Path) -> Path:
    path = root / "images.npz"
    names = np.array([name.encode() for name in ("cat", "dog", "é")])
    np.savez(path, images=noise(6, 3, 8, 8) / np.float32(255), labels=labels_of(6, 3) + 1, class_names=names)
    return path


@layout(
    "Arrays of NumPy, one file each",
    "x_train.npy, y_train.npy, x_test.npy, y_test.npy",
    sizes=(12, 0, 6),
    classes=("0", "1", "2"),
)
def npy(root: Path) -> Path:
    for seed, (part, count) in enumerate({"train": 12, "test": 6}.items()):
        save_npy(root / f"x_{part}.npy", noise(count, 8, 8, seed=seed))
        save_npy(root / f"y_{part}.npy", labels_of(count, 3).astype(np.int32))
    return root


def medmnist_arrays(*shape: int, labels: int = 1) -> dict[str, np.ndarray]:
    """Return the six arrays of a MedMNIST file."""
    arrays = {}
    for seed, (part, count) in enumerate({"train": 12, "val": 6, "test": 9}.items()):
        arrays[f"{part}_images"] = noise(count, *shape, seed=seed)
        arrays[f"{part}_labels"] = labels_of(count, 3)[:, None].repeat(labels, axis=1)
    return arrays


@layout(
    "MedMNIST",
    "bloodmnist.npz with train_images, train_labels, val_images, …",
    sizes=(12, 6, 9),
    classes=("0", "1", "2"),
)
def medmnist(root: Path) -> Path:
    np.savez(root / "bloodmnist.npz", **medmnist_arrays(28, 28, 3))
    return root / "bloodmnist.npz"


@layout(
    "MedMNIST with several labels for each image (ChestMNIST)",
    "chestmnist.npz",
    refused="make it a multi-label set",
    about="A classifier here tells one class for each image: choose one column of the labels.",
)
def medmnist_labels(root: Path) -> Path:
    np.savez(root / "chestmnist.npz", **medmnist_arrays(28, 28, labels=14))
    return root / "chestmnist.npz"


@layout("MedMNIST in 3D", "organmnist3d.npz", refused="these are volumes", about="Choose a slice of each volume.")
def medmnist_volumes(root: Path) -> Path:
    np.savez(root / "organmnist3d.npz", **medmnist_arrays(28, 28, 28))
    return root / "organmnist3d.npz"


# ------------------------------------------------------------------------------------------------------ CIFAR


def cifar_records(
    folder: Path, files: dict[str, int], names: str, classes: tuple[str, ...], coarse: bool = False
) -> None:
    """Write binary records: a coarse label if asked, the label, 3,072 pixels."""
    for seed, (file, count) in enumerate(files.items()):
        labels = labels_of(count, len(classes))[:, None]
        head = [labels // 5, labels] if coarse else [labels]
        write(folder / file, np.concatenate([*head, noise(count, 3072, seed=seed)], axis=1).tobytes())
    write(folder / names, "\n".join([*classes, ""]))


CIFAR10_FILES = {**{f"data_batch_{n}.bin": 10 for n in range(1, 6)}, "test_batch.bin": 20}
HUNDRED = tuple(f"fine_{k:02}" for k in range(100))


@layout(
    "CIFAR-10, binary version",
    "cifar-10-batches-bin/data_batch_1.bin …, test_batch.bin, batches.meta.txt",
    sizes=(50, 0, 20),
    classes=TEN,
    about="The folder, or the one above it.",
)
def cifar10_binary(root: Path) -> Path:
    cifar_records(root / "cifar-10-batches-bin", CIFAR10_FILES, "batches.meta.txt", TEN)
    return root


@layout(
    "CIFAR-100, binary version",
    "cifar-100-binary/train.bin, test.bin, fine_label_names.txt",
    sizes=(200, 0, 100),
    classes=HUNDRED,
    about="The folder, or the one above it; the labels are the 100 fine ones.",
)
def cifar100_binary(root: Path) -> Path:
    folder = root / "cifar-100-binary"
    cifar_records(folder, {"train.bin": 200, "test.bin": 100}, "fine_label_names.txt", HUNDRED, coarse=True)
    return folder


def cifar_pickles(folder: Path, files: dict[str, int], keys: tuple[str, str, str], classes: tuple[str, ...]) -> None:
    """Write dicts of arrays as torchvision finds them: ``keys`` are the file of names, its key, and the key of labels."""
    names, names_key, labels_key = keys
    for seed, (file, count) in enumerate(files.items()):
        labels = labels_of(count, len(classes)).tolist()
        batch = {b"batch_label": b"batch", labels_key.encode(): labels, b"data": noise(count, 3072, seed=seed)}
        write(folder / file, pickle.dumps({**batch, b"filenames": [b"a.png"] * count}, protocol=2))
    write(folder / names, pickle.dumps({names_key: list(classes), "num_vis": 3072}, protocol=2))


@layout(
    "CIFAR-10, Python version, and as torchvision keeps it",
    "cifar-10-batches-py/data_batch_1 …, test_batch, batches.meta",
    sizes=(50, 0, 20),
    classes=TEN,
    about="The folder, or the one above it. The files are pickles: their arrays are read without unpickling, and a pickle with "
    "anything else in it is refused.",
)
def cifar10_python(root: Path) -> Path:
    files = {file.removesuffix(".bin"): count for file, count in CIFAR10_FILES.items()}
    cifar_pickles(root / "cifar-10-batches-py", files, ("batches.meta", "label_names", "labels"), TEN)
    return root


@layout(
    "CIFAR-100, Python version, and as torchvision keeps it",
    "cifar-100-python/train, test, meta",
    sizes=(200, 0, 100),
    classes=HUNDRED,
    about="As CIFAR-10; the labels are the 100 fine ones.",
)
def cifar100_python(root: Path) -> Path:
    keys = ("meta", "fine_label_names", "fine_labels")
    cifar_pickles(root / "cifar-100-python", {"train": 200, "test": 100}, keys, HUNDRED)
    return root / "cifar-100-python"


# -------------------------------------------------------------------------------------------------------- IDX


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of uint8 as an IDX file holds it."""
    return struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(
    folder: Path, sizes: dict[str, int], classes: int = 10, first: int = 0, prefix: str = "", packed: bool = False
) -> None:
    """Write images and labels first, first + 1, … of the parts "train" and "t10k"."""
    for seed, (part, count) in enumerate(sizes.items()):
        arrays = {
            "images-idx3": noise(count, 28, 28, seed=seed),
            "labels-idx1": labels_of(count, classes) + np.uint8(first),
        }
        for kind, array in arrays.items():
            content = idx_bytes(array)
            name = f"{prefix}{part}-{kind}-ubyte" + (".gz" if packed else "")
            write(folder / name, gzip.compress(content, mtime=0) if packed else content)


@layout(
    "MNIST and KMNIST, as torchvision keeps them",
    "MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…",
    sizes=(40, 0, 20),
    classes=DIGITS,
    about="Any of the folders, or the one above; `.gz` files as well. Beside other data sets of torchvision, `--data.name mnist` "
    "takes this one.",
)
def mnist(root: Path) -> Path:
    write_idx(root / "MNIST/raw", {"train": 40, "t10k": 20})
    return root


@layout(
    "MNIST, as published",
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-…",
    sizes=(40, 0, 20),
    classes=DIGITS,
)
def mnist_packed(root: Path) -> Path:
    write_idx(root, {"train": 40, "t10k": 20}, packed=True)
    return root


@layout(
    "Fashion-MNIST",
    "FashionMNIST/raw/train-images-idx3-ubyte …",
    sizes=(40, 0, 20),
    classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
def fashion_mnist(root: Path) -> Path:
    write_idx(root / "FashionMNIST/raw", {"train": 40, "t10k": 20})
    return root


@layout(
    "EMNIST",
    "EMNIST/raw/emnist-letters-train-images-idx3-ubyte …, emnist-letters-mapping.txt",
    sizes=(52, 0, 26),
    classes=tuple(map(chr, range(65, 91))),
    about="The images lie transposed, as in torchvision. Where several sets lie there, give the path of one file of images.",
)
def emnist(root: Path) -> Path:
    folder = root / "EMNIST/raw"
    write_idx(folder, {"train": 52, "test": 26}, 26, first=1, prefix="emnist-letters-")
    write(folder / "emnist-letters-mapping.txt", "".join(f"{k} {64 + k} {96 + k}\n" for k in range(1, 27)))
    return root


# ---------------------------------------------------------------------------------------- corrupted test sets


@layout(
    "CIFAR-10-C and CIFAR-100-C",
    "CIFAR-10-C/CORRUPTION.npy …, labels.npy",
    sizes=(0, 0, 150),
    classes=TEN,
    about="All corruptions that lie in the folder; the path of one file is this corruption alone, and "
    "`--data.only 'severity=3'` one severity.",
)
def cifar10_c(root: Path) -> Path:
    for seed, corruption in enumerate(("fog", "gaussian_noise", "jpeg_compression")):
        save_npy(root / f"CIFAR-10-C/{corruption}.npy", noise(50, 32, 32, 3, seed=seed))
    save_npy(root / "CIFAR-10-C/labels.npy", np.tile(labels_of(10, 10), 5))
    return root / "CIFAR-10-C"


@layout(
    "MNIST-C",
    "mnist_c/CORRUPTION/test_images.npy, test_labels.npy",
    sizes=(0, 0, 40),
    classes=DIGITS,
    about="All corruptions that lie in the folder, or one of them. Its corrupted training images are not read.",
)
def mnist_c(root: Path) -> Path:
    for seed, corruption in enumerate(("fog", "identity")):
        folder = root / "mnist_c" / corruption
        for part, count in (("train", 30), ("test", 20)):
            save_npy(folder / f"{part}_images.npy", noise(count, 28, 28, 1, seed=seed))
            save_npy(folder / f"{part}_labels.npy", labels_of(count, 10).astype(np.int64))
    return root


# --------------------------------------------------------------------------------------------------- archives


@layout(
    "An archive of any of these",
    "photos.zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz",
    sizes=(6, 0, 4),
    classes=("cat", "dog"),
    about="Unpacked into a temporary folder, at most 100 times its size or 256 MiB, removed after reading. Links, devices, names "
    "that lead out and archives in it are refused.",
)
def zipped(root: Path) -> Path:
    folder(root / "photos")
    path = Path(shutil.make_archive(str(root / "photos"), "zip", root, "photos"))
    shutil.rmtree(root / "photos")
    return path


@layout(
    "CIFAR as it is downloaded",
    "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, cifar-100-…",
    sizes=(50, 0, 20),
    classes=TEN,
)
def cifar10_tar(root: Path) -> Path:
    cifar10_python(root)
    path = Path(shutil.make_archive(str(root / "cifar-10-python"), "gztar", root, "cifar-10-batches-py"))
    shutil.rmtree(root / "cifar-10-batches-py")
    return path
