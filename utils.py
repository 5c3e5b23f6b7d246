"""What both scripts share: constants and flags, randomness, device and precision, encoders, features and kNN."""
import argparse
import ast
import contextlib
import ctypes
import difflib
import functools
import importlib.util
import io
import math
import os
import pickle
import platform
import re
import shutil
import sys
import sysconfig
import time
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from byol import normalize, parameter_groups

# `--demo`: what both scripts share of it; each adds its own
DEMO = {"DATASET": "patterns", "IMAGE_SIZE": 32, "INIT": "random", "RUN": "demo"}

# What torch.load raises for a file that is torn, foreign, or holds more than tensors and plain values
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError,
              pickle.UnpicklingError)


class UserError(Exception):
    """A mistake the user can mend: one line that names the cause, the file or constant, and the way out."""
    status = 1


class UsageError(UserError):
    """The mistake is in the command line or in a constant."""
    status = 2


class CannotWrite(UserError):
    """The run's folder takes no more; what was saved before is whole."""


class Stopped(Exception):
    """The user asked for a stop, and everything is saved; `signum` becomes the exit status 128 + signum."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 128 + signum


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def run_script(script: dict, argv: list[str] | None) -> int:
    """Read constants and flags, call the script's `run(constants)`, and return the exit status.

    script: the script's globals(). A UserError ends in one line on stderr; a bug of ours keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as it comes
    keep_freed_memory()
    constants = None
    try:
        try:
            constants = read_constants(script, argv)
            script["run"](constants)
            status = 0
        except Stopped as stop:
            print(f"{stop}{how_again(constants)}")
            status = stop.status
        except KeyboardInterrupt:
            print("stopped at once: what was saved before is whole, and the same command continues from there"
                  + how_again(constants))
            return 130
        leave_processes()
        return status
    except BrokenPipeError:  # whoever read our lines has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left when it exits
        return 141  # 128 + SIGPIPE
    except UserError as error:
        print(f"error: {error}{how_again(constants) if isinstance(error, CannotWrite) else ''}", file=sys.stderr)
        return error.status
    except torch.OutOfMemoryError as error:
        print(f"error: the GPU's memory is exhausted ({one_line(error)[:80]}...): lower BATCH_SIZE or IMAGE_SIZE",
              file=sys.stderr)
        return 1


def how_again(constants: SimpleNamespace | None) -> str:
    """How "the same command" differs from the one that was given: what it began anew must not be thrown away again."""
    return " (without --overwrite)" if getattr(constants, "began_anew", False) else ""


# --------------------------------------------------------------------------------------------- constants and flags

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def read_constants(script: dict, argv: list[str] | None) -> SimpleNamespace:
    """The UPPER_CASE constants at the top of a script, with `--demo`'s and the flags' values laid over them.

    Each constant above DEMO, the preset behind `--demo`, is a flag of the same name, and its trailing comment is the
    flag's help. Two flags are not constants: `--demo` and `--overwrite`.
    Raises UsageError for an unknown flag or a value of the wrong type.
    """
    script = {name: tuple(value) if isinstance(value, list) else value for name, value in script.items()}
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    parser = Parser(prog=Path(script["__file__"]).name, usage="%(prog)s [--CONSTANT VALUE ...]", allow_abbrev=False,
                    description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="a small run that needs no download and no GPU")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the run's folder holds results")
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign):
            continue
        name = node.targets[0].id
        if name == "DEMO":
            break
        comment = source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
        default = script[name]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else
                dict(type=parser_of(default), metavar="VALUE"))
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, **kind,
                            help=f"{comment} [{shown}]".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        raise UsageError(f"unknown flag {unknown[0]}" + (f": did you mean {near[0]}?" if near else "; see --help"))
    names = [a.dest for a in parser._actions if a.dest.isupper()]
    values = {name: script[name] for name in names} | (script["DEMO"] if given.demo else {}) | vars(given)
    values["given"] = {name for name in vars(given) if name.isupper()}
    return SimpleNamespace(**values)


def flag(name: str) -> str:
    """BATCH_SIZE -> --batch-size"""
    return "--" + name.lower().replace("_", "-")


def parser_of(default: Any) -> Callable[[str], Any]:
    """How a flag's text becomes a value of its default's type; a tuple is comma-separated, its words as they are."""
    if isinstance(default, tuple):
        number = next((type(value) for value in default if not isinstance(value, str)), int)

        def numbers(text: str) -> tuple:
            return tuple(part if part in default else number(part) for part in text.split(","))
        return numbers
    return type(default)


def constants_of(namespace: SimpleNamespace) -> dict:
    """The UPPER_CASE entries alone: what config.json records."""
    return {name: value for name, value in vars(namespace).items() if name.isupper()}


def resolve_auto(constants: SimpleNamespace, auto: dict[str, tuple]) -> None:
    """Give the constants of `auto` their value for INIT where they are "auto", and their type where they are not.

    auto: of each name, its value where INIT is random, and where it is not, or what gives it, asked with the constants.
    Raises UsageError for what is no number.
    """
    for name, of_init in auto.items():
        value, default = getattr(constants, name), of_init[constants.INIT != "random"]
        default = default(constants) if callable(default) else default
        try:
            setattr(constants, name, default if value == "auto" else type(default)(value))
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise UsageError(f"{name} is {value}: it must be {kind} or auto ({flag(name)})") from None


def make_tuples(constants: SimpleNamespace, *names: str) -> None:
    """Let a single value stand where a constant holds several."""
    for name in names:
        if not isinstance(getattr(constants, name), tuple):
            setattr(constants, name, (getattr(constants, name),))


def check_ranges(constants: SimpleNamespace, **bounds: tuple[float, float]) -> None:
    """Raise UsageError where a constant is not a finite number from low to high, both included."""
    for name, (low, high) in bounds.items():
        value = getattr(constants, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(low <= v <= high and math.isfinite(v) for v in values):
            limit = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise UsageError(f"{name} is {','.join(map(str, values))}: it must be {limit} ({flag(name)})")


def check_training(constants: SimpleNamespace, **bounds: tuple[float, float]) -> None:
    """`check_ranges` of `bounds` and of the constants that both scripts have, and a look at their choices."""
    check_ranges(constants, IMAGE_SIZE=(16, math.inf), CROP_AREA=(0.01, 1), EPOCHS=(1, math.inf),
                 BATCH_SIZE=(2, math.inf), LEARNING_RATE=(0, math.inf), WEIGHT_DECAY=(0, math.inf),
                 WARMUP_EPOCHS=(0, math.inf), **bounds)
    check_choice("OPTIMIZER", constants.OPTIMIZER, ["sgd", "adamw"])
    check_choice("PRECISION", constants.PRECISION, ["auto", "bf16", "fp32"])


def check_choice(name: str, value: str, choices: list[str]) -> None:
    """Raise UsageError, with the nearest choice, where the constant `name` is none of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        raise UsageError(f"{name} {value!r} is unknown: " + (f"did you mean {near[0]!r}?" if near else
                                                              f"it must be one of {', '.join(choices)}"))


# ------------------------------------------------------------------------- randomness, device, precision, processes

def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator of its own for every (seed, purpose, epoch or step, rank): nothing else decides its draws."""
    digest = sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextlib.contextmanager
def seeded_init(seed: int, *purpose: str | int) -> Iterator[None]:
    """Networks built inside draw their weights from (seed, purpose); the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        torch.default_generator.manual_seed(seeded_generator(seed, *purpose).initial_seed())
        yield


def select_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu; under torchrun each process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:  # set_device wants a number
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32, where fp32 remains
            torch.backends.cudnn.benchmark = True  # look for the fastest convolutions: batches are alike
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"DEVICE {name!r} cannot be used here ({one_line(error)[:80]}): "
                        "set DEVICE to 'auto' or 'cpu'") from error
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware has it, never emulated, and fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself: CUDA from compute capability 8, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public question for this (2.15); these two it asks itself
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose_threads(device: torch.device, begun_with: int | None = None) -> str:
    """Give torch as many CPU threads as cores are free; returns " with N threads" and what decided it, "" for a GPU.

    Threads wait for each other after every operation, so one that has to share its core holds up all the others.
    OMP_NUM_THREADS is the user's word and stays. begun_with: the number of the run that is continued, which its last
    digits depend on; None for a new one.
    """
    if device.type != "cpu":
        return ""
    most = threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = min(most, begun_with or free_cores())
        torch.set_num_threads(threads)
    why = "as the run was begun" if begun_with else "the cores are busy"
    return (f" with {threads} thread{'s' if threads > 1 else ''}"
            + (f" of {most}: {why} (OMP_NUM_THREADS=N sets N)" if threads != most else ""))


def free_cores(seconds: float = 0.3) -> int:
    """How many of the cores that this process may use no other keeps busy, at least 1; work of lower priority does not.

    Counted over some tenths of a second, during which this process sleeps, and only on Linux; elsewhere all are free.
    The load average would still show a run that ended a minute ago.
    """
    if not Path("/proc/stat").exists():
        return os.cpu_count() or 1
    mine = os.sched_getaffinity(0)

    def busy_ticks() -> int:
        busy = 0
        for core, ticks in re.findall(r"^cpu(\d+) (.*)$", Path("/proc/stat").read_text(), re.M):
            if int(core) in mine:
                user, nice, system, _idle, _waiting, irq, softirq, steal, *_ = map(int, ticks.split())
                busy += user + system + irq + softirq + steal + (nice if os.nice(0) > 0 else 0)
        return busy

    before, start = busy_ticks(), time.monotonic()
    time.sleep(seconds)
    busy = (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)
    free = len(mine) - busy
    with contextlib.suppress(OSError, ValueError):  # a container's share: "200000 100000" is two cores
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        free = min(free, int(quota) / int(period))
    return max(1, round(free))


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors. It would hand large blocks back to the kernel, which clears each
    page anew: 37,000 a step of 64 images at 48 px, a tenth of its time on a CPU. Nothing happens on other systems."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)   # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never given back


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays and works: on a CUDA GPU that triton knows, with a C compiler and Python's headers."""
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
            and importlib.util.find_spec("triton") is not None
            and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))
            and Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists())


def compiler(device: torch.device, worth_it: bool) -> Callable:
    """What is done to a function that is called in every step: torch.compile where that works, elsewhere nothing.

    Recorded as CUDA graphs, too: a step's hundreds of kernels take longer to launch than to run. worth_it: whether there
    are steps enough to win back the time that this takes.
    """
    if not worth_it or not can_compile(device):
        return lambda function: function
    say("compiling for this GPU: the first steps take a minute or two")
    return functools.partial(torch.compile, mode="reduce-overhead", dynamic=False)


def start_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes; under torchrun they join one group, alone this is 0 and 1."""
    if "RANK" in os.environ and not dist.is_initialized():
        on_gpu = device.type == "cuda"  # left to itself, torch takes NCCL for any run where it sees a GPU
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(hours=2))  # rank 0 may download and decode while the others wait
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave_processes() -> None:
    """End the group, when all processes do. After an error others may still wait for this one: torchrun ends those."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 alone downloads and fills caches; the others come after it and find everything there."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def environment(device: torch.device, precision: torch.dtype) -> dict:
    """Versions and hardware, to be kept beside a result."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "device": str(device), "hardware": hardware_name(device), "threads": torch.get_num_threads(),
            "precision": name_of(precision), "world_size": rank_and_world()[1]}


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # platform.processor() is empty on Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Forward passes inside run in `precision`; weights stay fp32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def say(line: str) -> None:
    """Print a line above the progress bar, from rank 0 alone."""
    if rank_and_world()[0] == 0:
        tqdm.write(line)


def progress(iterable=None, **options) -> tqdm:
    """A progress bar on a terminal, by rank 0; nothing where the output is a file or a pipe."""
    silent = not sys.stderr.isatty() or rank_and_world()[0] > 0
    return tqdm(iterable, disable=silent, dynamic_ncols=True, leave=False, **options)


# ------------------------------------------------------------------------------------------ encoders and optimizers

def build_encoder(name: str, init: str, seed: int) -> tuple[nn.Module, int]:
    """A torchvision ResNet by name without its classifier, and the number of its features.

    init: "random" (drawn from the seed), "imagenet" (torchvision downloads them), or the path of a state dict of
    that network, with or without `fc`. Raises UserError where they cannot be had or do not fit.
    """
    names = [n for n in torchvision.models.list_models(module=torchvision.models) if re.match("(wide_)?resne(x)?t", n)]
    check_choice("ENCODER", name, names)
    with seeded_init(seed, "encoder"):
        encoder = torchvision.models.get_model(name)
    feature_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if init != "random":
        if init != "imagenet" and not Path(init).is_file():
            raise UserError(f"INIT {init!r} is neither 'imagenet', 'random' nor a file with weights")
        weights = imagenet_weights(name) if init == "imagenet" else read_weights(Path(init))
        load_encoder(encoder, weights, init)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.__class__ = Convolution  # names, weights and state dict stay torchvision's
    return encoder, feature_dim


class Convolution(nn.Conv2d):
    """A convolution of a ResNet, without bias or groups, by `SmallMaps` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] * x.shape[3] <= 16:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            if dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX2":
                return SmallMaps.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
        return super().forward(x)


class SmallMaps(torch.autograd.Function):
    """A convolution whose weights' gradient is one matrix product over the whole batch.

    For 64 maps of 512 channels and 1x1 pixels, ResNet18's last at 32 px, this takes 0.4 ms in bf16 where oneDNN takes
    3.1 (2 cores of an AMD EPYC with AVX512-BF16), and 6 ms in fp32 on one with AVX2 alone, where oneDNN takes 130, for
    it makes one product an image, each of which reads and writes all of the gradient. In fp32 with AVX512 oneDNN is
    the faster one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, weight), (down, right), (above, beside) = ctx.saved_tensors, ctx.stride, ctx.padding
        of_input = nn.grad.conv2d_input(x.shape, weight, of_output, ctx.stride, ctx.padding)
        height, width = weight.shape[2:]
        seen = F.pad(x.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))  # [N,H,W,C]
        seen = seen.unfold(1, height, down).unfold(2, width, right).permute(0, 1, 2, 4, 5, 3)  # [N,h,w,height,width,C]
        of_weight = of_output.transpose(0, 1).flatten(1) @ seen.flatten(3).flatten(0, 2)  # [O,height*width*C]
        return of_input, of_weight.view(-1, height, width, x.shape[1]).permute(0, 3, 1, 2), None, None


def imagenet_weights(name: str) -> dict:
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except UNREADABLE as error:  # urllib's errors are OSErrors; a wrong checksum is a RuntimeError
        raise UserError(f"INIT 'imagenet': the weights of {name} could not be downloaded ({one_line(error)}): set INIT "
                        f"to 'random' or to a weights file") from error


def read_weights(path: Path) -> dict:
    """A state dict from a file. Only tensors are read: pickled code is refused, not run."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{path} is no weights file ({type(error).__name__}): it must be a state dict that torch.save "
                        "wrote") from error
    if not isinstance(weights, dict) or not all(isinstance(key, str) and isinstance(value, Tensor)
                                                 for key, value in weights.items()):
        raise UserError(f"{path} is no state dict of a network (a checkpoint? its encoder is in encoder.pt)")
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path} holds weights that are no finite numbers")
    return weights


def load_encoder(encoder: nn.Module, weights: dict, source: str | Path) -> None:
    """Load a torchvision state dict; its classifier (`fc`) is dropped, anything else must fit exactly."""
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {source} do not fit ENCODER: {one_line(error)[:160]}") from error


def digest_of_file(path: str | Path) -> str:
    """Tells a file from any other; "" where there is no such file."""
    return sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Weights on the CPU in plain memory format: what torchvision's own network loads."""
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


def build_optimizer(model: nn.Module, name: str, rate: float, weight_decay: float, part: str = "",
                    rate_of_part: float = 1) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; groups as `parameter_groups` makes them."""
    groups = parameter_groups(model, weight_decay, part, rate_of_part)
    if name == "sgd":
        return torch.optim.SGD(groups, rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, rate, fused=True)


def warmup_of(c: SimpleNamespace, steps_per_epoch: int) -> int:
    """Steps of the warm-up, at most half of all."""
    return min(round(c.WARMUP_EPOCHS * steps_per_epoch), c.EPOCHS * steps_per_epoch // 2)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Move the optimizer's parameters down the gradient of `loss`, at this rate times the `scale` of their group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------------- features and kNN

def network_input(pixels: Tensor) -> Tensor:
    """uint8 images [N,3,S,S] as a network takes them: normalised, in channels_last."""
    return normalize(pixels.float() / 255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract_features(encoder: nn.Module, pixels: Tensor, device: torch.device, precision: torch.dtype,
                     batch_size: int = 256) -> Tensor:
    """Features fp32 [N,D], on `device`, of uint8 images by the encoder in eval mode: no weight or buffer moves."""
    modes = [(module, module.training) for module in encoder.modules()]  # some may be frozen, others not
    encoder.eval()
    features = []
    for batch in pixels.split(batch_size):
        with autocast(device, precision):
            features.append(encoder(network_input(batch.to(device))).float())
    for module, training in modes:
        module.training = training
    return torch.cat(features)


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 20,
                temperature: float = 0.07) -> Tensor:
    """Classes [M] by the vote of the k most similar of the bank's features, weighted exp(cos / temperature).

    bank [N,D] with labels [N], queries [M,D]; Wu et al. 2018 (arXiv:1805.01978), section 3.4.
    """
    bank, predicted = F.normalize(bank, dim=1), []
    for some in F.normalize(queries, dim=1).split(1024):  # all similarities at once may be larger than memory
        similarity, nearest = (some @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, device=some.device)
        votes.scatter_add_(1, labels[nearest], torch.exp((similarity - 1) / temperature))  # -1: exp stays below 1
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Module:
    """Minimise cross-entropy + penalty / 2 * |W|^2 over standardised features by L-BFGS; the bias is free."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=min(1, len(features) - 1)).clamp(min=1e-6)
    x = (features - mean) / std
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)  # no draw: it starts at 0
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return fold_standardisation(head, mean, std).requires_grad_(False)


@torch.no_grad()
def fold_standardisation(head: nn.Linear, mean: Tensor, std: Tensor) -> nn.Linear:
    """Change `head` so that it makes of features [N,D] what it has made of (features - mean) / std."""
    head.weight /= std
    head.bias -= head.weight @ mean
    return head


def gain_of(gains: Tensor) -> tuple[float, float]:
    """Mean gain in percent and half of its 95% interval, from the gain of each image in each repetition: [R,N], or [N].

    A gain is 1 where only the second arm is right, -1 where only the first is. Repetitions (seeds) and images are both
    samples, and every repetition meets every image: a two-way analysis of variance tells what either contributes to the
    mean's variance, and each contribution is widened by its own quantile of Student's t (Graybill & Wang 1980), since
    three repetitions say little of their variance. Of a single repetition the interval covers the images alone.
    """
    gains = 100 * gains.double().view(-1, gains.shape[-1])
    r, n = gains.shape
    mean, of_image, of_repetition = gains.mean().item(), gains.mean(dim=0), gains.mean(dim=1)
    if n == 1:
        return mean, math.nan
    images, repetitions = of_image.var().item() / n, 0.0
    if r > 1:
        rest = (gains - of_repetition[:, None] - of_image + mean).square().sum().item() / ((r - 1) * (n - 1))
        images = max(0.0, images - rest / (r * n))  # what the repetitions' variance holds already
        repetitions = t_quantile(0.975, r - 1) ** 2 * of_repetition.var().item() / r
    return mean, math.sqrt(repetitions + t_quantile(0.975, n - 1) ** 2 * images)


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, by its density in the angle whose tangent is t / sqrt(freedom): cos^(freedom - 1)."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    below = np.cumsum(density := np.cos(angle).clip(0) ** (freedom - 1)) - density / 2
    return math.sqrt(freedom) * math.tan(np.interp(p * below[-1], below, angle))


def verdict_of(gain: float, half: float) -> str:
    """A gain and half of its 95% interval in words."""
    return "cannot tell" if not abs(gain) > half else "gained" if gain > 0 else "LOST"


def percent(right: Tensor) -> float:
    """How many of the answers are right: bool [N]."""
    return 100 * right.sum().item() / len(right)
