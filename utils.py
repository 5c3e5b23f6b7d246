"""What both scripts need to be scripts: constants and flags, errors, seeds, the machine, processes, whole files."""
import argparse
import contextlib
import ctypes
import difflib
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import sysconfig
import time
from datetime import timedelta
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None  # no lock on Windows

VERSION = 8  # of checkpoints and results; raised where what an earlier version began cannot be continued
MIN_STEPS_TO_COMPILE = 2000  # for fewer, the half minute to a minute that torch.compile takes is not won back
LOCK = ".lock"
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError,
              pickle.UnpicklingError)  # what torch.load raises for a file that is torn, foreign, or holds code


class UserError(Exception):
    """A mistake the user can mend: one line that names the cause, the file or constant, and the way out."""


def run_script(work: Callable[[SimpleNamespace], None], script: dict, argv: list[str] | None) -> int:
    """Call work(constants) and return the exit status. script: the script's globals(). What a user can mend ends in one
    line on stderr; a bug of ours keeps its traceback."""
    with contextlib.suppress(AttributeError):  # of a stand-in for stdout
        # A log file shows each line as it comes, and a terminal any name that a file may have.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_freed_memory()
    again = ("starts anew; without --overwrite it continues what is there"
             if "--overwrite" in (sys.argv if argv is None else argv) else "continues from there")
    try:
        try:
            with on_signals():
                work(read_constants(script, argv))
        except KeyboardInterrupt as stop:  # on_signals' or the training's: what was saved is whole
            signum, when = stop.args
            say(f"stopped {when}: the same command {again}")
            return 128 + signum
        if dist.is_initialized():  # after an error others may still wait for this process: torchrun ends those
            dist.destroy_process_group()
        return 0
    except BrokenPipeError:  # whoever read our lines has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left when it exits
        return 128 + 13  # SIGPIPE
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = (f"cannot read or write {error.filename or 'a file'} ({error.strerror or one_line(error)}): make "
                   "space, or check its permissions; what was saved before is whole")
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not of_memory and not re.search("allocate memory|bad_alloc", str(error)):  # what torch says on a CPU
            raise
        message = f"memory is exhausted ({one_line(error)[:80]}...): lower BATCH_SIZE or IMAGE_SIZE"
    print(f"error: {message}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def on_signals(received: list[int] | None = None) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP are added to the list or, without one, raise KeyboardInterrupt(signal, when).
    What is ignored, as by nohup, stays so. A second one ends the process, but not under torchrun, which repeats it."""
    def handle(signum, frame):
        if "RANK" not in os.environ:
            signal.signal(signum, signal.SIG_DFL)
        if received is None:
            raise KeyboardInterrupt(signum, "at once")
        received.append(signum)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def say(line: str) -> None:
    """Print a line above the progress bar, from rank 0 alone."""
    if rank_and_world()[0] == 0:
        tqdm.write(line)


def progress(**options) -> tqdm:
    """A progress bar on a terminal, by rank 0; nothing where the output is a file or a pipe."""
    return tqdm(disable=rank_and_world()[0] > 0 or None, dynamic_ncols=True, leave=False, **options)  # None: asks


def timer(seconds: float) -> Callable[[], bool]:
    """Returns a function that is true when so many seconds have passed since it last was, or since now."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        passed = time.monotonic() - last >= seconds
        last = time.monotonic() if passed else last
        return passed
    return due


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def count(n: int, noun: str) -> str:
    """'1 epoch', '2,000 epochs'"""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """': did you mean X?', or nothing where none is near."""
    near = difflib.get_close_matches(word, sorted(choices), n=3)
    return f": did you mean {' or '.join(near)}?" if near else ""


def number(low: float, high: float = math.inf, *words: str, whole: bool = False) -> Callable[[str], float | str]:
    """The kind of constants that hold a finite number from low to high, both included, or one of the words. A kind is a
    function that makes a value of its text, and raises ArgumentTypeError with what must be there."""
    limits = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"

    def read(text: str) -> float | str:
        with contextlib.suppress(ValueError):
            x = float(text)
            if low <= x <= high and x < math.inf and (x == int(x) or not whole):
                return int(x) if whole else x
        return choice(*words, otherwise=f"a {'whole ' * whole}number {limits}")(text)
    return read


def choice(*words: str, otherwise: str | None = None) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            what = " or ".join(filter(None, (otherwise, *words)))
            raise argparse.ArgumentTypeError(f"is {text}: it must be {what}")
        return text
    return read


def path(*words: str) -> Callable[[str], str]:
    """One of the words, or a path, which becomes absolute: each of its spellings means the same."""
    return lambda text: text if text in words else os.path.realpath(os.path.expanduser(text))


def several(kind: Callable, exactly: int | None = None) -> Callable[[str], tuple]:
    """A tuple of values with commas between them: exactly that many, or one and more that all differ."""
    def read(text: str) -> tuple:
        values = tuple(kind(part.strip()) for part in text.split(","))
        if len(values) != (exactly or len(set(values))):
            what = f"{exactly} values" if exactly else "one value, or several that differ"
            raise argparse.ArgumentTypeError(f"is {text}: it must be {what}")
        return values
    return read


def read_constants(script: dict, argv: list[str] | None) -> SimpleNamespace:
    """The constants at the top of a script. `--demo`'s win over them, and given flags over both. Each name in the
    script's KINDS is a constant and a flag; the comment behind the constant is the flag's help. Raises UserError for an
    unknown flag, and for a value that is not of the constant's kind."""
    source, kinds = Path(script["__file__"]).read_text(encoding="utf-8"), script["KINDS"]
    given = sys.argv[1:] if argv is None else argv
    values = {name: script[name] for name in kinds} | (script["DEMO"] if "--demo" in given else {})
    parser = argparse.ArgumentParser(
        prog=Path(script["__file__"]).name, usage="%(prog)s [--CONSTANT VALUE ...]", allow_abbrev=False,
        exit_on_error=False, description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="a small run that needs no download and no GPU; its values "
                        "win over those in the file, and flags win over both")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the run's folder holds results")
    for name, kind in kinds.items():
        comment = re.search(rf"^{name}\b.*?  # (.*)", source, re.M)
        parser.add_argument(flag(name), dest=name, type=kind, metavar="VALUE", default=as_text(values[name]),
                            help=f"{comment[1] if comment else ''} ".replace("%", "%%") + "[%(default)s]")
    try:
        c, unknown = parser.parse_known_args(given, SimpleNamespace())
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").removeprefix("--").upper().replace("-", "_")
        raise UserError(f"{name} {error.message} ({error.argument_name})") from None
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]} belongs to no flag: separate several values by commas, without spaces")
    if unknown:
        near = nearest(unknown[0].partition("=")[0], ["--demo", "--overwrite", *map(flag, kinds)])
        raise UserError(f"unknown flag {unknown[0]}{near or '; see --help'}")
    return c


def flag(name: str) -> str:
    """BATCH_SIZE -> --batch-size"""
    return "--" + name.lower().replace("_", "-")


def as_text(value: Any) -> str:
    """A constant's value as a flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def constants_of(c: SimpleNamespace) -> dict:
    """The UPPER_CASE entries alone, as a JSON file holds them."""
    return json.loads(json.dumps({name: value for name, value in vars(c).items() if name.isupper()}))


def refuse_changes(before: dict, c: SimpleNamespace, source: Path, free: set[str]) -> None:
    """Raise UserError, naming them, where constants other than the `free` ones differ from those that `source` has."""
    now = constants_of(c)
    changed = {name: f"{name} {as_text(value)} -> {as_text(now.get(name))}" for name, value in before.items()
               if value != now.get(name) and name not in free}
    if changed:
        why = " (the schedules span all EPOCHS: a longer run is another run)" * ("EPOCHS" in changed)
        raise UserError(f"{source} was made with other constants: {', '.join(changed.values())}; set them back, choose "
                        f"another RUN, or use --overwrite to start anew{why}")


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


def select_device(wanted: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu; under torchrun each process takes the GPU of its local rank."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(found if wanted == "auto" else wanted)
        if device.type == "cuda" and device.index is None:  # set_device wants a number
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"DEVICE {wanted!r} cannot be used here ({one_line(error)[:80]}): set it to auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where fp32 remains
        torch.backends.cudnn.benchmark = True  # look for the fastest convolutions: batches are alike
    return device


def select_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware has it, never emulated, and fp32 elsewhere."""
    return ("bf16" if has_native_bf16(device) else "fp32") if name == "auto" else name


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself: CUDA from compute capability 8, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for a CPU (2.15); these two it asks itself
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Forward passes inside run in `precision`, "bf16" or "fp32"; weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_threads(device: torch.device, begun_with: int | None = None) -> str:
    """Set torch's number of CPU threads; returns it in words, "" for a GPU. OMP_NUM_THREADS is the user's word.
    begun_with: the number of the run that is continued, on which its last digits depend; None for a new one."""
    if device.type != "cpu":
        return ""
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(most, begun_with or fastest_threads(most)))
    threads = torch.get_num_threads()
    why = "as the run was begun" if begun_with else "other processes keep the cores busy"
    return f" with {count(threads, 'thread')}" + f" of {most}: {why} (OMP_NUM_THREADS=N sets N)" * (threads < most)


def fastest_threads(most: int) -> int:
    """How many threads convolve fastest: `most`, unless half, a quarter ... are 1.5 times as fast. Fewer are where
    others keep the cores busy: in each of a step's thousand parallel regions all wait for one that lost its core."""
    x, weight = torch.zeros(64, 32, 16, 16), torch.zeros(32, 32, 3, 3)
    fastest, most_done = most, 0
    for threads in (most >> halvings for halvings in range(most.bit_length())):
        torch.set_num_threads(threads)
        torch.conv2d(x, weight)  # starts them
        done, due = 0, timer(1 / 6)
        while not due():
            torch.conv2d(x, weight)
            done += 1
        if done > 1.5 * most_done:
            fastest, most_done = threads, done
    return fastest


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


def compiler(device: torch.device, steps: int) -> Callable:
    """What to do to a function that is called in each of so many steps: torch.compile where that works and pays.
    Recorded as CUDA graphs, too: a step's hundreds of kernels take longer to launch than to run."""
    if steps < MIN_STEPS_TO_COMPILE or not can_compile(device):
        return lambda function: function
    say("compiling for this GPU: the first steps take a minute or two")
    return lambda function: torch.compile(function, mode="reduce-overhead", dynamic=False)


def environment(device: torch.device) -> dict:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[1] if cpu else platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision"),
            "device": str(device), "hardware": hardware, "threads": torch.get_num_threads(),
            "world_size": rank_and_world()[1]}


def start_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes; under torchrun they join one group, alone this is 0 and 1."""
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"} - os.environ.keys():
            raise UserError(f"RANK is set, but not {', '.join(sorted(missing))}: unset it, or start by torchrun")
        on_gpu = device.type == "cuda"  # left to itself, torch takes NCCL for any run where it sees a GPU
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(hours=2))  # rank 0 may download and decode while the others wait
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 alone downloads and fills caches; the others come after it and find everything there."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as several processes call it: gradients are averaged, and on GPUs BatchNorm sees the whole batch."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: every BatchNorm has a parent
    # Buffers need no broadcast: SyncBatchNorm keeps them equal, and on a CPU rank 0's are the ones that stay.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def any_process(here: int, device: torch.device) -> int:
    """The largest `here` of all processes, which all have to ask."""
    if not dist.is_initialized():
        return here
    anywhere = torch.tensor(here, device=device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    return int(anywhere)


def run_folder(*names: str) -> Path:
    """The folder of a run, or of several together. Raises UserError for a name that could lead out of runs/."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(f"RUN {name!r} is not a valid name: use letters, digits, '.', '_' and '-' (--run)")
    return Path("runs", ",".join(names))


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder until the block or the process ends. One in which nothing was written is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process: wait for it, or choose another RUN")
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if os.listdir(folder) == [LOCK]:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(file: Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """Write a file under a temporary name, flush it to disk, rename it: no reader or crash meets half a file."""
    partial = file.with_name(file.name + suffix)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def save_torch(file: Path, content: Any) -> None:
    with whole_file(file) as out:
        try:
            torch.save(content, out)
        except RuntimeError as error:  # torch's writer hides what stopped it: a full disk, or the user
            raise (error.__context__ or error) from None


def write_json(file: Path, content: Any) -> None:
    with whole_file(file) as out:
        out.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(file: Path, key: str) -> dict:
    """A JSON object that this code wrote, which has this key. Raises UserError for any other file."""
    try:
        content = json.loads(file.read_text())
        content[key]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): delete it to start anew") from error
