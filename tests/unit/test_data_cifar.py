"""CIFAR by name: the binary archive, its download and its checksum."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from clead.data.datasets import DATASETS, cifar
from clead.data.datasets.cifar_files import VERSIONS
from clead.errors import UserError


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def publish(tmp_path, monkeypatch, name, **changes):
    """Serve a small archive of the same layout by a file:// address; return (images, labels) of all parts."""
    archive, version = cifar.ARCHIVES[name], VERSIONS[f"{name}_binary"]
    random = np.random.RandomState(0)
    count = 2 * version.classes
    names = [f"class_{k}" for k in range(version.classes)]
    members, content = {version.names: "\n".join([*names, "", ""]).encode()}, {}
    for member in (*version.train, version.test):
        pixels = random.randint(0, 256, (count, 3072), dtype=np.uint8)
        labels = random.permutation(np.repeat(np.arange(version.classes, dtype=np.uint8), 2))
        head = [labels] if version.label_bytes == 1 else [labels // 5, labels]  # coarse, then fine
        members[member] = np.concatenate([np.stack(head, 1), pixels], axis=1).tobytes()
        content[member] = pixels.reshape(-1, 3, 32, 32), labels
    file = tmp_path / "server" / archive.url.rsplit("/", 1)[1]
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(f"{version.folder}/{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    small = {"url": file.as_uri(), "md5": hashlib.md5(file.read_bytes()).hexdigest(), **changes}
    monkeypatch.setitem(cifar.ARCHIVES, name, archive._replace(**small))
    return version, content, file


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_is_downloaded_once_and_parsed(name, tmp_path, monkeypatch, capsys):
    version, content, server = publish(tmp_path, monkeypatch, name)
    splits = DATASETS.get(name)().load(0)
    assert splits.classes[:2] == ("class_0", "class_1") and len(splits.classes) == version.classes
    images, labels = content[version.test]
    assert np.array_equal(splits.test.images.numpy(), images)
    assert np.array_equal(splits.test.labels.numpy(), labels)
    oracle = {bytes(image): label for part in version.train for image, label in zip(*content[part], strict=True)}
    both = zip(
        torch.cat([splits.train.images, splits.val.images]).numpy(),
        torch.cat([splits.train.labels, splits.val.labels]).tolist(),
        strict=True,
    )
    assert {bytes(image): label for image, label in both} == oracle
    assert [file.name for file in (tmp_path / "data").iterdir()] == [server.name]
    server.unlink()
    assert DATASETS.get(name)().load(0).fingerprint == splits.fingerprint
    out = capsys.readouterr()
    assert out.out == "" and "downloading" in out.err


def test_wrong_checksum_leaves_nothing(tmp_path, monkeypatch):
    publish(tmp_path, monkeypatch, "cifar10", md5="0" * 32)
    with pytest.raises(UserError, match="checksum must be 0{32}, got"):
        DATASETS.get("cifar10")().load(0)
    assert list((tmp_path / "data").iterdir()) == []


def test_damaged_file_is_refused(tmp_path, monkeypatch):
    _, _, server = publish(tmp_path, monkeypatch, "cifar10")
    DATASETS.get("cifar10")().load(0)
    (tmp_path / "data" / server.name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete the file"):
        DATASETS.get("cifar10")().load(0)


def test_no_network_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    absent = cifar.ARCHIVES["cifar10"]._replace(url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", absent)
    with pytest.raises(UserError) as caught:
        DATASETS.get("cifar10")().load(0)
    message = str(caught.value)
    assert "\n" not in message and "--data.path" in message and "CLEAD_DATA" in message and absent.url in message
    assert list((tmp_path / "data").iterdir()) == []
