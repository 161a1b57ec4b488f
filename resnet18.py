"""ResNet-18 fine-tuned on EMNIST ByClass (62 classes): what never changes is computed once, nothing is lost.

    python resnet18.py                                  # linear probe and partial unfreezing, compared
    python resnet18.py --regimes full gradual           # any of linear_probe, partial_unfreeze, full, gradual
    python resnet18.py --out DIR                        # the same command continues where it was killed
    torchrun --nproc-per-node=4 resnet18.py --out DIR   # several GPUs or processes, the same steps
    python resnet18.py --compare DIR DIR                # one comparison of several runs
    python resnet18.py --predict photo.png --checkpoint DIR/partial_unfreeze/best.pt

Last lines (112 px, EMNIST ByClass 116k/16k re-split, approximate ImageNet weights, 2 CPU cores, seed 0):

    partial_unfreeze reaches 87.07% against 82.39% of linear_probe (+4.68 points, macro-F1 +6.79) for 6.4x the
    training time, 0.5x the trained samples and 265x the trainable parameters.
    continue with: python resnet18.py --image-size 112 --out results/emnist

Shapes: N images of a batch, S --image-size, K classes. Images stay uint8 [N, 28, 28] until the step that uses
them; the frozen part of the network gives [N, 512] (all but fc) or [N, 256, S/16, S/16] (all below layer4).
"""

import argparse
import contextlib
import copy
import csv
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure  # without pyplot there is no global state and no display
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn import datasets, metrics
from torch import nn

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase  # EMNIST ByClass, label 0 to 61
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights were trained on
PARTS = {  # what trains: blocks that are frozen, names of the parameters that train, their number below fc
    "fc": (5, ("fc.",), 0),
    "layer4": (4, ("layer4.", "fc."), 8_393_728),
    "all": (0, ("",), 11_176_512),
}
EVAL_BATCH = 256  # fixed, so that whatever is computed twice comes out the same to the bit
CHUNK = 2048  # images per kept file: what a kill costs while features are computed
MIN_DELTA = 0.0005  # validation accuracy (0..1) that counts as progress for early stopping


@dataclass(frozen=True)
class Stage:
    """One fine-tuning: what trains (a key of PARTS) and by which recipe."""

    trains: str
    lr: float
    epochs: int
    warmup_epochs: float
    batch_size: int
    patience: int  # epochs
    weight_decay: float = 0.01


# AdamW for all. Tried on validation (64 px, approximate ImageNet weights, one seed, 2,400 images: a spread of
# 0.7 points): layer4 on 12,000 images, 6 epochs: 84.1 %, with SGD and momentum 84.6 %; all layers on 6,000,
# 3 epochs: 84.0 against 83.2 %. Label smoothing 0.1 gave 84.5 %, weight decay 0.1 84.4 %, averaged weights
# +0.2: within the spread, so they are not here. --augment gave +0.7, the loss down from 0.48 to 0.43.
# The course's recipe: the probe's as it is; --regimes partial_unfreeze --lr 0.0005 --epochs 20.
PROBE = Stage("fc", lr=1e-2, epochs=15, warmup_epochs=0.5, batch_size=256, patience=5)
PARTIAL = Stage("layer4", lr=1e-3, epochs=8, warmup_epochs=1, batch_size=128, patience=3)
FULL = Stage("all", lr=1e-3, epochs=8, warmup_epochs=1, batch_size=128, patience=3)
REGIMES = {  # each stage starts from the best weights of the one before
    "linear_probe": (PROBE,),
    "partial_unfreeze": (PARTIAL,),
    "full": (FULL,),
    "gradual": (PROBE, PARTIAL, FULL),
}


class InputError(ValueError):
    """Bad input from the user: one line, exit status 2."""


class DownloadFailed(InputError):
    """The network or the server did not give what was asked for."""


class RunFailed(RuntimeError):
    """A training that cannot go on: one line, exit status 1."""


class Stopped(BaseException):  # as KeyboardInterrupt: no "except Exception" may take it for an error
    """SIGTERM or SIGINT, after everything is saved: exit status 75."""


# ---------------------------------------------------------------------------------------------- the run


class Run:
    """What every part needs to know: arguments, device, results folder, processes, and whether to stop."""

    def __init__(self, args):
        self.args, self.out = args, None
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = choose_device(args.device)
        if self.device.type == "cuda" and self.world > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        self.main = self.rank == 0
        self.live = self.main and sys.stdout.isatty()
        self.amp = choose_amp(args.amp, self.device)
        self.stop_asked, self.stop_at_once = False, True
        self.saved_at = time.monotonic()
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: --amp is what trades precision
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(args.deterministic, warn_only=True)

    def say(self, text):
        if self.main:
            print("\r\033[K" * self.live + text, flush=True)

    def show_live(self, text):
        """A line that the next one overwrites: on a terminal only, never in a log file."""
        if self.live:
            print("\r\033[K" + text, end="", flush=True)

    def autocast(self):
        kind = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.amp != "off")

    def share(self, thing):
        """Rank 0's plain object, on every rank."""
        box = [thing]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def on_main(self, work):
        """What work() returns on rank 0, and None elsewhere; an InputError is raised on every rank."""
        found = error = None
        if self.main:
            try:
                found = work()
            except InputError as e:
                error = e
        error = self.share(error)
        if error is not None:
            raise error
        return found

    def ask_stop(self, *_):
        self.stop_asked = True  # first: whoever catches the exception, the next poll() stops
        if self.stop_at_once:  # nothing to save here: every file is written in one piece
            raise Stopped

    def poll(self, save):
        """Between steps: calls save() when it is due or a stop was asked for; every rank decides the same."""
        due = time.monotonic() > self.saved_at + 60 * self.args.checkpoint_minutes
        want = 2 if self.stop_asked else int(due)
        if self.world > 1:
            agreed = torch.tensor(want)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            want = int(agreed)
        if want:
            save()
        if want == 2:
            raise Stopped


def choose_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise InputError(f"--device {name}: there is no {name} device here; auto takes what there is")
    return torch.device(name)


def choose_amp(name, device):
    """bf16 where the hardware multiplies it, fp16 on older GPUs, else float32 ('off')."""
    if name == "fp16" and device.type != "cuda":
        raise InputError(f"--amp fp16 needs a CUDA device, this is {device.type}; use auto, bf16 or off")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if device.type == "cpu" and cpu.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "off"


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({torch.get_num_threads()} threads)"


def git_commit():
    """Short hash of the code's commit; GIT_COMMIT names it for a copy outside of a checkout."""
    call = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = os.environ.get("GIT_COMMIT")
        return found or subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def rng(*key):
    """A generator that depends on nothing but its key: (seed, what for, stage, epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def free_bytes(device):
    """Memory free for a cache: the GPU's, else the machine's or what is left of this job's share of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds in reserve is free, too
        return torch.cuda.mem_get_info(device)[0]
    free = 4 << 30
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([free, *cgroups_left()])


def cgroups_left(system=Path("/")):
    """What is left of the memory limits of this process's control groups, SLURM's, systemd's or Docker's."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    version2 = ("", "memory.max", "memory.current", "inactive_file")
    version1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in lines:
        _, kinds, path = line.split(":", 2)
        mount, limit, used, cache = version1 if kinds else version2
        group = system / "sys/fs/cgroup" / mount / path.strip("/")
        for folder in (group, *group.parents) if mount in kinds.split(",") else ():
            with contextlib.suppress(OSError, ValueError):  # the limit reads 'max' where there is none
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))  # files read long ago give way


def peak_bytes(device):
    """The most memory held since reset_peak(): by torch on the GPU, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux; elsewhere the peak is the whole process's


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.1f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


def one_line(error, limit=160):
    return " ".join(str(error).split())[:limit]


# ---------------------------------------------------------------------------------------------- files


def write_bytes(path, content, keep=False):
    """Whole or not at all: temporary file, fsync, rename; `keep` leaves the one before as NAME.prev."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    if keep and path.exists():
        os.replace(path, path.with_name(path.name + ".prev"))
    os.replace(temporary, path)


def write_json(path, obj):
    write_bytes(path, (json.dumps(obj, indent=1) + "\n").encode())


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def save_file(path, obj, keep=False):
    """torch.save() in one piece; a full disk leaves what was there."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    try:
        write_bytes(path, buffer.getbuffer(), keep)
    except OSError as e:
        raise RunFailed(f"{path} could not be saved ({e.strerror}); the one before it stands") from e


def load_file(path):
    """What save_file() wrote; None, said aloud, where it is torn or corrupted (torch checks no sums)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise OSError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a torn file raises anything from BadZipFile to UnpicklingError
        print(f"{path} is torn or corrupted ({one_line(e, 80)}): not used", flush=True)
        return None


def load_checkpoint(folder):
    held = (load_file(p) for p in (folder / "last.pt", folder / "last.pt.prev") if p.exists())
    return next((state for state in held if state is not None), None)


@contextlib.contextmanager
def folder_lock(folder, wait=False):
    """Held until the block or the process ends; the system releases it whatever way that happens."""
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise InputError(f"another run is writing into {folder}") from e
        except OSError as e:
            print(f"warning: {folder} cannot be locked ({e.strerror}): let no other run use it", flush=True)
        yield


# ---------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Images uint8 [n, 28, 28], upright, and labels int64 [n], each by part: train, val, test."""

    name: str
    classes: str
    images: dict
    labels: dict

    def to(self, device):
        for held in (self.images, self.labels):
            held.update({part: tensor.to(device) for part, tensor in held.items()})


def upright(images):
    """EMNIST's files hold every image transposed (rotated by 90 degrees and mirrored)."""
    return images.transpose(1, 2).contiguous()  # N, 28, 28


def idx_sizes(path, dims):
    """Sizes in an IDX file's header; the file must hold exactly what they promise."""
    try:
        with open(path, "rb") as f:
            magic, *sizes = np.frombuffer(f.read(4 + 4 * dims), ">u4").tolist()
        have, want = os.path.getsize(path), 4 + 4 * dims + math.prod(sizes)
        if magic == 0x800 + dims and len(sizes) == dims and have == want:
            return sizes
        wrong = f"has {have:,} bytes, expected {want:,} by its header"
    except (OSError, ValueError) as e:
        wrong = f"is not readable ({one_line(e)})"
    raise InputError(f"{path} {wrong}: no whole IDX file of {dims} dimensions; delete it to load it again")


def emnist_files(root):
    raw = Path(root) / "EMNIST" / "raw"
    kinds = [(part, kind) for part in ("train", "test") for kind in (("images", 3), ("labels", 1))]
    return {(p, k): (raw / f"emnist-byclass-{p}-{k}-idx{d}-ubyte", d) for p, (k, d) in kinds}


@contextlib.contextmanager
def network_timeout(seconds=30):
    """A silent network would hang the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@network_timeout()
def download_emnist(root):
    """torchvision's archive and checksum, unpacked beside and moved into place when it is whole."""
    beside = Path(root) / ".download"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with folder_lock(Path(root), wait=True):
            if all(path.exists() for path, _ in emnist_files(root).values()):
                return  # another process was faster
            for path, _ in emnist_files(beside).values():
                path.unlink(missing_ok=True)  # may be half unpacked
            print(f"downloading EMNIST (536 MB) into {root} ...", flush=True)
            torchvision.datasets.EMNIST(beside, split="byclass", download=True)
            for key, (path, dims) in emnist_files(beside).items():
                idx_sizes(path, dims)
                target = emnist_files(root)[key][0]
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            shutil.rmtree(beside, ignore_errors=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as e:
        raise InputError(f"--data-dir {root}: cannot write there ({e.strerror})") from e
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as e:
        url, place = torchvision.datasets.EMNIST.url, Path(root) / "EMNIST" / "raw"
        raise DownloadFailed(
            f"EMNIST could not be downloaded from {url} ({one_line(e)}). Offline: put the four files "
            f"emnist-byclass-*-ubyte into {place}, or use --dataset digits"
        ) from e


def load_emnist(root):
    files = emnist_files(root)
    if not all(path.exists() for path, _ in files.values()):
        download_emnist(root)
    data = Data("EMNIST ByClass", CLASSES, {}, {})
    for part in ("train", "test"):
        n, *shape = idx_sizes(*files[part, "images"])
        (labels,) = idx_sizes(*files[part, "labels"])
        if shape != [28, 28] or n != labels or not n:
            raise InputError(f"{root}: {part} part of {n} images of {shape} pixels and {labels} labels")
        held = torchvision.datasets.EMNIST(root, split="byclass", train=part == "train")
        data.images[part], data.labels[part] = upright(held.data), held.targets.long()
    n, m = (len(data.labels[part]) for part in ("train", "test"))
    if (n, m) != (697_932, 116_323):  # never to be taken for the official split
        data.name += f", {n / 1000:.0f}k/{m / 1000:.0f}k re-split" if m >= 1000 else f", {n}/{m} re-split"
    return data


def load_digits():
    """scikit-learn's 1,797 real 8x8 digits, scaled to 28x28; a fixed fifth of them is the test part."""
    raw = datasets.load_digits()
    images = torch.tensor(raw.images / 16 * 255, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=rng("digits"))
    parts = {"train": order[360:], "test": order[:360]}
    return Data("digits", CLASSES[:10], *({p: t[i] for p, i in parts.items()} for t in (images, labels)))


def split(n, limit, seed):
    """Indices of the training and validation part, 90/10, of all n images or of `limit` seeded ones."""
    chosen = torch.randperm(n, generator=rng(seed, "limit"))[:limit] if limit else torch.arange(n)
    chosen = chosen[torch.randperm(len(chosen), generator=rng(seed, "split"))]
    cut = len(chosen) * 9 // 10
    return chosen[:cut].sort().values, chosen[cut:].sort().values


def load_data(args):
    """The data set in its three parts; `auto` falls back to digits only where nothing can be downloaded."""
    try:
        data = load_digits() if args.dataset == "digits" else load_emnist(args.data_dir)
    except DownloadFailed as e:
        if args.dataset != "auto":
            raise
        bar = "!" * 100
        print(f"{bar}\n{e}\nFALLING BACK to scikit-learn's digits: 10 classes, 8x8 pixels\n{bar}", flush=True)
        data = load_digits()
    images, labels = data.images, data.labels
    for part, y in labels.items():
        if int(y.max()) >= len(data.classes):
            raise InputError(f"{part} labels reach {y.max()}, expected 0 to {len(data.classes) - 1}")
    train, val = split(len(labels["train"]), args.limit, args.seed)
    if not len(val) or len(train) < 2:
        raise InputError(f"{len(train)} training and {len(val)} validation images are too few")
    for held in (images, labels):
        held["val"], held["train"] = held["train"][val], held["train"][train]
        if args.dry_run:
            held.update({part: tensor[: args.batch_size or 32] for part, tensor in held.items()})
    return data


def resize(images, size):
    """Bilinear, as torchvision's Resize: uint8 [N, 28, 28] -> float [N, 1, S, S] in 0..255."""
    return F.interpolate(images[:, None].float(), size=(size, size), mode="bilinear", align_corners=False)


def draw_affine(n, generator):
    """Small rotations, scales and shifts: [n, 2, 3], from output to input coordinates in -1..1."""
    u = torch.rand(n, 4, generator=generator) * 2 - 1
    angle, scale = u[:, 0] * math.radians(10), 1 + 0.12 * u[:, 1]
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, u[:, 2:] * 0.1
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)


def warp(images, theta, size):
    """One affine resampling from 28 pixels to the final size; with the identity it is resize()."""
    grid = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)
    return F.grid_sample(images[:, None].float(), grid, "bilinear", "border", align_corners=False)


def prepare(images, size, theta=None):
    """uint8 [N, 28, 28] -> the network's input: float [N, 3, S, S], normalised, channels_last."""
    grey = resize(images, size) if theta is None else warp(images, theta, size)
    shift, scale = normalisation(grey.device)
    x = torch.empty(len(images), size, size, 3, device=grey.device)
    torch.addcmul(shift, grey[:, 0, :, :, None], scale, out=x)
    return x.permute(0, 3, 1, 2)  # N, 3, S, S


@functools.cache
def normalisation(device):
    """0..255 to ImageNet's mean and deviation, as (shift, scale), copied to the device once: a copy waits."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (-mean / std).to(device), (1 / (255 * std)).to(device)


# ---------------------------------------------------------------------------------------------- model


@network_timeout()
def load_weights(spec):
    """State dict of the backbone (None: random) and its honest name."""
    if spec == "none":
        return None, "random"
    if spec == "imagenet":
        source = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        try:
            return source.get_state_dict(progress=False, check_hash=True), "ImageNet (IMAGENET1K_V1)"
        except (OSError, RuntimeError) as e:
            raise DownloadFailed(
                f"ImageNet weights could not be downloaded from {source.url} ({one_line(e)}). Offline: fetch "
                "the file elsewhere and give --weights FILE, or --weights none for random ones"
            ) from e
    try:
        state = torch.load(spec, map_location="cpu", weights_only=True)
        given = {k: tuple(v.shape) for k, v in state.items()}
    except Exception as e:  # whatever a file that is none makes torch.load raise
        raise InputError(f"--weights {spec} is no readable state dict ({one_line(e)})") from e
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in torchvision.models.resnet18().state_dict().items()}
    keys = [k for k in wanted | given if not k.startswith("fc.") and not k.endswith("num_batches_tracked")]
    wrong = [k for k in keys if given.get(k) != wanted.get(k)]
    if wrong:
        named = [f"{k} is {given.get(k, 'missing')}, expected {wanted.get(k, 'none')}" for k in wrong[:3]]
        raise InputError(f"--weights {spec} differs from ResNet-18 ({len(wrong)} keys): {'; '.join(named)}")
    return state, Path(spec).name


def build_model(classes, weights, seed):
    """torchvision's ResNet-18 with a new fc; nothing but the seed decides the random part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18()
    if weights is not None:
        model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)
    model.fc = nn.Linear(512, classes)
    for p in (model.fc.weight, model.fc.bias):
        nn.init.uniform_(p, -(512**-0.5), 512**-0.5, generator=rng(seed, "fc", p.dim()))
    return model


def conv_blocks(model):
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    return [stem, model.layer1, model.layer2, model.layer3, model.layer4]


def freeze_below(model, trains):
    """(frozen, trained) blocks of the model: what is frozen has no gradient and keeps its statistics."""
    cut, _, count = PARTS[trains]
    blocks = conv_blocks(model)
    frozen, trained = nn.Sequential(*blocks[:cut]), nn.Sequential(*blocks[cut:])
    model.requires_grad_(True)
    frozen.eval().requires_grad_(False)
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert train == count + sum(p.numel() for p in model.fc.parameters()), f"{train:,} parameters train"
    return frozen, trained


def pool(x):
    """Average over the picture in float32, whatever the convolutions' type: [N, 512, h, w] -> [N, 512]."""
    return x.float().mean((2, 3))


def whole_network(run, model, images, size):
    """The network as it is deployed: uint8 [N, 28, 28] -> float32 [N, K]."""
    with torch.no_grad():
        with run.autocast():
            x = nn.Sequential(*conv_blocks(model))(prepare(images, size))
        return model.fc(pool(x))


def rows_of(run, n, width, fn, between=lambda: None):
    """fn(indices) for n images in fixed batches, shared among the processes: float32 [n, width] on each."""
    rows = torch.zeros(n, width, device=run.device)
    for start in range(0, n, EVAL_BATCH * run.world):
        mine = torch.arange(n, device=run.device)[start + run.rank * EVAL_BATCH :][:EVAL_BATCH]
        if len(mine):
            rows[mine] = fn(mine)
        between()
    if run.world > 1:
        dist.all_reduce(rows)  # every row is zero but on one process: an exact sum
    return rows


def kept_rows(run, folder, images, width, fn, what):
    """Rows of fn(images), computed in chunks kept as files (a kill costs one), and the seconds they cost."""
    rows, seconds, began = [], 0.0, time.monotonic()
    if run.main:
        folder.mkdir(exist_ok=True)
    for start in range(0, len(images), CHUNK):
        file, these = folder / f"{what}-{start // CHUNK:05d}.pt", images[start : start + CHUNK]
        part = run.share(load_file(file) if run.main and file.exists() else None)
        if part is None:
            clock = time.perf_counter()
            held = rows_of(run, len(these), width, lambda i, these=these: fn(these[i])).cpu()
            part = {"rows": held, "seconds": time.perf_counter() - clock}
            if run.main:
                save_file(file, part)
        rows.append(part["rows"])
        seconds += part["seconds"]
        done = start + len(these)
        left = (time.monotonic() - began) / done * (len(images) - done)
        run.show_live(f"{what}: {done:,}/{len(images):,} images | eta {duration(left)}")
    return torch.cat(rows).to(run.device), seconds


# ---------------------------------------------------------------------------------------------- training


class Laps:
    """Seconds by what they went into; every moment counts once, also over several pieces of a run."""

    def __init__(self, device, seconds):
        self.device, self.seconds, self.last = device, seconds, time.perf_counter()

    def __call__(self, what):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now


class Frozen:
    """The frozen part of the network and its output, which is computed once where it never changes."""

    def __init__(self, run, data, blocks, trains):
        self.run, self.data, self.blocks, self.trains = run, data, blocks, trains
        self.kept, self.in_memory = {}, None  # outputs by part; whether layer3's are kept, once resolved

    def through(self, images, theta=None):
        with torch.no_grad():
            x = prepare(images, self.run.args.image_size, theta)
            with self.run.autocast():
                x = self.blocks(x)
            return pool(x) if self.trains == "fc" else x

    def __call__(self, part, index, theta=None):
        """The trained part's input for images of a part: [N, 512] or [N, C, h, w]."""
        if part not in self.kept:
            return self.through(self.data.images[part][index], theta)
        x = self.kept[part][index]
        return x if x.dim() == 2 else x.permute(0, 3, 1, 2)  # kept channels-last, [n, h, w, 256]

    def compute(self, laps):
        """Fills `kept`; with augmentation only validation images stay the same."""
        parts = ["val"] if self.run.args.augment else ["train", "val"]
        count = sum(len(self.data.labels[part]) for part in parts)
        if self.trains == "fc":
            spent = 0.0
            for part in parts:
                images, folder = self.data.images[part], self.run.out / "features"
                self.kept[part], seconds = kept_rows(self.run, folder, images, 512, self.through, part)
                spent += seconds
            laps("features")
            laps.seconds["features"] = spent  # the chunks know what they cost, in earlier pieces too
            self.run.say(f"features of {count:,} images: {duration(spent)} ({count / spent:,.0f} images/s)")
        elif self.trains == "layer4" and self.fits(count):
            for part in parts:
                self.kept[part] = self.layer3(self.data.images[part])
            laps("cache")
            self.run.say(f"layer3's output kept, {duration(laps.seconds['cache'])}")

    def fits(self, count):
        """Whether layer3's output goes into memory; a continued run keeps to what was resolved."""
        args, side = self.run.args, math.ceil(self.run.args.image_size / 16)
        need = count * 256 * side * side * (4 if self.run.amp == "off" else 2)
        budget = 0.7 * free_bytes(self.run.device) if args.cache_gb is None else args.cache_gb * 1e9
        if self.in_memory is None or args.cache_gb is not None:
            self.in_memory = need <= budget
        self.in_memory = self.in_memory and self.run.world == 1
        verdict = "kept in memory" if self.in_memory else "recomputed for every batch"
        verdict += " (several processes)" * (self.run.world > 1)
        self.run.say(f"layer3's output: {need / 1e9:.2f} GB, budget {budget / 1e9:.2f} GB: {verdict}")
        return self.in_memory

    def layer3(self, images):
        rows = None
        for start in range(0, len(images), EVAL_BATCH):
            x = self.through(images[start : start + EVAL_BATCH]).permute(0, 2, 3, 1)
            if rows is None:
                rows = torch.empty(len(images), *x.shape[1:], dtype=x.dtype, device=x.device)
            rows[start : start + len(x)] = x
            self.run.show_live(f"layer3's output: {start + len(x):,}/{len(images):,} images")
        return rows


class Trainer:
    """One stage of a regime: what trains, its optimizer, early stopping, and the position within it.

    `progress` belongs to the whole regime: seconds by purpose, a row per epoch, summaries of finished stages.
    """

    KEPT = ("number", "epoch", "step", "done", "best", "reference", "stale", "progress", "losses", "hits")

    def __init__(self, run, data, model, stage, number, folder, progress):
        self.run, self.data, self.model, self.stage, self.number = run, data, model, stage, number
        self.folder, self.progress, self.laps = folder, progress, Laps(run.device, progress["seconds"])
        blocks, self.trained = freeze_below(model, stage.trains)
        self.frozen = Frozen(run, data, blocks, stage.trains)
        self.params = [p for p in model.parameters() if p.requires_grad]
        recipe = {"lr": stage.lr, "weight_decay": stage.weight_decay, "fused": run.device.type != "mps"}
        self.optimizer = torch.optim.AdamW(self.params, **recipe)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
        self.n = len(data.labels["train"])
        self.steps = math.ceil(self.n / stage.batch_size)
        smallest = self.n // self.steps // run.world
        if smallest < (2 if stage.trains != "fc" and run.args.image_size == 32 else 1):
            raise InputError(f"--batch-size: {smallest} images for a process and step are too few")
        self.epoch, self.step, self.done = 0, 0, False
        self.losses, self.hits = torch.zeros(2, self.steps, device=run.device)  # of the epoch's steps
        self.best = {"accuracy": -1.0, "epoch": 0, "tau": 0.0, "weights": None}
        self.reference, self.stale = -1.0, 0  # last real progress on validation, epochs since
        self.published, self.published_at = None, time.monotonic()  # which best epoch best.pt holds

    def logits(self, x):
        """[N, 512] or [N, C, h, w] -> [N, K]; fc in float32."""
        if len(self.trained):
            with self.run.autocast():
                x = self.trained(x)
            x = pool(x)
        return self.model.fc(x)

    def learning_rate(self):
        """Linear warm-up, then half a cosine to zero."""
        step, warm = self.epoch * self.steps + self.step, self.stage.warmup_epochs * self.steps
        if step < warm:
            return self.stage.lr * (step + 1) / (warm + 1)
        rest = max(1.0, self.stage.epochs * self.steps - warm)
        return self.stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / rest)))

    def train_step(self, order):
        first, last = (self.n * s // self.steps for s in (self.step, self.step + 1))
        index = order[first:last]  # steps of equal size, give or take one image
        mine, theta = index[self.run.rank :: self.run.world], None
        if self.run.args.augment:
            generator = rng(self.run.args.seed, "augment", self.number, self.epoch, self.step)
            theta = draw_affine(len(index), generator)[self.run.rank :: self.run.world]
            theta = theta.to(self.run.device, non_blocking=True)
        y = self.data.labels["train"][mine]
        logits = self.logits(self.frozen("train", mine, theta))
        loss = F.cross_entropy(logits, y, reduction="sum") / len(index)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.losses[self.step], self.hits[self.step] = loss.detach(), (logits.argmax(1) == y).sum()
        if self.run.world > 1:
            self.reduce(len(mine) / len(index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1

    def reduce(self, share):
        """Sums gradients, loss and hits over the processes, averages BatchNorm's statistics, in one message.

        The loss is already divided by all samples of the step, so a plain sum weights each of them the same,
        which DDP's mean over processes does not; and rank 0's state, statistics too, is everybody's.
        """
        tensors = [p.grad for p in self.params]
        tensors += [b.mul_(share) for b in self.trained.buffers() if b.is_floating_point()]
        tensors += [held[self.step : self.step + 1] for held in (self.losses, self.hits)]
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(summed.view_as(t))

    def train(self):
        """To the last epoch or until patience ends; then the best weights are restored."""
        if self.done:
            return
        self.save()
        if not self.over():
            self.frozen.compute(self.laps)
        self.began, self.first = time.monotonic(), self.epoch * self.steps + self.step
        self.run.stop_at_once = False
        while not self.over():
            self.train_epoch()
            self.finish_epoch()
        self.model.load_state_dict(self.best["weights"], strict=False)
        self.done = True
        self.save()
        self.run.stop_at_once = True
        if self.run.stop_asked:  # during the save
            raise Stopped
        if self.epoch < self.stage.epochs:
            back = f"back to epoch {self.best['epoch']}"
            self.run.say(f"early stop: no progress for {self.stale} epochs, {back}")

    def train_epoch(self):
        order = torch.randperm(self.n, generator=rng(self.run.args.seed, "order", self.number, self.epoch))
        order = order.to(self.run.device)
        self.trained.train()
        while self.step < self.steps:
            self.train_step(order)
            self.run.poll(self.save)
            if self.run.live and self.step % 5 == 0:
                place = f"epoch {self.epoch + 1:2d}/{self.stage.epochs} | step {self.step}/{self.steps}"
                self.run.show_live(f"{place} | eta {duration(self.seconds_left())}")
        self.laps("steps")
        self.check_finite()

    def finish_epoch(self):
        """Validation, early stopping, log line, checkpoint."""
        loss, accuracy, tau = self.validate()
        self.laps("validation")
        better = accuracy > self.best["accuracy"]
        if better:
            self.best = {"accuracy": accuracy, "epoch": self.epoch + 1, "tau": tau, "weights": self.weights()}
        self.stale += 1
        if accuracy > self.reference + MIN_DELTA:
            self.reference, self.stale = accuracy, 0
        history, spent = self.progress["history"], self.progress["seconds"]
        row = {"stage": self.stage.trains, "epoch": self.epoch + 1}
        row["train_loss"] = float(self.losses.cpu().double().mean())
        row["train_accuracy"] = float(self.hits.cpu().double().sum()) / self.n
        row |= {"val_loss": loss, "val_accuracy": accuracy, "lr": self.optimizer.param_groups[0]["lr"]}
        row["seconds"] = spent["steps"] + spent["validation"] - sum(r["seconds"] for r in history)
        history.append(row | {"best": int(better)})
        self.epoch, self.step = self.epoch + 1, 0
        left = 0.0 if self.over() else self.seconds_left()
        self.run.say(epoch_line(history[-1], self.stage.epochs, left))
        self.save()
        self.run.poll(self.save)

    def seconds_left(self):
        """To the last epoch, at the rate of this piece of the run."""
        now = self.epoch * self.steps + self.step
        rate = (time.monotonic() - self.began) / max(1, now - self.first)
        return rate * (self.stage.epochs * self.steps - now)

    def over(self):
        return self.epoch >= self.stage.epochs or self.stale >= self.stage.patience

    def check_finite(self):
        bad = (~torch.isfinite(self.losses[: self.step])).nonzero()
        if len(bad):
            place = f"step {int(bad[0]) + 1}/{self.steps} of epoch {self.epoch + 1}"
            raise RunFailed(f"the loss is {float(self.losses[bad[0]])} at {place}: try a smaller --lr")

    def validate(self):
        """(loss, accuracy, best tau of the prior correction) on the validation part."""
        self.trained.eval()
        y, width = self.data.labels["val"], len(self.data.classes)

        def rows(index):
            with torch.no_grad():
                return self.logits(self.frozen("val", index))

        logits = rows_of(self.run, len(y), width, rows, lambda: self.run.poll(self.save))
        logits, y = logits.cpu(), y.cpu()
        loss = float(F.cross_entropy(logits, y))
        if not math.isfinite(loss):
            raise RunFailed(f"the validation loss is {loss} after epoch {self.epoch + 1}")
        accuracy = float((logits.argmax(1) == y).double().mean())
        return loss, accuracy, tune_tau(logits, y, log_prior(self.data))

    def weights(self):
        """A copy of what trains, statistics included; the frozen rest is what --weights gave."""
        names, state = PARTS[self.stage.trains][1], self.model.state_dict()
        return {k: v.detach().cpu().clone() for k, v in state.items() if k.startswith(names)}

    def save(self):
        """last.pt, which alone decides; log.csv and best.pt follow from it."""
        self.laps("steps" if self.step < self.steps else "validation")
        self.check_finite()  # a state that has diverged never replaces a good one
        self.progress["peak"] = max(self.progress.get("peak", 0), peak_bytes(self.run.device))
        if self.run.main:
            state = {name: getattr(self, name) for name in self.KEPT}
            state |= {"weights": self.weights(), "optimizer": self.optimizer.state_dict()}
            state |= {"scaler": self.scaler.state_dict(), "in_memory": self.frozen.in_memory}
            save_file(self.folder / "last.pt", state | {"arguments": vars(self.run.args)}, keep=True)
            # a probe's epochs are short: best.pt waits up to half a minute, but not at the end
            if self.done or self.run.stop_asked or time.monotonic() > self.published_at + 30:
                self.publish()
        self.laps("checkpoint")
        self.run.saved_at = time.monotonic()

    def publish(self):
        write_csv(self.folder / "log.csv", self.progress["history"])
        if self.published == (self.number, self.best["epoch"]) or self.best["weights"] is None:
            return
        model = {k: v.detach().cpu() for k, v in self.model.state_dict().items()} | self.best["weights"]
        about = {"classes": self.data.classes, "image_size": self.run.args.image_size}
        about |= {k: self.best[k] for k in ("accuracy", "epoch")} | {"dataset": self.data.name}
        save_file(self.folder / "best.pt", {"model": model, **about})
        self.published, self.published_at = (self.number, self.best["epoch"]), time.monotonic()

    def load(self, state):
        for name in self.KEPT:
            setattr(self, name, state[name])
        self.losses, self.hits = self.losses.to(self.run.device), self.hits.to(self.run.device)
        self.laps.seconds, self.frozen.in_memory = self.progress["seconds"], state["in_memory"]
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.run.main:
            self.publish()

    def summary(self):
        ran = {"epochs_run": self.epoch, "early_stopped": self.epoch < self.stage.epochs}
        ran |= {"samples_per_epoch": self.n, "trainable_params": sum(p.numel() for p in self.params)}
        best = {"best_epoch": self.best["epoch"], "val_accuracy": self.best["accuracy"]}
        return asdict(self.stage) | ran | best


def epoch_line(row, epochs, left):
    return (
        f"epoch {row['epoch']:2d}/{epochs} "
        f"| train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%} "
        f"| val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.2%} | lr {row['lr']:.1e} "
        f"| {duration(row['seconds'])} | eta {duration(left)}" + " | best" * row["best"]
    )


# ---------------------------------------------------------------------------------------------- evaluation


def log_prior(data):
    """Logarithm of the classes' share of the training part, each counted once more than seen: [K]."""
    counts = torch.bincount(data.labels["train"].cpu(), minlength=len(data.classes)).double() + 1
    return (counts / counts.sum()).log()


def macro_f1(labels, predicted, k):
    """As scikit-learn's, from the confusion counts, quick enough for a search."""
    counts = torch.bincount(labels * k + predicted, minlength=k * k).view(k, k).double()
    both = counts.sum(0) + counts.sum(1)
    return float((2 * counts.diagonal() / both.clamp(min=1))[both > 0].mean())


def tune_tau(logits, labels, prior):
    """Strength of the logit adjustment (logits - tau * log prior) with the best macro-F1 on validation."""
    taus = [t / 20 for t in range(21)]
    return max(taus, key=lambda tau: macro_f1(labels, (logits - tau * prior).argmax(1), len(prior)))


def test_metrics(labels, logits):
    """Test figures by scikit-learn, 0..1."""
    y, scores = labels.numpy(), logits.numpy()
    said, classes = scores.argmax(1), np.arange(scores.shape[1])
    scored = metrics.precision_recall_fscore_support(y, said, average="macro", zero_division=0)[:3]
    top5 = metrics.top_k_accuracy_score(y, scores, k=5, labels=classes)
    figures = (metrics.accuracy_score(y, said), *scored, top5)
    names = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "top5")
    return {f"test_{name}": float(figure) for name, figure in zip(names, figures, strict=True)}


def per_class(confusion, classes):
    """Images, precision, recall, F1 and most frequent error of every class."""
    rows = []
    for k, name in enumerate(classes):
        right, truth, said = (int(v) for v in (confusion[k, k], confusion[k].sum(), confusion[:, k].sum()))
        errors = np.where(np.arange(len(classes)) == k, 0, confusion[k])
        row = {"class": name, "images": truth, "errors": truth - right}
        row |= {"precision": right / max(1, said), "recall": right / max(1, truth)}
        row |= {"f1": 2 * right / max(1, truth + said)}
        rows.append(row | {"most_confused_with": classes[errors.argmax()] if errors.any() else ""})
    return rows


def with_flags(stage, args):
    """The table's row with what the command line overrides; a dry run takes one step."""
    names = ("lr", "epochs", "warmup_epochs", "batch_size", "patience")
    stage = replace(stage, **{k: getattr(args, k) for k in names if getattr(args, k) is not None})
    return replace(stage, epochs=1) if args.dry_run else stage


def run_regime(run, name, data, weights, weights_name):
    """Trains one row of the table, stage by stage, then tests its best weights; returns its metrics."""
    reset_peak(run.device)
    folder = run.out / name
    if run.main:
        folder.mkdir(exist_ok=True)
    state = run.share(load_checkpoint(folder) if run.main else None)
    model = build_model(len(data.classes), weights, run.args.seed)
    model = model.to(run.device, memory_format=torch.channels_last)
    if run.world > 1 and run.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    progress = state["progress"] if state else {"seconds": {}, "history": [], "stages": []}
    stages = [with_flags(stage, run.args) for stage in REGIMES[name]]
    for number in range(state["number"] if state else 0, len(stages)):
        trainer = Trainer(run, data, model, stages[number], number, folder, progress)
        count, total = (sum(p.numel() for p in ps) for ps in (trainer.params, model.parameters()))
        if state and state["number"] == number:
            trainer.load(state)
            place = f"epoch {trainer.epoch + 1}, after step {trainer.step} of {trainer.steps}"
            run.say(f"{name}: continuing in {place}")
        else:
            recipe = f"batch size {stages[number].batch_size}, lr {stages[number].lr:g}"
            run.say(f"{name}: {count:,} of {total:,} parameters train, {recipe}")
        trainer.train()
        if len(progress["stages"]) == number:
            progress["stages"].append(trainer.summary())
    return finish_regime(run, name, data, weights_name, trainer)


def finish_regime(run, name, data, weights_name, trainer):
    """The test part, once, with the best weights; then tables and pictures; metrics.json comes last."""
    folder, progress, size = trainer.folder, trainer.progress, run.args.image_size
    model = trainer.model.eval()
    seconds, images, labels = progress["seconds"], data.images["test"], data.labels["test"].cpu()
    logits, seconds["test"] = kept_rows(
        run, folder / "test", images, len(data.classes), lambda x: whole_network(run, model, x, size), "test"
    )
    if not run.main:
        return None
    logits, laps = logits.cpu(), Laps(run.device, seconds)
    predicted = logits.argmax(1)
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(len(data.classes)))
    write_csv(folder / "per_class.csv", per_class(confusion, data.classes))
    counts = [dict(zip(data.classes, row, strict=True)) for row in confusion.tolist()]
    write_csv(
        folder / "confusion.csv", [{"true": c, **row} for c, row in zip(data.classes, counts, strict=True)]
    )
    draw_curves(folder / "curves.png", progress["history"], name)
    draw_confusion(folder / "confusion.png", confusion, data.classes, f"{name}, {data.name}, test part")
    draw_top_confusions(folder / "confusions_top.png", confusion, data, predicted, name)
    laps("pictures")
    stages, last = progress["stages"], progress["stages"][-1]
    training = sum(seconds.get(k, 0.0) for k in ("features", "cache", "steps"))
    budget = sum(s["epochs_run"] * s["samples_per_epoch"] for s in stages)
    plain, tau = test_metrics(labels, logits), trainer.best["tau"]
    row = {"regime": name, "dataset": data.name, "weights": weights_name, "image_size": size}
    row |= {"seed": run.args.seed, "device": device_name(run.device), "processes": run.world, "amp": run.amp}
    row |= {"torch": torch.__version__, "git_commit": git_commit()}
    row["epochs_run"], row["max_epochs"] = (sum(s[k] for s in stages) for k in ("epochs_run", "epochs"))
    row |= {"early_stopped": last["early_stopped"], "samples_per_epoch": trainer.n, "update_budget": budget}
    total = sum(p.numel() for p in model.parameters())
    row |= {"trainable_params": last["trainable_params"], "total_params": total}
    row |= {"train_seconds": training, "total_seconds": sum(seconds.values()), "seconds": seconds}
    row |= {"images_per_second": budget / training, "peak_memory_bytes": progress["peak"]}
    row |= {"val_accuracy": trainer.best["accuracy"], **plain, "stages": stages}
    row["prior_corrected"] = {"tau": tau, **test_metrics(labels, logits - tau * log_prior(data))}
    write_json(folder / "metrics.json", row)
    shutil.rmtree(folder / "test")
    (folder / "last.pt.prev").unlink(missing_ok=True)
    run.say(
        f"{name}: test accuracy {plain['test_accuracy']:.2%}, macro-F1 {plain['test_f1_macro']:.4f}, top-5 "
        f"{plain['test_top5']:.2%} (once, with the best epoch's weights); training {duration(training)}, "
        f"in all {duration(row['total_seconds'])}"
    )
    return row


# ---------------------------------------------------------------------------------------------- pictures


BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by colour-blind readers too


def new_figure(width, height, rows=1, columns=1, **kwargs):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_bytes(path, buffer.getbuffer())


def show_images(axes, images):
    for ax, image in zip(axes, images, strict=False):
        ax.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=255)
    for ax in axes:
        ax.set_axis_off()


def draw_samples(path, data):
    """Training images, upright, with their labels; of EMNIST, first a row as its files hold them."""
    images, labels, title = data.images["train"][:50], data.labels["train"][:50], "training images and labels"
    if data.name.startswith("EMNIST"):
        images, labels = torch.cat([upright(images[:10]), images]), torch.cat([labels[:10], labels])
        title += "; top row: as the files hold those of the second row (transposed)"
    figure, axes = new_figure(10, 6.6, 6, 10)
    show_images(list(axes.flat), images)
    for ax, label in zip(axes.flat, labels, strict=False):
        ax.set_title(data.classes[label], fontsize=12)
    figure.suptitle(f"{data.name}: {title}")
    save_figure(figure, path)


def draw_curves(path, history, name):
    figure, axes = new_figure(10, 3.8, 1, 2)
    epochs = range(1, len(history) + 1)
    for ax, what, scale in zip(axes[0], ("loss", "accuracy"), (1, 100), strict=True):
        for part, colour, style in (("train", BLUE, "o--"), ("val", ORANGE, "s-")):
            values = [row[f"{part}_{what}"] * scale for row in history]
            ax.plot(epochs, values, style, color=colour, label=f"{part} {what}", ms=4)
        for i in range(1, len(history)):
            if history[i]["stage"] != history[i - 1]["stage"]:
                ax.axvline(i + 0.5, color="gray", lw=1)
        ax.set(xlabel="epoch", ylabel=what + " (%)" * (scale == 100))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    stages = dict.fromkeys(row["stage"] for row in history)
    figure.suptitle(f"{name}: {' | '.join(stages)}" if len(stages) > 1 else name)
    save_figure(figure, path)


def draw_confusion(path, confusion, classes, title):
    """Rows are true classes, normalised; colours follow the square root, so that rare errors are seen."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    figure, axes = new_figure(13, 12)
    ax = axes[0, 0]
    picture = ax.imshow(np.sqrt(share), cmap="cividis", vmin=0, vmax=1)
    ax.set_xticks(range(len(classes)), classes, fontsize=10)
    ax.set_yticks(range(len(classes)), classes, fontsize=10)
    ax.tick_params(top=True, labeltop=True, right=True, labelright=True, length=2)
    ax.set(xlabel="predicted", ylabel="true", title=f"{title}: share of each true class")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    bar = figure.colorbar(picture, ax=ax, shrink=0.7, ticks=np.sqrt(ticks))
    bar.ax.set_yticklabels([f"{t:.0%}" for t in ticks])
    save_figure(figure, path)


def draw_top_confusions(path, confusion, data, predicted, name, pairs=12, examples=8):
    """The most frequent errors: true class, predicted class, how often, and some of the images."""
    errors = confusion - np.diag(np.diag(confusion))
    top = np.argsort(-errors, axis=None, kind="stable")[: min(pairs, max(1, np.count_nonzero(errors)))]
    images, labels = data.images["test"], data.labels["test"].cpu()
    widths = [3.2] + [1] * examples
    figure, axes = new_figure(9.5, 0.85 * len(top) + 0.5, len(top), examples + 1, width_ratios=widths)
    for row, pair in zip(axes, top.tolist(), strict=True):
        truth, said = divmod(pair, len(data.classes))
        count, seen = errors[truth, said], max(1, confusion[truth].sum())
        text = f"{data.classes[truth]} read as {data.classes[said]}:  {count}  ({count / seen:.0%} of {seen})"
        row[0].text(1, 0.5, text, ha="right", va="center", fontsize=12)
        show_images(row[1:], images[((labels == truth) & (predicted == said)).nonzero()[:examples, 0]])
        row[0].set_axis_off()
    figure.suptitle(f"{name}, {data.name}: {errors.sum():,} errors in {confusion.sum():,} test images")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------- comparison


def trade_off(rows):
    """One sentence from the numbers: what the most accurate costs more than the cheapest."""
    cheap, best = min(rows, key=lambda r: r["train_seconds"]), max(rows, key=lambda r: r["test_accuracy"])
    if cheap is best:
        return f"{best['label']} is both the cheapest and the most accurate ({best['test_accuracy']:.2%})."
    points, f1 = ((best[k] - cheap[k]) * 100 for k in ("test_accuracy", "test_f1_macro"))
    costs = ("train_seconds", "update_budget", "trainable_params")
    time_x, samples_x, params_x = (best[k] / cheap[k] for k in costs)
    return (
        f"{best['label']} reaches {best['test_accuracy']:.2%} against {cheap['test_accuracy']:.2%} of "
        f"{cheap['label']} ({points:+.2f} points, macro-F1 {f1:+.2f}) for {time_x:.1f}x the training time, "
        f"{samples_x:.1f}x the trained samples and {params_x:.0f}x the trainable parameters."
    )


def write_comparison(folder, rows):
    """comparison.json, comparison.md and comparison.png from the rows that metrics.json files hold."""
    names = [r["regime"] for r in rows]
    for r in rows:
        several = names.count(r["regime"]) > 1
        r["label"] = r["regime"] + f" ({r['image_size']} px, seed {r['seed']})" * several
    head = "regime | hardware | accuracy | macro-F1 | trainable (M) | epochs x samples | training | in all"
    table = [head.split(" | "), ["---"] * 8]
    for r in rows:
        machine = f"{r['device']}, {r['amp']}" + f", {r['processes']} processes" * (r["processes"] > 1)
        quality = [f"{r['test_accuracy']:.2%}", f"{r['test_f1_macro']:.4f}"]
        cost = [f"{r['trainable_params'] / 1e6:.3f}", f"{r['epochs_run']} x {r['samples_per_epoch']:,}"]
        times = [duration(r["train_seconds"]), duration(r["total_seconds"])]
        table.append([r["label"], machine, *quality, *cost, *times])
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    about = dict.fromkeys(f"{r['dataset']}; {r['weights']} weights; {r['image_size']} px" for r in rows)
    sentence = trade_off(rows)
    text = "\n".join(["Test part of " + " / ".join(about) + ".", "", *lines, "", sentence, ""])
    draw_comparison(folder / "comparison.png", rows)
    write_bytes(folder / "comparison.md", text.encode())
    write_json(folder / "comparison.json", {"rows": rows, "trade_off": sentence})
    return text


def draw_comparison(path, rows):
    figure, axes = new_figure(11, 4.4, 1, 2, sharey=True)
    costs = (("train_seconds", "training time (s), caches included"), ("update_budget", "trained samples"))
    for ax, (cost, label) in zip(axes[0], costs, strict=True):
        x = [r[cost] for r in rows]
        ax.plot(x, [100 * r["test_accuracy"] for r in rows], "o", color=BLUE, ms=9, label="accuracy")
        ax.plot(x, [100 * r["test_f1_macro"] for r in rows], "^", color=ORANGE, ms=9, label="macro-F1")
        for r in rows:
            spot = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            ax.annotate(r["label"], (r[cost], 100 * r["test_accuracy"]), **spot)
        ax.set(xlabel=label, ylabel="test part (%)", xscale="log")
        ax.margins(0.25, 0.2)
        ax.grid(alpha=0.3, which="both")
        ax.legend(loc="best")
    save_figure(figure, path)


def compare(args):
    """--compare DIR...: one comparison of the finished regimes in several folders."""
    rows = []
    for folder in map(Path, args.compare):
        found = [p for p in (folder / "metrics.json", *sorted(folder.glob("*/metrics.json"))) if p.exists()]
        if not found:
            raise InputError(f"--compare {folder}: no metrics.json there, no regime of it has finished")
        for path in found:
            try:
                rows.append(json.loads(path.read_text()))
                trade_off([rows[-1] | {"label": rows[-1]["regime"]}])
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise InputError(f"--compare: {path} is not of this script ({one_line(e)})") from e
    out = Path(args.out or f"results/resnet18-compare-{datetime.now():%Y%m%d-%H%M%S}")
    make_folder(out)
    print(write_comparison(out, sorted(rows, key=lambda r: r["train_seconds"])))
    print(f"in {out}: comparison.md, comparison.json, comparison.png")
    return 0


# ---------------------------------------------------------------------------------------------- predict


def open_picture(path):
    """Grey float32 [H, W] in 0..255, upright, the longer side 400 px, white behind what is transparent.

    Raises InputError for what is no image, a damaged image or one of more than 64 megapixels.
    """
    hint = ""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow's own, about EXIF that is corrupt and the like
            head = file.read(12)
            if head[:4] == b"%PDF":
                hint = "a PDF: export the page as PNG; "
            elif head[4:8] == b"ftyp":
                hint = "HEIC or a film: save it as JPEG or PNG; "
            picture = Image.open(file)
            w, h = picture.size
            if w * h > 64e6 or max(w, h) > 50 * min(w, h):  # before decoding: 20 KB of PNG may become 4 GB
                raise InputError(f"{w} x {h} pixels: more than 64 million, or a mere line")
            picture.draft("RGB", (400, 400))  # a JPEG is decoded at a half, a quarter or an eighth
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":  # 16 bits or more, often not all in use; convert() would clip them
                deep = np.nan_to_num(np.asarray(picture, np.float32), posinf=0).clip(0)
                picture = Image.fromarray(deep / max(deep.max(), 1e-9) * 255).convert("L")
            picture = ImageOps.contain(picture.convert("RGBA"), (400, 400))
            paper = Image.new("RGBA", picture.size, "white")
            return np.asarray(Image.alpha_composite(paper, picture).convert("L"), np.float32)
    except Exception as e:  # Pillow's readers throw whatever a damaged file leads to
        raise InputError(f"{path} can't be read ({hint}{one_line(e, 120)})") from e


def ring(shape, width):
    """Mask of the pixels that are less than `width` from the border."""
    mask = np.ones(shape, bool)
    mask[width:-width, width:-width] = False
    return mask


def above_paper(grey):
    """How far each pixel of [H, W] is from the paper around it: 0 the paper, 1 black; of light ink, white."""
    small = np.asarray(Image.fromarray(grey).reduce(4))  # fast, and less noise
    border = ring(small.shape, max(1, min(small.shape) * 6 // 100))
    # Ink is whatever differs most from its surroundings: a shadow's edge does so to both sides alike.
    padded = np.pad(small, 7, constant_values=np.median(small[border]))
    if ((padded - ndimage.uniform_filter(padded, 51)) ** 3).sum() > 0:  # light ink
        grey, small = 255 - grey, 255 - small
    # A closing that is wider than any stroke leaves the paper alone, with the edges of its shadows.
    paper = Image.fromarray(ndimage.grey_closing(small, 31))
    return 1 - grey / np.asarray(paper.resize(grey.shape[::-1], Image.Resampling.BILINEAR)).clip(1)


def otsu(values):
    """The threshold between the two classes whose means differ most for their sizes (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    n, total = counts.cumsum(), (counts * edges[1:]).cumsum()
    between = (total[-1] * n - total * n[-1]) ** 2 / (n * (n[-1] - n)).clip(1)
    return edges[1:][between.argmax()]


def choose_parts(labels):
    """Of the connected parts 1, 2, ... in labels [H, W]: which are the character; a warning or None."""
    boxes, area = ndimage.find_objects(labels), np.bincount(labels.ravel())[1:]
    size = np.array([[s.stop - s.start for s in box] for box in boxes])  # height and width of each
    wanted = area > 0.02 * area.max()
    for k in np.flatnonzero(wanted):
        own = labels[boxes[k]] == k + 1
        hole = ndimage.binary_fill_holes(own) & ~own
        wanted[k] = (labels[boxes[k]][hole] > 0).sum() < 0.1 * area[k]  # else a frame around another part
    # Table, shadow and punched hole reach the edge.
    inner = wanted & (size.max(1) > 32)
    inner[labels[ring(labels.shape, 1) & (labels > 0)] - 1] = False
    wanted, warning = (inner, None) if inner.any() else (wanted, "it reaches the edge of the picture")
    main = np.where(wanted, area, 0).argmax()
    for k in np.flatnonzero(wanted):
        down, right = (max(s.start - t.stop, t.start - s.stop) for s, t in zip(boxes[k], boxes[main]))
        wanted[k] = k == main or (max(down, right) < 0.3 * max(size[main]) and area[k] > 0.05 * area[main])
        if right > 0.08 * size[main, 0] and size[k, 0] > 0.5 * size[main, 0] and area[k] > 0.25 * area[main]:
            wanted[k], warning = False, "several characters side by side, the largest is read"
    return np.flatnonzero(wanted) + 1, warning


def find_ink(grey, name):
    """The character in a picture [H, W], cropped: float32 [h, w] in 0..1, light on dark; a warning or None.

    Raises InputError with the picture's name where nothing stands out from the paper.
    """
    dark = ndimage.gaussian_filter(above_paper(grey), 1.5)  # the sensor's noise
    rise = ndimage.morphological_gradient(dark, 25)
    threshold = otsu(dark)
    ink, paper = dark[dark > threshold], dark[dark <= threshold]
    # Shading grows slowly towards its darkest, ink at once; noise has no two classes.
    blank = (
        dark.max() < 0.08 or rise.max() < 0.7 * dark.max() or ink.mean() - paper.mean() < 3.5 * paper.std()
    )
    border = ring(dark.shape, 1)
    for width in range(2, 10):  # ruled lines and borders: they reach the edge, strokes are wider
        at_edge = (dark[border] > threshold).sum()
        opened = ndimage.grey_opening(dark, width, mode="constant") if at_edge else dark
        if 2 * (opened[border] > threshold).sum() < at_edge:
            dark = opened
    mask = dark > threshold
    # a picture that is cropped to its ink gets a margin, once: open_picture gives 400 px at most
    cropped = all(side.any() for side in (mask[:12], mask[-12:], mask[:, :12], mask[:, -12:]))
    if cropped and not blank and max(grey.shape) <= 400:
        return find_ink(np.pad(grey, 60, constant_values=np.median(grey[~mask])), name)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if blank or not count:
        raise InputError(f"{name} shows no character: nothing stands out from the paper")
    parts, warning = choose_parts(labels)
    mask = np.isin(labels, parts)
    ink = (dark / np.percentile(dark[mask], 90) - 0.15) / 0.85  # soft, as the networks know it
    ink = ink.clip(0, 1) * ndimage.binary_dilation(mask, iterations=6)
    rows, columns = (np.flatnonzero(ink.max(d) > 0.1) for d in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32), warning


def read_character(path):
    """The character of a picture as EMNIST places them: uint8 [28, 28], and a warning or None."""
    ink, warning = find_ink(open_picture(path), path)
    side = max(ink.shape)  # a square around the character, then two pixels of margin around 24
    square = np.pad(ink, [((side - n) // 2, (side - n + 1) // 2) for n in ink.shape])
    small = np.asarray(Image.fromarray(square).resize((24, 24), Image.Resampling.LANCZOS)).clip(0)
    return torch.from_numpy(np.pad(small * (255 / small.max()), 2)).round().byte(), warning


def predict(args):
    """--predict IMAGE... --checkpoint best.pt: the five most probable characters of each image."""
    if not args.checkpoint:
        raise InputError("--predict needs --checkpoint FILE, a best.pt of this script")
    run = Run(args)
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        classes, size = state["classes"], state["image_size"]
        model = build_model(len(classes), None, 0)
        model.load_state_dict(state["model"])
    except Exception as e:  # whatever a file that is none makes torch.load raise
        raise InputError(f"--checkpoint {args.checkpoint} is no best.pt ({one_line(e)})") from e
    model = model.eval().to(run.device, memory_format=torch.channels_last)
    status = 0
    for path in args.predict:
        try:
            image, warning = read_character(path)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            status = 2
            continue
        shares = whole_network(run, model, image[None].to(run.device), size).softmax(1)[0]
        best = shares.argsort(descending=True)[:5]
        line = f"{path}: " + "  ".join(f"{classes[k]} {shares[k]:.1%}" for k in best)
        print(line + (f"  | warning: {warning}" if warning else ""), flush=True)
    return status


# ---------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def number(kind, low, strict=False):
    """Type of an argument: a finite number from `low` on, without `low` itself if strict."""

    def read(text):
        value = kind(text)
        if value < low or (strict and value == low) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if strict else 'at least'} {low}")
        return value

    read.__name__ = "number"
    return read


def parse_args(argv):
    p = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, real, positive = number(int, 1), number(float, 0), number(float, 0, strict=True)
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=("auto", "emnist", "digits"), default="auto", help="auto: else digits")
    add("--data-dir", default="data", help="where EMNIST lies or is downloaded to")
    add("--limit", type=number(int, 10), help="use so many images of the train split, drawn by the seed")
    add("--image-size", type=number(int, 32), default=224, help="pixels that images are scaled to")
    add("--augment", action="store_true", help="small rotations, scales and shifts; nothing is kept then")
    add = p.add_argument_group("training (a value of None: the regime's own)").add_argument
    add("--regimes", nargs="+", default=["linear_probe", "partial_unfreeze"], help=f"of {', '.join(REGIMES)}")
    add("--weights", default="imagenet", help="imagenet, none, or a file with a state dict")
    add("--epochs", type=count, help="at most so many, for every stage")
    add("--batch-size", type=count, help="images per step, over all processes")
    add("--lr", type=positive, help="highest learning rate")
    add("--warmup-epochs", type=real, help="epochs of linear warm-up")
    add("--patience", type=count, help="epochs without progress before stopping early")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    add("--seed", type=number(int, 0), default=0, help="decides everything that is random")
    add = p.add_argument_group("run").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, mps or cpu")
    add("--deterministic", action="store_true", help="bit-identical on CUDA too, slower")
    add("--cache-gb", type=real, help="memory for layer3's output (GB); without: 70%% of what is free")
    add("--checkpoint-minutes", type=real, default=2.0, help="longest time between two checkpoints")
    add("--out", help="results folder, continued if it exists; without: results/resnet18-<timestamp>")
    add("--dry-run", action="store_true", help="one batch through everything")
    add = p.add_argument_group("instead of training").add_argument
    add("--compare", nargs="+", metavar="DIR", help="merge finished runs into one comparison in --out")
    add("--predict", nargs="+", metavar="IMAGE", help="read one character per image")
    add("--checkpoint", metavar="FILE", help="best.pt for --predict")
    args = p.parse_args(argv)
    args.regimes = [name for text in args.regimes for name in text.split(",") if name]
    wrong = [name for name in args.regimes if name not in REGIMES or args.regimes.count(name) > 1]
    if wrong or not args.regimes:
        named = f"{wrong[0]} is unknown or repeated" if wrong else "none given"
        raise InputError(f"--regimes: {named}; there are {', '.join(REGIMES)}")
    return args


FREE = {"device", "data_dir", "cache_gb", "checkpoint_minutes", "out"}  # may differ when a run is continued
BEFORE = {"code", "commit", "resnet18.py"}  # what a batch job may lay into OUT before the first start


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as e:
        raise InputError(f"--out {path} cannot be used ({e.strerror})") from e


def open_out(run, stack):
    """Chooses, checks and locks OUT; returns what an earlier piece of this run left in args.json, or None."""
    new = vars(run.args)
    run.out = Path(new["out"] or f"results/resnet18-{datetime.now():%Y%m%d-%H%M%S}")
    make_folder(run.out)
    held = run.out / "args.json"
    found = sorted(p.name for p in run.out.iterdir() if p.name[0] != "." and p.name not in BEFORE)
    if found and not held.exists() and found != ["samples.png"]:
        raise InputError(f"--out {run.out} holds other files ({', '.join(found[:3])}): name a new folder")
    stack.enter_context(folder_lock(run.out))
    if not held.exists():
        return None
    try:
        before = json.loads(held.read_text())
        old = before["arguments"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{held} is not of this script: name a new --out") from e
    differ = [k for k, v in new.items() if old.get(k) != v and k not in FREE]
    if differ:
        named = "; ".join(f"--{k.replace('_', '-')} {old.get(k)}, now {new[k]}" for k in differ)
        raise InputError(f"--out {run.out} holds a run with other arguments: {named}")
    return before


def command(out):
    """How to continue this run."""
    words = sys.argv[1:]
    kept = [w for w, left in zip(words, ["", *words], strict=False) if "--out" not in (w, left)]
    kept = [w for w in kept if not w.startswith("--out=")]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc-per-node={processes}"] if processes else ["python"]
    return "continue with: " + shlex.join([*start, sys.argv[0], *kept, "--out", str(out)])


def load_inputs(args):
    """Data, weights and their name; writes what `auto` came to into args.dataset and args.weights."""
    data = load_data(args)
    try:
        weights, weights_name = load_weights(args.weights)
    except DownloadFailed as e:
        if args.dataset != "auto" or data.name != "digits":
            raise
        print(f"{e}\nGOING ON with random weights", flush=True)
        args.weights = "none"
        weights, weights_name = load_weights("none")
    args.dataset = "digits" if data.name == "digits" else "emnist"
    return data, weights, weights_name


def load_all(run, before):
    """Data and weights, by what `auto` came to at the first start; written into args.json then."""
    args = copy.copy(run.args)
    if before:
        args.dataset, args.weights = before["dataset_flag"], before["weights_flag"]
        run.amp = choose_amp(before["amp"], run.device)
    found = run.on_main(lambda: load_inputs(args))  # the others wait, and find the files there
    args.dataset, args.weights = run.share((args.dataset, args.weights))
    data, weights, weights_name = found or load_inputs(args)
    about = {"dataset": data.name, "weights": weights_name, "amp": run.amp}
    changed = [f"{k} was {before[k]}, now {v}" for k, v in about.items() if before and before[k] != v]
    if changed:
        raise InputError(f"--out {run.out} cannot be continued: {'; '.join(changed)}")
    if run.main and not before:
        draw_samples(run.out / "samples.png", data)
        about |= {"dataset_flag": args.dataset, "weights_flag": args.weights}
        about |= {"git_commit": git_commit(), "torch": torch.__version__}
        write_json(run.out / "args.json", {"arguments": vars(run.args), **about})
    data.to(run.device)
    return data, weights, weights_name


def train_all(run, before):
    """All regimes that are not finished yet, and their comparison."""
    data, weights, weights_name = load_all(run, before)
    sizes = ", ".join(f"{part} {len(data.labels[part]):,}" for part in ("train", "val", "test"))
    run.say(f"{data.name} ({sizes}), weights: {weights_name}, {run.args.image_size} px, amp {run.amp}")
    run.say(f"{device_name(run.device)}, torch {torch.__version__}, processes: {run.world}")
    if run.world > 1 and run.device.type == "cpu" and run.args.regimes != ["linear_probe"]:
        run.say("BatchNorm that trains: statistics of each process's share, averaged after every step")
    rows = []
    for name in run.args.regimes:
        held = run.out / name / "metrics.json"
        row = run.share(json.loads(held.read_text()) if run.main and held.exists() else None)
        rows.append(row or run_regime(run, name, data, weights, weights_name))
    if run.main:
        run.say(write_comparison(run.out, rows).splitlines()[-1])
        shutil.rmtree(run.out / "features", ignore_errors=True)


def train(args):
    """Training from the command line to the last line; exit status 0, 1, or 75 after a saved stop."""
    run, status = Run(args), 0
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, run.ask_stop))
        if run.world > 1:
            stack.callback(dist.destroy_process_group)
        before = run.on_main(lambda: open_out(run, stack))
        run.out, before = run.share((run.out, before))
        run.say(command(run.out))
        try:
            names = [f"{name}/metrics.json" for name in args.regimes] + ["comparison.json"]
            if run.share(all((run.out / name).exists() for name in names)):
                run.say(f"all is done: {(run.out / 'comparison.md').read_text().splitlines()[-1]}")
            else:
                train_all(run, before)
        except InputError:
            if run.main and not (run.out / "args.json").exists():
                with contextlib.suppress(OSError):  # nothing was begun: leave nothing, where nothing else is
                    (run.out / ".lock").unlink()
                    run.out.rmdir()
            raise
        except Stopped:
            run.say("stopped between two steps, everything is saved")
            status = 75
        except (RuntimeError, MemoryError, OSError) as e:
            status = failure(e)
        run.say(command(run.out))
    return status


def failure(error):
    """One line on stderr for what a user can mend; anything else keeps its traceback."""
    text = one_line(error, 400)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        text = "out of memory: continue with --cache-gb 0, or take a smaller --batch-size and a new --out"
    elif not isinstance(error, (RunFailed, OSError)):
        raise error
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 1


def main(argv=None):
    try:
        args = parse_args(argv)
        if args.compare or args.predict:
            return compare(args) if args.compare else predict(args)
        return train(args)
    except InputError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
