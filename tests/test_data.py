"""Datasets: STL-10's own format, folders of images of every kind, the cache, the patterns."""
import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from data import (PATTERNS, batches, decode_image, fetch, image_files, load_folds, load_for_pretraining, load_split,
                  map_pixels, place)
from utils import UserError, seeded_generator


# ---------------------------------------------------------------------------------------------------------- STL-10

def write_stl10(root, counts=(("unlabeled", 30), ("train", 20), ("test", 10))):
    """Small files in STL-10's format: images column-major, labels 1 to 10, folds. Returns the images, row-major."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = {}
    for seed, (split, n) in enumerate(counts):
        images[split] = np.random.default_rng(seed).integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        images[split].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    rng = np.random.default_rng(9)
    folds = [rng.permutation(counts[1][1])[:counts[1][1] // 2] for _ in range(10)]
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + " \n" for fold in folds))
    return images


def test_stl10_is_read_as_torchvision_reads_it_and_mapped_without_a_warning(tmp_path):
    images = write_stl10(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = {split: load_split("stl10", split, str(tmp_path), 96) for split in images}
    for split, (pixels, labels, classes) in loaded.items():
        assert pixels.dtype == torch.uint8 and np.array_equal(pixels.numpy(), images[split]) and len(classes) == 10
        if split == "unlabeled":
            assert labels is None, "STL-10's missing labels are no class"
        else:
            assert labels.tolist() == [i % 10 for i in range(len(labels))]
    expected = np.loadtxt(tmp_path / "stl10_binary" / "fold_indices.txt", dtype=int)
    assert np.array_equal(torch.stack(load_folds(str(tmp_path), 20)).numpy(), expected) and expected.shape == (10, 10)
    assert load_split("stl10", "train", str(tmp_path), 32).pixels.shape == (20, 3, 32, 32)
    assert load_split("stl10", "unlabeled", str(tmp_path), 32).pixels.shape == (30, 3, 96, 96), "mapped at any size"


def test_stl10_is_downloaded_once_and_only_taken_when_whole(tmp_path, monkeypatch):
    calls = []

    def download(url, root, extract_root, filename, md5, remove_finished):
        calls.append(md5)
        write_stl10(tmp_path / "stl10_unpacking")

    monkeypatch.setattr(data, "download_and_extract_archive", Mock(side_effect=OSError("Network is unreachable")))
    with pytest.raises(UserError, match=r"unlabeled_X.bin is missing .*unreachable.*stl10_binary, or try --demo"):
        load_split("stl10", "unlabeled", str(tmp_path), 96)
    monkeypatch.setattr(data, "download_and_extract_archive", download)
    for split in ("unlabeled", "train", "test"):
        load_split("stl10", split, str(tmp_path), 96)
    assert calls == ["91f7769df0f17e558f3565bffb0c7dfb"] and not (tmp_path / "stl10_unpacking").exists()


def test_an_archive_that_the_user_has_put_there_is_unpacked_and_kept(tmp_path, monkeypatch, capsys):
    write_stl10(tmp_path / "made")
    archive = tmp_path / "data" / data.STL10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "stl10_binary", "stl10_binary")
    whole = archive.read_bytes()
    monkeypatch.setattr(data.STL10, "tgz_md5", hashlib.md5(whole).hexdigest())
    archive.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="stl10_binary.tar.gz is torn: delete it, or complete it by curl -C - -o /"):
        load_split("stl10", "unlabeled", str(tmp_path / "data"), 96)
    archive.write_bytes(whole)
    capsys.readouterr()
    assert len(load_split("stl10", "unlabeled", str(tmp_path / "data"), 96).pixels) == 30
    assert archive.read_bytes() == whole and "downloading" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- CIFAR-10

def write_cifar10(root, monkeypatch, per_batch=4, test=10):
    """Small files in CIFAR-10's format, with their own checksums. Returns the training images, [N,3,32,32]."""
    folder, names = root / data.CIFAR10.base_folder, [f"label {i}" for i in range(10)]
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    images = np.random.default_rng(0).integers(0, 256, (5 * per_batch, 3072), dtype=np.uint8)
    parts = [{"data": part, "labels": [i % 10 for i in range(per_batch)]} for part in np.split(images, 5)]
    monkeypatch.setattr(data.CIFAR10, "train_list", [write(f"data_batch_{i}", part) for i, part in enumerate(parts, 1)])
    last = {"data": images[:test], "labels": [i % 10 for i in range(test)]}
    monkeypatch.setattr(data.CIFAR10, "test_list", [write("test_batch", last)])
    name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(data.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return images.reshape(-1, 3, 32, 32)


def test_cifar10_is_read_as_it_is_stored_and_its_training_images_are_the_unlabeled_ones_too(tmp_path, monkeypatch,
                                                                                           capsys):
    images = write_cifar10(tmp_path, monkeypatch)
    for split, expected in (("unlabeled", images), ("train", images), ("test", images[:10])):
        pixels, labels, classes = load_split("cifar10", split, str(tmp_path), 32)
        assert pixels.dtype == torch.uint8 and np.array_equal(pixels.numpy(), expected)
        assert classes == [f"label {i}" for i in range(10)]
        assert labels is None if split == "unlabeled" else labels.tolist()[:5] == ([0, 1, 2, 3, 0], [0, 1, 2, 3, 4])[
            split == "test"]
    assert capsys.readouterr().out == ""
    assert load_split("cifar10", "train", str(tmp_path), 48).pixels.shape == (20, 3, 48, 48)
    assert capsys.readouterr().out == "IMAGE_SIZE 48 enlarges the images: they have 32 pixels a side\n"
    assert load_split("cifar10", "unlabeled", str(tmp_path), 48).pixels.shape == (20, 3, 32, 32)
    assert capsys.readouterr().out == "", "said once"
    unlabeled, train = load_for_pretraining("cifar10", str(tmp_path), 32)
    assert unlabeled.pixels is train.pixels, "read once"


def test_cifar10_that_is_torn_or_missing_is_downloaded_again(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / data.CIFAR10.base_folder / "data_batch_3").write_bytes(b"torn")
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive",
                        Mock(side_effect=OSError("Network is unreachable")))
    with pytest.raises(UserError, match=r"CIFAR-10 could not be .*unreachable\): put cifar-10-python.tar.gz into"):
        load_split("cifar10", "train", str(tmp_path), 32)


# ---------------------------------------------------------------------------------------------------------- folder

def write_folder(root, classes=("a", "b"), per_class=3, unlabeled=6, size=20):
    """A folder dataset; every image has a colour of its own."""
    rng = np.random.default_rng(0)
    splits = {f"{split}/{name}": per_class for split in ("train", "test") for name in classes}
    for path, n in {**splits, "unlabeled/some/depth": unlabeled}.items():
        (root / path).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = np.full((size, size, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / path / f"{i}.png")
    return root


def load(root, split, size=16):
    return load_split(str(root), split, str(root.parent / "cache_root"), size)


def test_folder_splits(tmp_path, capsys):
    root = write_folder(tmp_path / "images")
    train, unlabeled = load(root, "train"), load(root, "unlabeled")
    assert train.pixels.shape == (6, 3, 16, 16) and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert unlabeled.pixels.shape == (6, 3, 16, 16) and unlabeled.labels is None and train.classes == ["a", "b"]
    for i, label in enumerate(train.labels):
        expected = np.asarray(Image.open(root / "train" / train.classes[label] / f"{i % 3}.png"))[0, 0]
        assert train.pixels[i, :, 0, 0].tolist() == expected.tolist()
    (root / "unlabeled").rename(root / "elsewhere")
    assert load(root, "unlabeled") is None
    images, labelled = load_for_pretraining(str(root), str(tmp_path / "cache_root"), 16)
    assert images is labelled and torch.equal(images.pixels, train.pixels)
    assert capsys.readouterr().out.endswith("\nno unlabeled/: pretraining on train/\n")


@pytest.mark.parametrize("suffix, mode", [("jpg", "L"), ("jpg", "RGB"), ("jpg", "CMYK"), ("png", "1"), ("png", "L"),
                                          ("png", "P"), ("png", "LA"), ("png", "RGBA"), ("webp", "RGB"),
                                          ("webp", "RGBA"), ("bmp", "L"), ("bmp", "P"), ("bmp", "RGB")])
def test_images_of_every_kind_become_rgb(tmp_path, suffix, mode):
    Image.new("RGB", (30, 20), (200, 40, 90)).convert(mode).save(tmp_path / f"x.{suffix}")
    pixels = decode_image(tmp_path / f"x.{suffix}", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    if mode in ("RGB", "CMYK", "RGBA"):
        assert np.abs(pixels[:, 8, 8].astype(int) - [200, 40, 90]).max() < 12
    if mode in ("1", "L", "LA"):
        assert np.ptp(pixels[:, 8, 8].astype(int)) < 3


def test_gray_images_of_more_than_8_bits_share_the_scale_of_the_one_that_uses_the_most(tmp_path):
    """A microscope's 12 bits in a file of 16 are not near black."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    top = tmp_path / "images" / "unlabeled"
    top.mkdir(parents=True)
    for name, pixels in (("a.png", ramp >> 6), ("b.tif", ramp >> 4), ("c.png", (ramp >> 8).astype(np.uint8))):
        Image.fromarray(pixels).save(top / name)
    assert decode_image(top / "b.tif", 64, bits=10) == 12
    pixels = load(tmp_path / "images", "unlabeled", size=64).pixels[:, 0].float()
    expected = torch.from_numpy(ramp / 257).float()
    for image, scale in zip(pixels, (1 / 4, 1, 1)):
        torch.testing.assert_close(image, expected * scale, atol=2, rtol=0)
    Image.fromarray(ramp >> 5).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", 64, bits=8) == 12, "a darker split of the same sensor uses 11 of its 12"
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "x.tif")
    assert "floating-point" in decode_image(tmp_path / "x.tif", 64), "its range is anybody's guess"


@pytest.mark.parametrize("mode, suffix", [
    ("LA", "png"), ("RGBA", "png"), ("RGBA", "webp"), ("P", "png"), ("RGB", "png"), ("L", "png"), ("PA", "tif"),
    ("RGBA", "jp2")])
def test_transparency_lies_on_white(tmp_path, mode, suffix):
    """Black ink on transparent black."""
    image, options = Image.new("RGBA", (32, 32)), {}
    image.paste((0, 0, 0, 255), (0, 0, 32, 16))
    if mode in ("RGB", "L", "P"):  # one colour is transparent
        image = Image.new("L", (32, 32), 7)
        image.paste(0, (0, 0, 32, 16))
        image, options = image.convert(mode), {"transparency": (7, 7, 7) if mode == "RGB" else 7}
    elif mode == "PA":
        image = Image.merge("LA", (image.getchannel(0), image.getchannel(3)))
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"x.{suffix}", **options)
    pixels = decode_image(tmp_path / f"x.{suffix}", 16)
    assert pixels[:, :6].max() < 30 and pixels[:, -6:].min() > 225


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "tif", "tiff", "gif", "avif", "jp2", "ppm", "pgm", "apng"])
def test_other_endings_are_images_too(tmp_path, suffix):
    if f".{suffix.lower()}" not in data.ENDINGS:
        pytest.skip("this Pillow has no such format")
    Image.new("RGB", (20, 20), (200, 40, 90)).save(tmp_path / f"x.{suffix}")
    assert image_files(tmp_path, Counter()) == [tmp_path / f"x.{suffix}"]
    pixels = decode_image(tmp_path / f"x.{suffix}", 16)
    assert suffix == "pgm" or np.abs(pixels[:, 8, 8].astype(int) - [200, 40, 90]).max() < 12


def test_files_that_start_other_programs_are_never_opened(tmp_path):
    assert not {".eps", ".ps", ".wmf", ".emf"} & data.ENDINGS.keys()
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert "cannot identify" in decode_image(tmp_path / "x.png", 16)


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "x.png")
    shown = decode_image(tmp_path / "x.png", 16)
    assert (shown[:, :, 1:-1] == 255).all() and shown.min() > 200  # the outermost columns are resampled with the black


@pytest.mark.parametrize("tag, value", [(0x11A, b"72\0\0"), (0x103, b"\6\0\0\0"), (0x8769, b"\0\0\0\1")])
def test_the_orientation_alone_is_read_of_odd_exif(tmp_path, tag, value):
    """A phone's XResolution as text, a compression as text, a pointer that leads out of the file."""
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))  # white above
    kind, length = (4, 1) if tag == 0x8769 else (2, 3)
    exif = (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHII", 0x112, 3, 1, 3)
            + struct.pack("<HHI4s", tag, kind, length, value) + struct.pack("<I", 0))
    image.save(tmp_path / "x.jpg", exif=exif)
    pixels = decode_image(tmp_path / "x.jpg", 16)
    assert pixels[:, :6].max() < 30 and pixels[:, -6:].min() > 225, "upside down"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\10\0\7"])
def test_an_image_whose_exif_cannot_be_read_is_taken_as_it_is_stored(tmp_path, exif):
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))
    image.save(tmp_path / "x.jpg", exif=exif)
    pixels = decode_image(tmp_path / "x.jpg", 16)
    assert pixels[:, :6].min() > 225 and pixels[:, -6:].max() < 30


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])  # Pillow itself turns a TIFF, as it loads it
def test_each_orientation_is_what_pillow_makes_of_it(tmp_path, turn, suffix, generator):
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"x.{suffix}"))).transpose(2, 0, 1)
    assert np.array_equal(decode_image(tmp_path / f"x.{suffix}", 16), expected)


def test_what_is_hidden_is_no_image_and_links_to_folders_are_followed(tmp_path):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for name in ("a.png", ".b.png", "deep/c.png", ".hidden/d.png", "deep/.thumbnails/e.png", "../elsewhere/f.png"):
        (top / name).parent.mkdir(exist_ok=True, parents=True)
        (top / name).touch()
    assert image_files(top, Counter()) == [top / "a.png", top / "deep" / "c.png"]
    (top / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(top)  # a circle: every image again, and again
    (top / "shown").symlink_to(top / ".hidden")
    assert image_files(top, Counter()) == [top / name for name in ("a.png", "deep/c.png", "link/f.png", "shown/d.png")]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_files(tmp_path / "nowhere", Counter())  # not taken for an empty one


def test_a_folder_is_decoded_once_and_a_torn_cache_is_made_again(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "images")
    first = load(root, "train").pixels.clone()
    assert capsys.readouterr().out == f"decoding 6 images of {root / 'train'}, once, into 0.00 GB\n"
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_image", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load(root, "train").pixels, first) and not capsys.readouterr().out
    for suffix, length in ((".bin", -5), (".json", 20)):
        for file in (tmp_path / "cache_root" / "cache").glob("*" + suffix):
            file.write_bytes(file.read_bytes()[:length])
        assert torch.equal(load(root, "train").pixels, first) and "decoding" in capsys.readouterr().out


def test_the_cache_follows_the_files_and_the_size(tmp_path):
    root = write_folder(tmp_path / "images")
    assert load(root, "train").pixels.shape == (6, 3, 16, 16)
    assert load(root, "train", size=24).pixels.shape == (6, 3, 24, 24)
    Image.new("RGB", (20, 20), (1, 2, 3)).save(root / "train" / "a" / "0.png")
    os.utime(root / "train" / "a" / "0.png", ns=(1, 1))
    assert load(root, "train").pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    Image.new("RGB", (20, 20)).save(root / "train" / "b" / "new.png")
    assert len(load(root, "train").labels) == 7


def test_several_processes_decode_as_one_does_and_skip_what_is_broken(tmp_path, monkeypatch, capsys):
    root, workers, loader = write_folder(tmp_path / "images", per_class=60), [], data.DataLoader
    (root / "train" / "a" / "5.png").write_bytes(b"no image")

    def counted(*args, num_workers, **kwargs):
        workers.append(num_workers)
        return loader(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr(data, "DataLoader", counted)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    one = load(root, "train")
    assert len(one.pixels) == 119 and one.labels.tolist() == [0] * 59 + [1] * 60
    monkeypatch.setattr(data, "FILES_OF_A_WORKER", 40)
    os.utime(root / "train" / "a" / "0.png", ns=(1, 1))
    assert torch.equal(load(root, "train").pixels, one.pixels) and workers == [0, 3]
    assert capsys.readouterr().out.count("skipped: 1 of 120 images") == 2


def test_all_images_that_cannot_be_read_are_listed_and_nothing_is_decoded_again(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "images")
    broken = [root / "train" / name for name in ("a/1.png", "b/2.png")]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken[0])
    broken[0].write_bytes(broken[0].read_bytes()[:2000])
    Image.new("RGB", (20, 20)).save(broken[1], format="ICO")
    with pytest.raises(UserError, match=r"2 of 6 images .*/train cannot be read \(named in .*\.unreadable\.txt\), more "
                                        "than MAX_UNREADABLE, 1.0%: delete them, or raise it") as error:
        load(root, "train")
    listed = Path(str(error.value).split("named in ")[1].split(")")[0]).read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [str(file) for file in broken]
    monkeypatch.setattr(data, "decode_files", lambda *a: pytest.fail("decoded again"))
    raised = load_split(str(root), "train", str(tmp_path / "cache_root"), 16, 0.5)
    assert len(raised.pixels) == 4 and raised.labels.tolist() == [0, 0, 1, 1]
    assert "skipped: 2 of 6 images" in capsys.readouterr().out
    for file in broken:
        file.unlink()
    deleted = load(root, "train")
    assert torch.equal(deleted.pixels, raised.pixels) and deleted.labels.tolist() == [0, 0, 1, 1]
    monkeypatch.undo()
    Image.new("RGB", (20, 20)).save(broken[0])  # mended
    assert len(load(root, "train").pixels) == 5


def test_a_large_photograph_is_read_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    Image.new("RGB", (640, 480), (200, 40, 90)).save(tmp_path / "x.jpg")
    Image.new("RGB", (640, 480), (200, 40, 90)).save(tmp_path / "x.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 80_000)
    assert np.abs(decode_image(tmp_path / "x.jpg", 16)[:, 8, 8].astype(int) - [200, 40, 90]).max() < 12
    assert decode_image(tmp_path / "x.png", 16) == "640x480 pixels, more than 80,000", "a decompression bomb"
    assert Image.MAX_IMAGE_PIXELS is None, "Pillow's own limit knows nothing of the fraction"


def test_decoding_needs_space_and_processes(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=4607))  # a byte less than 6 images
        with pytest.raises(UserError, match="has 0.00 GB free: make space, or choose another DATA_ROOT"):
            load(root, "train")
    with monkeypatch.context() as patch:
        patch.setattr(data, "DataLoader", Mock(side_effect=OSError(30, "Read-only file system")))
        with pytest.raises(UserError, match="cannot start .*Read-only file system.*/dev/shm"):
            load(root, "train")
    monkeypatch.setattr(data, "decode_images", Mock(side_effect=RuntimeError("DataLoader worker (pid 7) is killed")))
    monkeypatch.setattr(data, "DataLoader", lambda files, collate_fn, **k: (collate_fn([file]) for file in files))
    with pytest.raises(UserError, match="was killed .*pid 7.*is memory short"):
        load(root, "train")
    assert not [file for file in (tmp_path / "cache_root" / "cache").iterdir() if file.suffix != ".txt"]


def test_what_a_killed_decoding_left_is_removed_and_what_another_writes_is_not(tmp_path):
    root = write_folder(tmp_path / "images")
    load(root, "train")
    array = next((tmp_path / "cache_root" / "cache").glob("*-train-*.bin"))
    killed, other = (array.with_name(f"{array.name}.{pid}.tmp") for pid in (7, 8))
    killed.touch(), other.touch()
    os.utime(killed, (0, 0))
    array.unlink()
    load(root, "train")
    assert array.exists() and other.exists() and not killed.exists()


def test_what_is_no_image_is_counted(tmp_path, capsys):
    root = write_folder(tmp_path / "images")
    for name in ("a/1.heic", "a/2.HEIC", "a/notes", "b/3.txt", "b/.hidden"):
        (root / "train" / name).touch()
    load(root, "train")
    out = capsys.readouterr().out
    assert f"left out of {root / 'train'}: 2 .heic, 1 without an ending, 1 .txt\n" in out
    for file in (root / "train" / "b").glob("*.png"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match="train/b holds no images of class 'b', but 5 .heic, 1 without an ending"):
        load(root, "train")


@pytest.mark.parametrize("link", ["unlabeled", "unlabeled/more", "train", "train/c"])
def test_a_link_to_a_folder_that_is_not_there_is_an_error(tmp_path, link):
    root = write_folder(tmp_path / "images")
    if (root / link).exists():
        shutil.rmtree(root / link)
    (root / link).symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=f"/{link} is a link that leads nowhere .to .*unmounted"):
        load_for_pretraining(str(root), str(tmp_path / "cache_root"), 16)


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "test" / "c").mkdir(), "class 'c' is not in"),
    (lambda root: (root / "train" / "c").mkdir(), "no images of class 'c'"),
    (lambda root: shutil.rmtree(root / "test" / "b"), "test/b holds no images of class 'b'"),
    (lambda root: shutil.rmtree(root / "train"), "train is missing, or holds no .*: labelled images belong in"),
    (lambda root: shutil.rmtree(root), "images' is neither 'stl10', 'cifar10', 'patterns' nor an existing folder")])
def test_folders_that_are_no_dataset_are_named(tmp_path, spoil, message):
    root = write_folder(tmp_path / "images")
    spoil(root)
    with pytest.raises(UserError, match=message):
        load(root, "train"), load(root, "test")


# -------------------------------------------------------------------------------------------------------- patterns

def test_patterns_are_deterministic_and_their_splits_differ():
    first, again = (load_split("patterns", "train", "", 32) for _ in range(2))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.pixels[:1000], load_split("patterns", "test", "", 32).pixels)


def test_patterns_hold_every_kind_equally_often_and_give_nothing_away_by_brightness_or_colour():
    """The mean of each channel, by which the easiest shortcut would go, tells a class from another at most weakly."""
    split = data.draw_patterns(2000, 32, seeded_generator(0, "x"))
    assert split.pixels.shape == (2000, 3, 32, 32) and split.pixels.dtype == torch.uint8
    assert torch.bincount(split.labels).tolist() == [200] * 10 and split.classes == list(PATTERNS)
    mean = split.pixels.float().mean(dim=(2, 3))
    assert (mean[:, 0] - mean[:, 1]).abs().max() < 1, "no colour"
    of_class = torch.stack([mean[split.labels == k, 0].mean() for k in range(10)])
    assert of_class.std() < 0.5 * mean[:, 0].std()


# ----------------------------------------------------------------------------------------- stamps, where arrays live

def test_a_stamp_notices_every_image_label_and_class_and_neither_time_nor_path(tmp_path):
    root = write_folder(tmp_path / "images")
    stamp = load(root, "train").stamp()
    moved = root.rename(tmp_path / "moved")
    for file in moved.rglob("*.png"):
        os.utime(file, ns=(1, 1))
    split = load(moved, "train")
    assert split.stamp() == stamp
    changed = [split._replace(classes=["a", "c"]), split._replace(labels=split.labels.flip(0)), load(moved, "test")]
    for image in range(6):
        changed.append(split._replace(pixels=split.pixels.clone()))
        changed[-1].pixels[image, -1, -1, -1] ^= 1
    assert len({stamp, *(other.stamp() for other in changed)}) == 10


def test_fetch_takes_the_images_asked_for(device, tmp_path):
    images = write_stl10(tmp_path)["unlabeled"]
    pixels, index = load_split("stl10", "unlabeled", str(tmp_path), 96).pixels, torch.tensor([7, 3, 29])
    for array in (pixels, pixels.contiguous(), place(pixels, device)):
        batch = fetch(array, index, device)
        assert batch.device.type == device.type and np.array_equal(batch.cpu().numpy(), images[index.numpy()])


@pytest.mark.parametrize("kind", ["cpu", "mps", "meta"])
def test_batches_come_in_order_and_are_gathered_ahead_for_a_gpu_alone(kind, monkeypatch):
    """`meta` stands in for it. torch crashes where two threads ask MPS for work."""
    gathered, threads, pixels = [], set(), torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)

    def recorded(pixels, index, device):
        gathered.append(index.tolist())
        threads.add(threading.current_thread())
        return fetch(pixels, index, torch.device("cpu"))

    monkeypatch.setattr(data, "fetch", recorded)
    indices, found = [torch.tensor([k, 9 - k]) for k in range(5)], []
    for batch in batches(pixels, iter(indices), torch.device(kind)):
        found.append(batch)
        if kind != "meta":
            assert len(gathered) == len(found) and threads == {threading.current_thread()}
        else:
            assert threading.current_thread() not in threads
    assert gathered == [index.tolist() for index in indices]
    assert all(torch.equal(batch, pixels[index]) for batch, index in zip(found, indices, strict=True))
    assert list(batches(pixels, iter([]), torch.device(kind))) == []


def test_a_batch_is_gathered_while_the_step_before_it_runs(monkeypatch):
    """The step waits until the next batch is there, which it would do for ever if that were gathered after it."""
    gathered = [threading.Event() for _ in range(3)]

    def recorded(pixels, index, device):
        gathered[index].set()
        return index

    monkeypatch.setattr(data, "fetch", recorded)
    for step in batches(torch.empty(0), iter(range(3)), torch.device("meta")):
        assert step == 2 or gathered[step + 1].wait(timeout=60)


def test_an_array_larger_than_memory_is_mapped(tmp_path):
    """A file with a hole for what is not there: it takes no space on the disk."""
    side, count = 1024, 2 ** 40 // (3 * 1024 ** 2)
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(count * 3 * side ** 2)
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
    pixels = map_pixels(tmp_path / "large.bin", side)
    assert len(pixels) == count and pixels[-1, -1, -1, -1] == 7
