"""Every dataset as one uint8 array [N,3,S,S]: STL-10, CIFAR-10, a folder of one's own, or patterns drawn here.

`load_split` is the way in. STL-10's unlabeled images are memory-mapped as they are; a folder's images are decoded once
into a cache that later runs map. An array larger than memory therefore costs address space only.
"""
import os
import shutil
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, STL10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.transforms.v2 import functional as tv

from utils import UserError, count, one_line, progress, read_json, say, seeded_generator, whole_file, write_json
from views import send

STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
PATTERN_COUNTS = {"unlabeled": 4000, "train": 2000, "test": 1000}
NOISE = 0.25  # standard deviation of what lies over the patterns, of pixels from 0 to 1
MAX_PIXELS = 100_000_000  # of an image as it is decoded; more is taken for a decompression bomb
FILES_OF_A_WORKER = 500  # images, at least, that a worker process is started for
# Image formats, where Pillow has them, and their endings; never EPS or WMF, which start other programs.
ENDINGS = {ending: kind for ending, kind in Image.registered_extensions().items()
           if kind in {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM"}}
FORMATS = [kind for kind in set(ENDINGS.values()) if kind in Image.OPEN]
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit holds for the whole of a large JPEG, which is decoded at a fraction


class Split(NamedTuple):
    pixels: Tensor         # uint8 [N,3,S,S], perhaps mapped from disk
    labels: Tensor | None  # int64 [N], 0 to len(classes) - 1; None where there are none
    classes: list[str]

    def stamp(self) -> str:
        """A digest of the images' number, labels and classes, and of the pixels of a thousand evenly spaced ones."""
        n, labels = len(self.pixels), [] if self.labels is None else self.labels.tolist()
        index = torch.linspace(0, n - 1, min(1000, n), dtype=torch.float64).long()
        pixels = fetch(self.pixels, index, torch.device("cpu")).numpy()
        return sha256(repr((n, self.classes, labels)).encode() + pixels.tobytes()).hexdigest()[:16]


def load_split(dataset: str, split: str, data_root: str, size: int, max_unreadable: float = 0.01) -> Split | None:
    """One split ("unlabeled", "train" or "test") of "stl10", "cifar10", "patterns" or a folder. size: pixels a side.
    The unlabeled images of the first two keep their own, as views are cut to size anyway. max_unreadable: share of a
    folder's images that may be. None where a folder lacks the split. Raises UserError for data that cannot be used."""
    root = Path(data_root)
    if dataset in ("stl10", "cifar10"):
        images = load_stl10(split, root) if dataset == "stl10" else load_cifar10(split != "test", root)
        if split == "unlabeled":
            return images._replace(labels=None)
        if (side := images.pixels.shape[-1]) < size:
            say(f"IMAGE_SIZE {size} enlarges the images: they have {side} pixels a side")
        pixels = tv.resize(images.pixels.contiguous(), [size, size], tv.InterpolationMode.BICUBIC, antialias=True)
        return images._replace(pixels=pixels)
    if dataset == "patterns":
        return draw_patterns(PATTERN_COUNTS[split], size, seeded_generator(0, "patterns", split))  # whatever the SEED
    if not Path(dataset).is_dir():
        raise UserError(f"DATASET {dataset!r} is neither 'stl10', 'cifar10', 'patterns' nor an existing folder")
    return load_folder(Path(dataset), split, root, size, max_unreadable)


def load_for_pretraining(dataset: str, *rest: Any) -> tuple[Split, Split | None]:
    """The images without labels, else those of train/; and train/, where there is one. rest: as `load_split` has it."""
    train, unlabeled = (load_split(dataset, split, *rest) for split in ("train", "unlabeled"))
    if unlabeled is None and train is None:
        raise UserError(f"DATASET {dataset!r} has neither unlabeled/ nor train/: there are no images to pretrain on")
    if unlabeled is None:
        say("no unlabeled/: pretraining on train/")
    return unlabeled or train, train


def load_stl10(split: str, root: Path) -> Split:
    """Map a split of STL-10, after downloading it where it is missing. Labels 1 to 10 become 0 to 9."""
    files = [root / "stl10_binary" / f"{split}_{kind}.bin" for kind in ("X" if split == "unlabeled" else "Xy")]
    if missing := [file for file in files if not file.exists()]:
        download_stl10(root, missing[0])
    pixels = map_pixels(files[0], side=96).transpose(2, 3)  # stored column by column
    if split == "unlabeled":
        return Split(pixels, None, STL10_CLASSES)
    labels = torch.from_numpy(np.fromfile(files[1], dtype=np.uint8)).long()
    if len(labels) != len(pixels) or not set(labels.tolist()) <= set(range(1, 11)):
        raise UserError(f"{files[1]} does not hold a label from 1 to 10 for each of the {len(pixels)} images of "
                        f"{files[0].name}: delete both to download them again")
    return Split(pixels, labels - 1, STL10_CLASSES)


@cache  # the training images are the unlabeled ones, too
def load_cifar10(train: bool, root: Path) -> Split:
    """CIFAR-10's training or test images, which torchvision downloads (170 MB) and checks."""
    try:
        images = CIFAR10(str(root), train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-10 could not be downloaded ({one_line(error)}): put {CIFAR10.filename} into {root}, or "
                        "try --demo") from error
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor(images.targets), images.classes)


def load_folds(data_root: str, n: int) -> list[Tensor]:
    """STL-10's ten predefined folds: the indices of 1,000 of the `n` training images each."""
    file = Path(data_root) / "stl10_binary" / "fold_indices.txt"
    try:
        folds = [torch.tensor([int(index) for index in line.split()]) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): it belongs to stl10_binary.tar.gz") from error
    if len(folds) != 10 or not all(len(fold) and 0 <= fold.min() and fold.max() < n for fold in folds):
        raise UserError(f"{file} does not hold ten lines of indices below {n}: take it from stl10_binary.tar.gz again")
    return folds


def download_stl10(root: Path, missing: Path) -> None:
    """Download STL-10 (2.6 GB), unless its archive is in `root`, and unpack it into `root`/stl10_binary; torchvision
    checks the archive's checksum. An archive that was there already is not deleted."""
    unpacking = root / "stl10_unpacking"  # renamed when whole, so a torn unpacking is never taken for the data
    archive = root / STL10.filename
    try:
        was_there, complete_it = archive.exists(), f"complete it by curl -C - -o {archive} {STL10.url}"
        say(f"unpacking {archive}" if was_there else f"downloading STL-10 (2.6 GB, once); if it breaks, {complete_it}")
        if was_there and not check_integrity(str(archive), STL10.tgz_md5):
            raise UserError(f"{archive} is torn: delete it, or {complete_it}")
        download_and_extract_archive(STL10.url, str(root), str(unpacking), STL10.filename, STL10.tgz_md5,
                                     remove_finished=not was_there)
        shutil.copytree(unpacking / "stl10_binary", missing.parent, dirs_exist_ok=True, copy_function=os.replace)
        shutil.rmtree(unpacking)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; RuntimeError is a wrong checksum
        raise UserError(f"{missing} is missing and STL-10 could not be downloaded ({one_line(error)}): put the .bin "
                        f"files of stl10_binary.tar.gz into {missing.parent}, or try --demo") from error


def map_pixels(file: Path, side: int) -> Tensor:
    """Map a file of raw images as uint8 [N,3,side,side]; nothing is read until it is used."""
    size, image = file.stat().st_size, 3 * side * side
    if size == 0 or size % image:
        raise UserError(f"{file} has {size} bytes, which is not a whole number of {side}x{side} images ({image} bytes "
                        "each): it is truncated or not what it should be; delete it to have it made again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tensor must not be written to, and is not
        # Read-only: Linux refuses a writable private mapping (torch.from_file's) that is larger than its memory.
        return torch.from_numpy(np.memmap(file, np.uint8, "r")).view(-1, 3, side, side)


def load_folder(folder: Path, split: str, root: Path, size: int, max_unreadable: float) -> Split | None:
    """`unlabeled/` at any depth, `train/<class>/` or `test/<class>/` as an array, decoded once into a cache."""
    top = folder / split
    if not is_folder(top):
        return None
    classes = [] if split == "unlabeled" else class_names(folder / "train")
    for name in class_names(top) if classes else []:
        if name not in classes:
            raise UserError(f"{top / name}: class {name!r} is not in {folder / 'train'}")
    files, labels, others = [], [], Counter()
    for label, part in enumerate([top / name for name in classes] or [top]):
        found = image_files(part, others) if is_folder(part) else []
        left_out = ", ".join(f"{n:,} {ending or 'without an ending'}" for ending, n in others.items())
        if not found:
            raise UserError(f"{part} holds no images" + f" of class {part.name!r}" * bool(classes)
                            + f", but {left_out}" * bool(others))
        files += found
        labels += [label] * len(found)
    if others:
        say(f"left out of {top}: {left_out}")
    pixels, kept = cached_pixels(top, files, root, size, max_unreadable)
    return Split(pixels, torch.tensor(labels)[kept] if classes else None, classes)


def class_names(top: Path) -> list[str]:
    """Names of the class folders below `top`, sorted."""
    entries = os.scandir(top) if is_folder(top) else ()
    names = sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{top} is missing, or holds no class folders: labelled images belong in {top}/<class>/")
    return names


def is_folder(path: Path | os.DirEntry) -> bool:
    """Whether it is one. Raises UserError for a link that leads nowhere, unless it is named like an image."""
    if path.is_symlink() and not os.path.exists(path) and not is_image(path):
        raise UserError(f"{os.fspath(path)} is a link that leads nowhere (to {os.readlink(path)}): mend or remove it")
    return path.is_dir()


def image_files(top: Path, others: Counter) -> list[Path]:
    """Image files below `top`, behind links, too, each folder once and always by the same way; sorted, without what is
    hidden. `others` counts all other files by their endings. Raises OSError for a folder that cannot be read."""
    found, folders, seen = [], [top], set()
    for folder in folders:  # grows on the way
        if (here := folder.resolve()) in seen:  # links may lead in circles
            continue
        seen.add(here)
        for entry in sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=os.fspath):
            (folders if is_folder(entry) else found).append(Path(entry.path))
    others.update(file.suffix.lower() for file in found if not is_image(file))
    return sorted(file for file in found if is_image(file))


def is_image(path: Path | os.DirEntry) -> bool:
    return os.path.splitext(path)[1].lower() in ENDINGS


def cached_pixels(top: Path, files: list[Path], root: Path, size: int, max_unreadable: float) -> tuple[Tensor, Tensor]:
    """Pixels [M,3,size,size] of the files that decode, and their indices [M] in `files`; from the cache if it fits. The
    cache is a raw array and a description: a digest of the names, sizes and times of the files that it was made from,
    and those that could not be read. Raises UserError where these are more than the share `max_unreadable`."""
    name = f"{top.parent.name}-{top.name}-{size}px-{sha256(os.fsencode(top.resolve())).hexdigest()[:8]}"
    array, description, reasons = (root / "cache" / (name + end) for end in (".bin", ".json", ".unreadable.txt"))
    found = [(file, file.stat() if file.exists() else file.lstat()) for file in files]  # a link that leads nowhere
    lines = [f"{file.relative_to(top)} {status.st_size} {status.st_mtime_ns}" for file, status in found]

    def without(unreadable):
        kept = [i for i, line in enumerate(lines) if line not in unreadable]
        return kept, sha256(os.fsencode("\n".join(lines[i] for i in kept))).hexdigest()

    whole = False
    with suppress(UserError, OSError, TypeError):  # no cache, or a torn one
        cached = read_json(description, "unreadable")
        kept, stamp = without(set(cached["unreadable"]))
        whole = cached.get("stamp") == stamp and array.stat().st_size == len(kept) * 3 * size * size
    if not whole:
        description.unlink(missing_ok=True)  # never an old description beside a new array
        unreadable = decode_files(top, files, array, size)
        kept, stamp = without({lines[i] for i in unreadable})
        reasons.unlink(missing_ok=True)
        if unreadable:
            with whole_file(reasons) as out:
                out.write(os.fsencode("".join(f"{files[i]}: {reason}\n" for i, reason in unreadable.items())))
        write_json(description, {"stamp": stamp, "unreadable": [lines[i] for i in unreadable]})
    if broken := len(files) - len(kept):
        what = f"{broken} of {count(len(files), 'image')} in {top} cannot be read (named in {reasons})"
        if broken > max_unreadable * len(files):
            raise UserError(f"{what}, more than MAX_UNREADABLE, {max_unreadable:.1%}: delete them, or raise it")
        say(f"skipped: {what}")
    return map_pixels(array, size), torch.tensor(kept)


def decode_files(top: Path, files: list[Path], array: Path, size: int) -> dict[int, str]:
    """Decode `files` into the raw file `array`. Returns the indices of those that cannot be read, and why. Gray images
    of more than 8 bits have one scale: that of the one that uses the most."""
    array.parent.mkdir(parents=True, exist_ok=True)
    for file in array.parent.glob(f"{array.name}.*.tmp"):
        if time.time() - file.stat().st_mtime > 3600:  # of a decoding that was killed: one that goes on writes
            file.unlink()
    needed, free = len(files) * 3 * size * size, shutil.disk_usage(array.parent).free
    say(f"decoding {count(len(files), 'image')} of {top}, once, into {needed / 1e9:.2f} GB")
    if needed > free:
        raise UserError(f"{array.parent} has {free / 1e9:.2f} GB free: make space, or choose another DATA_ROOT")
    bits = 8
    while isinstance(unreadable := decode_with(bits, top, files, array, size), int):
        bits = unreadable
    return unreadable


def decode_with(bits: int, top: Path, files: list[Path], array: Path, size: int) -> dict[int, str] | int:
    """`decode_files` in parallel, where gray images use `bits` at most; or, as soon as one uses more, how many."""
    unreadable = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        loader = iter(DataLoader(files, batch_size=16, collate_fn=partial(decode_images, size=size, bits=bits),
                                 generator=torch.Generator(), num_workers=min(cores, len(files) // FILES_OF_A_WORKER)))
    except OSError as error:
        raise UserError(f"processes that decode cannot start ({one_line(error)}): is /dev/shm writable?") from error
    with (whole_file(array, f".{os.getpid()}.tmp") as out,  # another run may be decoding the same folder
          progress(total=len(files), desc=f"reading {top}", unit="image") as bar):
        try:
            for index, image in enumerate(chain.from_iterable(loader)):
                bar.update()
                if isinstance(image, int):
                    return image
                if isinstance(image, str):
                    unreadable[index] = image
                else:
                    out.write(image.tobytes())
        except RuntimeError as error:  # torch's, where a worker has died
            raise UserError(f"a process that decodes {top} was killed ({one_line(error)}): is memory short?") from error
    return unreadable


def decode_images(files: list[Path], size: int, bits: int) -> list[np.ndarray | int | str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        return [decode_image(file, size, bits) for file in files]


def decode_image(file: Path, size: int, bits: int = 16) -> np.ndarray | int | str:
    """uint8 [3,size,size] of an image file: upright, RGB, on white, short side resized, centre cropped. Or what is
    wrong. Or, where a gray image of more than 8 bits uses more than `bits`, which become 8, how many it uses."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.draft("RGB", (2 * size, 2 * size))  # large JPEGs: decode at a fraction of their size
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}"
            image.load()  # TIFFs are upright now, and say so
            turn = None
            with suppress(Exception):  # of damaged or odd EXIF: the image is taken as it is stored
                turn = image.getexif().get(ExifTags.Base.Orientation)
            if image.mode.startswith("I"):  # convert("RGB") would clip it to white
                pixels = np.asarray(image)
                if (used := int(pixels.max()).bit_length()) > bits:
                    return used + used % 2  # sensors have an even number: a darker split has the same scale
                image = Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
            elif image.mode == "F":
                return "its pixels are floating-point numbers, whose range is unknown"
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            image.info.clear()  # odd EXIF, over which exif_transpose stumbles
            image.getexif()[ExifTags.Base.Orientation] = turn
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything
        return one_line(error)


def wave(phase: Tensor) -> Tensor:
    """A sine of a phase in turns."""
    return torch.sin(2 * torch.pi * phase)


PATTERNS = {  # -1 to 1, of an image's own axes u and v and the distance r from its own centre, in wavelengths
    "stripes": lambda u, v, r: wave(u),
    "checks": lambda u, v, r: torch.tanh(3 * wave(u / 1.4) * wave(v / 1.4)),
    "dots": lambda u, v, r: 2 * torch.exp(-18 * ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2)) - 1,
    "rings": lambda u, v, r: wave(r),
    "waves": lambda u, v, r: wave(u + wave(v / 3) / 2),
    "bricks": lambda u, v, r: (((u / 2 + v.floor() / 2) % 1 < 0.1) | (v % 1 < 0.2)) * 2.0 - 1,
    "scales": lambda u, v, r: wave(1.5 * torch.hypot((u + v.floor() / 2) % 1 - 0.5, v % 1)),
    "grid": lambda u, v, r: ((u % 1 < 0.2) | (v % 1 < 0.2)) * 2.0 - 1,
    "zigzag": lambda u, v, r: torch.tanh(3 * wave(u + (2 * (v % 1) - 1).abs())),
    "honeycomb": lambda u, v, r: (wave(u) + wave(-u / 2 + 0.866 * v) + wave(-u / 2 - 0.866 * v)) / 1.5}


def draw_patterns(n: int, size: int, generator: torch.Generator) -> Split:
    """Ten kinds of texture in gray: the --demo data, drawn in a moment. Every image turns, scales, shifts and shades
    its texture in its own way and lies under noise of its own, of which random features see much. Two crops of an image
    share the texture and its direction, but no brightness and little of the noise: that is what BYOL can find."""
    def uniform(low, high):
        return torch.rand(n, 1, 1, generator=generator) * (high - low) + low

    y, x = torch.arange(size).view(-1, 1), torch.arange(size)
    wavelength, angle = size / 32 * uniform(8, 12), uniform(0, 1)
    cos, sin = wave(angle + 0.25), wave(angle)
    u = (x * cos + y * sin) / wavelength + uniform(0, 1)
    v = (y * cos - x * sin) / wavelength + uniform(0, 1)
    radius = torch.hypot(x - uniform(0, size), y - uniform(0, size)) / wavelength
    labels, field = torch.arange(n) % len(PATTERNS), torch.empty(n, size, size)
    for k, texture in enumerate(PATTERNS.values()):
        field[labels == k] = texture(*(values[labels == k] for values in (u, v, radius)))
    contrast = uniform(0.48, 0.64) * torch.where(uniform(-1, 1) < 0, -1, 1)
    pixels = uniform(0.4, 0.6) + contrast * field + NOISE * torch.randn(n, size, size, generator=generator)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Split(pixels[:, None].expand(-1, 3, -1, -1), labels, list(PATTERNS))


def place(pixels: Tensor, device: torch.device) -> Tensor:
    """The array in the GPU's memory where it fits in half of what is free there, else where it is."""
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels


def fetch(pixels: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """The images `index`, on `device`, without waiting for a GPU."""
    index = send(index, pixels.device)
    if pixels.is_contiguous():
        return send(pixels.index_select(0, index), device)
    # STL-10's columns: as they are stored, torch copies whole images, five times as fast as pixel by pixel.
    return send(pixels.transpose(2, 3).index_select(0, index).transpose(2, 3), device)


def batch_indices(seed: int, purpose: str, n: int, batch_size: int, first_step: int, total_steps: int, rank: int = 0,
                  world: int = 1) -> Iterator[Tensor]:
    """For each step from `first_step` on, the indices of this process's share of its batch, of `n` images. Each pass
    takes the images in an order of its own; the remainder that fills no batch is dropped."""
    steps_per_pass, order = n // batch_size, None
    for step in range(first_step, total_steps):
        number, batch = divmod(step, steps_per_pass)
        if order is None or batch == 0:
            order = torch.randperm(n, generator=seeded_generator(seed, purpose, number))
        yield order[batch * batch_size:(batch + 1) * batch_size][rank::world].contiguous()


def batches(pixels: Tensor, indices: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each index, on `device`. Those that come from the host to a GPU are gathered ahead, by a thread of
    their own, while the step before them runs."""
    if device.type in (pixels.device.type, "mps"):  # torch crashes where two threads ask MPS for work
        yield from (fetch(pixels, index, device) for index in indices)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = (pool.submit(fetch, pixels, index, device) for index in indices)
        for ready, _ in pairwise(chain(ahead, [None])):  # the next one is begun before this one is used
            yield ready.result()
