"""How close pretraining comes to the model's own speed: `python tests/benchmark.py [--device cuda --batch-size 256]`.

Prints images/s and the share of the floor, measured in turns by one process:
    floor             train_step on views that are already on the device: the networks, the optimizer, the average
    whole step        what train_byol.py does for each batch: gather, two views, train_step
    augmentation      the two views alone, images already on the device
    common pipeline   torchvision's transforms image by image in DataLoader workers, fp32, contiguous memory
    host              milliseconds a batch that Python needs before a GPU can begin: the views' draws, gathering the
                      images where they stay on the host, and handing both over (0 without a GPU)
Peak memory: of each row on CUDA, where the first one records, and of the process on a CPU. ResNet18 from random weights
with the paper's heads. Images are noise, or those of --images FOLDER, which the common pipeline decodes as it goes.
"""
import argparse
import gc
import itertools
import os
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from byol import BYOL, build_optimizer  # noqa: E402
from data import batch_indices, cached_pixels, fetch, image_files, place  # noqa: E402
from encoders import Convolution, build_encoder  # noqa: E402
from train_byol import train_step  # noqa: E402
from utils import (can_compile, compiler, environment, keep_freed_memory, seeded_generator, seeded_init,  # noqa: E402
                   select_device, select_precision)
from views import IMAGENET_MEAN, IMAGENET_STD, VIEW_DRAWS, render_views, send, two_views  # noqa: E402


class TwoViews(Dataset):
    """What most repositories do: one image at a time, twice through torchvision's transforms."""

    def __init__(self, images: Tensor | list[Path], size: int):
        def view(blur_p, solarize_p):
            return v2.Compose([
                v2.RandomResizedCrop(size, scale=(0.08, 1), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2), v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], p=blur_p),
                v2.RandomSolarize(128, p=solarize_p), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        self.images, self.views = images, (view(1.0, 0.0), view(0.1, 0.2))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        image = (Image.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, Tensor)
                 else Image.open(image).convert("RGB"))
        return tuple(view(image) for view in self.views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--stem", default="7x7", choices=["7x7", "3x3"])
    parser.add_argument("--images", type=Path, help="a folder of images, at any depth")
    parser.add_argument("--seconds", type=float, default=20, help="of each row, at least, after its warm-up [20]")
    args = parser.parse_args()
    device = select_device(args.device)
    size, batch_size, precision = args.image_size, args.batch_size, select_precision("auto", device)
    files = image_files(args.images, Counter()) if args.images else []
    if files:
        pixels, _ = cached_pixels(args.images, files, Path("data"), size, max_unreadable=0)
    else:
        pixels = torch.randint(0, 256, (max(2000, 4 * batch_size), 3, size, size), dtype=torch.uint8,
                               generator=seeded_generator(0, "noise"))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds, memory, host = {}, {}, {}

    def timed(row, count):
        """Seconds a batch."""
        wait()
        start = time.perf_counter()
        for _ in range(count):
            row()
        wait()
        return (time.perf_counter() - start) / count

    def measure(rows, rounds=4):
        """Fill `seconds` and `memory`; in turns, so that a machine that slows down slows all rows."""
        counts, of = {}, {name: [] for name in rows}
        for name, row in rows.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timed(row, 2 * os.cpu_count() + 1 if name == "common pipeline" else 3)  # start and empty what is in store
            counts[name] = max(1, round(args.seconds / rounds / timed(row, 3)))
            memory[name] = f"   {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        for _ in range(rounds):
            for name, row in rows.items():
                of[name].append(timed(row, counts[name]))
        seconds.update({name: statistics.median(taken) for name, taken in of.items()})

    def build(memory_format):
        encoder, feature_dim = build_encoder("resnet18", "random", 0, args.stem)
        with seeded_init(0, "heads"):
            model = BYOL(encoder, feature_dim).to(device, memory_format=memory_format)
        return model, build_optimizer(model, 5e-4)

    def measure_ours():
        placed, step = place(pixels, device), itertools.count()
        model, optimizer = build(torch.channels_last)
        network, draw = map(compiler(device, sys.maxsize), (model, render_views))
        order = batch_indices(0, "order", len(pixels), batch_size, 0, sys.maxsize)

        def views_of(images):
            return two_views(images, size, seeded_generator(0, "views", next(step)), render_views=draw)

        def train(views):
            train_step(network, model, optimizer, views, 0.01, 0.99, precision)

        images = fetch(placed, next(order), device)
        views = tuple(view.clone() for view in views_of(images))  # the next ones take their place
        measure({"floor": lambda: train(views),
                 "whole step": lambda: train(views_of(fetch(placed, next(order), device))),
                 "augmentation": lambda: views_of(images)})
        measure_host(order)

    def measure_host(order):
        """Each part's median, without waiting for what it leaves to the GPU."""
        moments = []
        for step in range(200):
            moments.append([time.perf_counter()])
            draws = torch.rand(2, batch_size, VIEW_DRAWS, generator=seeded_generator(0, "views", step))
            moments[-1].append(time.perf_counter())
            images = fetch(pixels, next(order), torch.device("cpu"))
            moments[-1].append(time.perf_counter())
            send(draws, device), send(images, device)
            moments[-1].append(time.perf_counter())
            wait()
        for i, part in enumerate(("draws", "gather", "copies")):
            host[part] = 1000 * statistics.median(of_step[i + 1] - of_step[i] for of_step in moments)

    def measure_common():
        model, optimizer = build(torch.contiguous_format)
        for module in model.modules():
            if isinstance(module, Convolution):
                module.__class__ = nn.Conv2d
        loader = DataLoader(TwoViews(files or pixels, size), batch_size, shuffle=True, num_workers=os.cpu_count(),
                            drop_last=True, pin_memory=device.type == "cuda", persistent_workers=True)
        batches = itertools.chain.from_iterable(loader for _ in itertools.count())

        def step():
            loss = model(*(view.to(device, non_blocking=True) for view in next(batches)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target(0.99)

        measure({"common pipeline": step})

    measure_common()
    gc.collect()         # its workers end here
    keep_freed_memory()  # as the scripts do
    measure_ours()
    print(f"{environment(device)['hardware']}, {torch.get_num_threads()} threads, {os.cpu_count()} workers, "
          f"torch {torch.__version__}, {precision}{', compiled' * can_compile(device)}\n"
          f"ResNet18 ({args.stem}) at {size} px, batch {batch_size}, "
          f"{len(pixels):,} images{' of noise' * (not files)}\n")
    for name in ("floor", "whole step", "augmentation", "common pipeline"):
        speed, share = batch_size / seconds[name], seconds["floor"] / seconds[name]
        print(f"{name:<15} {speed:9.1f} images/s   {share:.2f}{memory[name]}")
    print(f"host            {sum(host.values()):9.2f} ms a batch     "
          + ", ".join(f"{part} {duration:.2f}" for part, duration in host.items()))
    if device.type != "cuda":
        print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
