"""ResNet-18 fine-tuned on EMNIST ByClass (62 classes): frozen layers run once, killed runs resume.

    python resnet18.py                                  # linear probe and partial unfreezing, compared
    python resnet18.py --regimes full gradual           # any of linear_probe, partial_unfreeze, full, gradual
    python resnet18.py --out DIR                        # the same command resumes where it was killed
    torchrun --nproc-per-node=4 resnet18.py --out DIR   # several GPUs or processes, the same steps
    python resnet18.py --compare DIR DIR                # one comparison of several runs
    python resnet18.py --evaluate DIR/partial_unfreeze/best.pt --out DIR2
    python resnet18.py --predict photo.png --checkpoint DIR/partial_unfreeze/best.pt

The last lines of a run (no flags: 12,000 images at 64 px; EMNIST ByClass 116k/16k re-split, approximate
ImageNet weights, two cores of an AMD EPYC without bf16, torch 2.14, seed 0, nine minutes in all):

    partial_unfreeze reaches 83.24% against 75.73% of linear_probe (+7.51 points, macro-F1 +10.31) for 11.5x
    the training time, 0.5x the trained samples and 265x the trainable parameters.

An image on its way (N images of a batch, S --image-size, K classes):

    image           uint8 [N, 28, 28]                          upright(), in memory, on the device
      prepare()     float [N, 3, S, S]                         resized, normalised as ImageNet's images were
      frozen        [N, 512] or [N, 256, S/16, S/16]           the layers that don't train
      Inputs        the same, kept on disk or in memory        where it never changes, it is computed once
      head          logits float32 [N, K]                      the layers that train, average pooling, fc

Training, validation, test and prediction call head(inputs). Everything from "plumbing" on can be skipped.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a run at once while nothing is there to save

import argparse
import contextlib
import copy
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import socket
import ssl
import string
import subprocess
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure  # pyplot would set up a display and global state on import
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn import datasets, metrics
from torch import nn

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase  # EMNIST ByClass, label 0 to 61
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights were trained on
PARTS = {  # what trains: number of frozen blocks, prefixes of the trained parameters, their number below fc
    "fc": (5, ("fc.",), 0),
    "layer4": (4, ("layer4.", "fc."), 8_393_728),
    "all": (0, ("",), 11_176_512),
}
EVAL_BATCH = 256  # fixed, so that whatever is computed twice comes out the same to the bit
CHUNK = 2048  # images in a file of features: at most so many are computed again after a kill
TRAINING = ("features", "cache", "steps")  # the phases counted in train_seconds
MIN_DELTA = 0.0005  # validation accuracy (0..1) that counts as progress for early stopping


@dataclass(frozen=True)
class Stage:
    """One fine-tuning: what trains (a key of PARTS) and by which recipe."""

    trains: str
    lr: float  # the highest
    epochs: int  # at most
    warmup_epochs: float
    batch_size: int  # images per step, over all processes
    patience: int  # epochs without progress before stopping early
    weight_decay: float = 0.01


# All use AdamW; what else was tried on validation is in report/LOG.md. The course's recipe is the probe's as
# it is, and --regimes partial_unfreeze --lr 0.0005 --epochs 20.
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


class DownloadError(InputError):
    """The network or the server failed to deliver a file."""


class RunFailed(RuntimeError):
    """A training that can't go on: one line, exit status 1."""


class Diverged(RunFailed):
    """A loss that is not finite."""


class Stopped(Exception):
    """SIGTERM or SIGINT was obeyed, progress is saved: exit status 75."""


# ---------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Images uint8 [n, 28, 28], upright, and labels int64 [n], by set: train, val, test."""

    name: str
    classes: str
    images: dict
    labels: dict
    total: int = 0  # training and validation images before --limit

    def to(self, device):
        for tensors in (self.images, self.labels):
            tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})


def upright(images):
    """EMNIST's files hold every image transposed (rotated by 90 degrees and mirrored)."""
    return images.transpose(1, 2).contiguous()  # N, 28, 28


def emnist_files(root):
    raw = Path(root) / "EMNIST" / "raw"
    kinds = [(name, kind) for name in ("train", "test") for kind in ("images-idx3", "labels-idx1")]
    return [raw / f"emnist-byclass-{name}-{kind}-ubyte" for name, kind in kinds]


def download_emnist(root):
    """torchvision's archive, its checksum compared, unpacked beside and moved into place when it is whole."""
    beside, raw = Path(root) / ".download", Path(root) / "EMNIST" / "raw"
    offline = f"put the four files emnist-byclass-*-ubyte into {raw}, or use --dataset digits"
    with download("EMNIST (536 MB)", torchvision.datasets.EMNIST.url, Path(root), "--data-dir", offline):
        if all(path.exists() for path in emnist_files(root)):
            return  # another process was faster
        for path in emnist_files(beside):
            path.unlink(missing_ok=True)  # may be half unpacked
        torchvision.datasets.EMNIST(beside, split="byclass", download=True)
        raw.mkdir(parents=True, exist_ok=True)
        for source, target in zip(emnist_files(beside), emnist_files(root)):
            os.replace(source, target)
        shutil.rmtree(beside, ignore_errors=True)


def load_emnist(root):
    """EMNIST ByClass from `root`, downloaded where it is missing; InputError where a file is damaged."""
    files = emnist_files(root)
    if not all(path.exists() for path in files):
        download_emnist(root)
    data = Data("EMNIST ByClass", CLASSES, {}, {})
    for name in ("train", "test"):
        try:
            emnist = torchvision.datasets.EMNIST(root, split="byclass", train=name == "train")
            images, labels = emnist.data, emnist.targets.long()
            if images.shape != (len(labels), 28, 28) or images.dtype != torch.uint8 or not len(labels):
                raise ValueError(f"{len(labels)} labels, images {images.dtype} {list(images.shape)}")
            if labels.min() < 0 or labels.max() >= len(CLASSES):
                raise ValueError(f"labels {labels.min()} to {labels.max()}, expected 0 to {len(CLASSES) - 1}")
        except Exception as e:  # damage shows in many ways: assertion, reshape, end of file, labels
            damaged = files[0].parent / f"emnist-byclass-{name}-*"
            raise InputError(f"{damaged} is damaged ({one_line(e)}): delete it and start again") from e
        data.images[name], data.labels[name] = upright(images), labels
    n, m = (len(data.labels[name]) for name in ("train", "test"))
    if (n, m) != (697_932, 116_323):  # never to be taken for the official split
        data.name += f", {n / 1000:.0f}k/{m / 1000:.0f}k re-split" if m >= 1000 else f", {n}/{m} re-split"
    return data


def load_digits():
    """scikit-learn's 1,797 real 8x8 digits, scaled to 28x28; a fixed fifth of them is the test set."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images / 16 * 255, dtype=torch.float32)[:, None]  # n, 1, 8, 8
    images = F.interpolate(images, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=rng("digits"))
    train, test = order[360:], order[:360]
    return Data(
        "digits",
        CLASSES[:10],
        {"train": images[train], "test": images[test]},
        {"train": labels[train], "test": labels[test]},
    )


def load_data(dataset, folder):
    """The data set; `auto` falls back to the digits where EMNIST can't be downloaded, and says so."""
    try:
        return load_digits() if dataset == "digits" else load_emnist(folder)
    except DownloadError as e:
        if dataset != "auto":
            raise
        banner(f"{e}\nFALLING BACK to scikit-learn's digits: 10 classes, 8x8 pixels")
        return load_digits()


def split(n, limit, seed):
    """Indices of the training and validation set, 90/10, of all n images or of `limit` seeded ones."""
    chosen = torch.randperm(n, generator=rng(seed, "limit"))[:limit] if limit else torch.arange(n)
    chosen = chosen[torch.randperm(len(chosen), generator=rng(seed, "split"))]
    cut = len(chosen) * 9 // 10
    return chosen[:cut].sort().values, chosen[cut:].sort().values


def split_data(data, settings):
    """Takes the validation set out of the training set; InputError if too few images are left."""
    data.total = len(data.labels["train"])
    train, val = split(data.total, settings.limit, settings.seed)
    if not len(val) or len(train) < 2:
        raise InputError(f"{len(train)} training and {len(val)} validation images are too few")
    for tensors in (data.images, data.labels):
        tensors["val"], tensors["train"] = tensors["train"][val], tensors["train"][train]
        if settings.dry_run:
            tensors.update({name: tensor[: settings.batch_size or 32] for name, tensor in tensors.items()})


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
    where = "cpu" if images.device.type == "mps" else images.device  # mps knows no "border" padding
    grid = F.affine_grid(theta.to(where), (len(images), 1, size, size), align_corners=False)
    grey = images[:, None].to(where).float()
    return F.grid_sample(grey, grid, "bilinear", "border", align_corners=False).to(images.device)


def prepare(images, size, theta=None):
    """uint8 [N, 28, 28] -> the network's input: float [N, 3, S, S], normalised, channels_last."""
    grey = resize(images, size) if theta is None else warp(images, theta, size)  # N, 1, S, S
    shift, scale = normalisation(grey.device)
    x = torch.empty(len(images), size, size, 3, device=grey.device)
    # (grey / 255 - MEAN) / STD in each channel, written straight into channels_last memory
    torch.addcmul(shift, grey[:, 0, :, :, None], scale, out=x)
    return x.permute(0, 3, 1, 2)  # N, 3, S, S


@functools.cache  # copied to the device once, as a copy waits for it
def normalisation(device):
    """0..255 to ImageNet's mean and standard deviation, as (shift, scale)."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (-mean / std).to(device), (1 / (255 * std)).to(device)


# ---------------------------------------------------------------------------------------------- model


def load_weights(spec):
    """State dict of the backbone (None: random) and the name to report; InputError if it can't be read."""
    if spec == "none":
        return None, "random"
    path, name, hint = Path(spec), Path(spec).name, "expected a state dict of ResNet-18"
    if spec == "imagenet":
        source = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        path = Path(torch.hub.get_dir(), "checkpoints", Path(source.url).name)
        name, hint = "ImageNet (IMAGENET1K_V1)", "delete it, and it is downloaded again"
        if not path.exists():
            offline = "fetch the file elsewhere and give --weights FILE, or --weights none for random ones"
            with download("ImageNet weights (45 MB)", source.url, path.parent, "TORCH_HOME", offline):
                source.get_state_dict(progress=False, check_hash=True)
    try:
        state = {k: v for k, v in read_tensors(path).items() if not k.startswith("fc.")}
        missing, wrong = torchvision.models.resnet18().load_state_dict(state, strict=False)
        wrong += [k for k in missing if not k.startswith("fc.") and not k.endswith("num_batches_tracked")]
        wrong += [k for k, v in state.items() if not torch.isfinite(v).all()]
        if wrong:
            raise ValueError(f"missing, unknown or not finite: {', '.join(wrong[:3])}")
    except Exception as e:  # whatever torch.load raises for a file that is something else
        raise InputError(f"--weights: {path} can't be used ({one_line(e, 300)}): {hint}") from e
    return state, name


def build_model(classes, weights, seed):
    """torchvision's ResNet-18 with a new fc; nothing but the seed decides the random part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18()
    if weights is not None:
        model.load_state_dict(weights, strict=False)  # all but fc
    model.fc = nn.Linear(512, classes)
    for p in (model.fc.weight, model.fc.bias):
        nn.init.uniform_(p, -(512**-0.5), 512**-0.5, generator=rng(seed, "fc", p.dim()))
    return model.to(memory_format=torch.channels_last)


def layout(device):
    """channels_last makes convolutions faster on CPUs and GPUs; mps has wrong BatchNorm gradients in it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Section(nn.Module):
    """Consecutive blocks of the network, in mixed precision, then pooling and fc where they belong to it."""

    def __init__(self, blocks, amp, pool=False, fc=None):
        super().__init__()
        self.blocks, self.amp, self.pool, self.fc = nn.Sequential(*blocks), amp, pool, fc

    def forward(self, x):
        if len(self.blocks):
            x = x.contiguous(memory_format=layout(x.device))  # as it is already, but on mps
            kind = torch.float16 if self.amp == "fp16" else torch.bfloat16
            with torch.autocast(x.device.type, kind, enabled=self.amp != "off"):
                x = self.blocks(x)
        if self.pool:
            x = x.float().mean((2, 3))  # N, 512: in float32, as 16 bits lose digits in a long sum
        return x if self.fc is None else self.fc(x)


def split_at(model, trains, amp):
    """(frozen, head), made of the model's own blocks; the frozen ones lose their gradient, and their
    BatchNorm is in evaluation mode from now on."""
    cut, _, count = PARTS[trains]
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = [stem, model.layer1, model.layer2, model.layer3, model.layer4]
    # average pooling belongs to whichever has the last block: a probe's features are 512 numbers
    frozen = Section(blocks[:cut], amp, pool=cut == len(blocks))
    head = Section(blocks[cut:], amp, pool=cut < len(blocks), fc=model.fc)
    model.requires_grad_(True)
    frozen.eval().requires_grad_(False)
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert training == count + sum(p.numel() for p in model.fc.parameters()), f"{training:,} parameters train"
    return frozen, head


def read_best(path):
    """(model in evaluation mode, on the CPU; all that best.pt holds); InputError as load_model's."""
    try:
        best = read_tensors(path)
        best["image_size"] = int(best["image_size"])
        model = build_model(len(best["classes"]), None, 0)
        model.load_state_dict(best["model"])
        if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
            raise ValueError("a weight is not finite")
        return model.eval(), best
    except Exception as e:  # unpickling fails in many ways
        raise InputError(f"{path} is not a best.pt of this script, or damaged ({one_line(e)})") from e


def load_model(path):
    """A run's best.pt -> (model in evaluation mode, on the CPU; classes, a string; image size in pixels).

    logits = model(prepare(images, size)) for images uint8 [N, 28, 28], upright, light on dark. Raises
    InputError if the file is damaged or not a best.pt.
    """
    model, best = read_best(path)
    return model, best["classes"], best["image_size"]


# ---------------------------------------------------------------------------------------------- frozen layers


def in_batches(run, forward, shape, what, poll, start=0, total=None, dtype=torch.float32):
    """forward(indices) for shape[0] images from `start` on, in batches, shared among the processes."""
    rows, began, stop = torch.zeros(shape, dtype=dtype, device=run.device), time.monotonic(), start + shape[0]
    for first in range(start, stop, EVAL_BATCH * run.world):
        mine = min(first + run.rank * EVAL_BATCH, stop)
        index = torch.arange(mine, min(mine + EVAL_BATCH, stop), device=run.device)
        if len(index):
            rows[index - start] = forward(index)
        poll()
        run.pulse(pace, what, min(first + EVAL_BATCH * run.world, stop), total or stop, began, start)
    if run.world > 1:
        dist.all_reduce(rows)  # every row is still zero on all processes but one: an exact sum
    return rows


def features(run, name, images, forward):
    """forward(indices) [n, 512], kept in files of CHUNK images, so that a kill loses one; and their cost."""
    rows = torch.empty(len(images), 512, device=run.device)  # once: the official split's take 1.4 GB
    folder, seconds, cpu_seconds = run.out / "features", 0.0, 0.0
    if run.main:
        folder.mkdir(exist_ok=True)
    for start in range(0, len(images), CHUNK):
        path, stop = folder / f"{name}-{start // CHUNK:05d}.pt", min(start + CHUNK, len(images))
        chunk = run.share(try_read(path, ["rows", "seconds"]) if run.main and path.exists() else None)
        if chunk is None or chunk["rows"].shape != rows[start:stop].shape:
            wall, cpu = time.perf_counter(), time.process_time()
            shape, what = (stop - start, 512), f"features, {name}"
            part = in_batches(run, forward, shape, what, run.poll, start, len(images))
            chunk = {"rows": part.cpu(), "seconds": time.perf_counter() - wall}
            chunk["cpu_seconds"] = time.process_time() - cpu
            if run.main:
                save_tensors(path, chunk)
        rows[start:stop] = chunk["rows"]
        seconds += chunk["seconds"]
        cpu_seconds += chunk.get("cpu_seconds", 0.0)  # an older version's files have none
    return rows, seconds, cpu_seconds


def layer3_shape(count, size):
    """Of layer3's output in channels_last's order: [n, h, w, 256]."""
    side = math.ceil(size / 16)
    return count, side, side, 256


def cache_bytes(count, size, amp):
    return math.prod(layer3_shape(count, size)) * (4 if amp == "off" else 2)


def cache_limit(run):
    gigabytes = run.settings.cache_gb
    return 0.7 * free_bytes(run.device) if gigabytes is None else gigabytes * 1e9


class Inputs:
    """The head's inputs: outputs of the frozen layers.

    Sets that compute() has kept are looked up; for any other every call runs the frozen layers.
    """

    def __init__(self, run, data, frozen, trains):
        self.run, self.data, self.frozen, self.trains = run, data, frozen, trains
        # by set; whether layer3's output is kept, once decided: kept rows and recomputed ones may differ in
        # the last bit, so a resumed run does what it did before
        self.kept, self.in_memory = {}, None

    @torch.no_grad()
    def run_frozen(self, name, index, theta=None):
        return self.frozen(prepare(self.data.images[name][index], self.run.settings.image_size, theta))

    def __call__(self, name, index, theta=None):
        """[N, 512] or [N, C, h, w] for the images `index` of a set."""
        if name not in self.kept:
            return self.run_frozen(name, index, theta)
        x = self.kept[name][index]
        return x if x.dim() == 2 else x.permute(0, 3, 1, 2)  # kept as channels_last, [n, h, w, 256]

    def compute(self, timer):
        """Fills `kept`; augmented training images are new in every epoch, so then validation's alone."""
        run, names = self.run, ["val"] if self.run.settings.augment else ["train", "val"]
        count = sum(len(self.data.labels[name]) for name in names)
        if self.trains == "fc":
            spent = {"seconds": 0.0, "cpu_seconds": 0.0}
            for name in names:
                forward = functools.partial(self.run_frozen, name)
                self.kept[name], seconds, cpu = features(run, name, self.data.images[name], forward)
                spent["seconds"] += seconds
                spent["cpu_seconds"] += cpu
            timer("features")
            for k, value in spent.items():  # what the files cost, whichever regime or start made them
                timer.progress[k]["features"] = value
            rate = count / spent["seconds"]
            run.say(f"features of {count:,} images: {duration(spent['seconds'])} ({rate:,.0f} images/s)")
        elif self.trains == "layer4" and self.fits(count):
            for name in names:
                self.kept[name] = self.layer3(name)
            timer("cache")
            run.say(f"layer3's output kept in memory: {duration(timer.progress['seconds']['cache'])}")

    def layer3(self, name):
        """layer3's output of a set: [n, h, w, 256]."""
        settings = self.run.settings
        kind = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.amp]
        shape = layer3_shape(len(self.data.labels[name]), settings.image_size)

        def forward(index):
            return self.run_frozen(name, index).permute(0, 2, 3, 1)

        return in_batches(self.run, forward, shape, f"cache, {name}", self.run.poll, dtype=kind)

    def fits(self, count):
        """Whether layer3's output goes into memory."""
        run = self.run
        need, limit = cache_bytes(count, run.settings.image_size, run.settings.amp), cache_limit(run)
        if self.in_memory is None or run.settings.cache_gb is not None:
            self.in_memory = need <= limit
        self.in_memory = self.in_memory and run.world == 1
        why = "several processes" if run.world > 1 else "--cache-gb sets the budget"
        verdict = "kept in memory" if self.in_memory else f"recomputed for every batch ({why})"
        run.say(f"layer3's output: {need / 1e9:.2f} GB, budget {limit / 1e9:.2f} GB: {verdict}")
        return self.in_memory


# ---------------------------------------------------------------------------------------------- training


class Timer:
    """Adds up wall and CPU seconds by what they went into, also over several starts of a run."""

    def __init__(self, device, progress):
        self.device, self.progress = device, progress
        self.last = time.perf_counter(), time.process_time()

    def __call__(self, what):
        synchronize(self.device)  # else the next phase would be charged for queued work
        now = time.perf_counter(), time.process_time()
        for k, before, after in zip(("seconds", "cpu_seconds"), self.last, now):
            self.progress[k][what] = self.progress[k].get(what, 0.0) + after - before
        self.last = now


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.cuda, torch.mps


NO_BEST = {"accuracy": -1.0, "epoch": 0, "number": 0, "tau": 0.0, "weights": None}


def new_progress():
    return {"seconds": {}, "cpu_seconds": {}, "history": [], "stages": [], "peak": 0}


@dataclass
class State:
    """How far a regime has got. With weights, optimizer and scaler it is what last.pt holds."""

    number: int = 0  # of the stage
    epoch: int = 0  # finished epochs of the stage
    step: int = 0  # finished steps of the epoch
    done: bool = False  # the stage has ended, the model has the best weights
    best: dict = field(default_factory=lambda: dict(NO_BEST))  # the best epoch so far, of whichever stage
    reference: float = -1.0  # validation accuracy at the last real progress
    stale: int = 0  # epochs since
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(1))  # of the epoch's steps
    hits: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    progress: dict = field(default_factory=new_progress)  # of the whole regime


class Trainer:
    """A regime's training, stage by stage: model, optimizer, early stopping, checkpoints."""

    def __init__(self, run, data, model, stages, folder):
        self.run, self.data, self.model, self.stages, self.folder = run, data, model, stages, folder
        self.n, self.state = len(data.labels["train"]), State()
        self.timer = Timer(run.device, self.state.progress)
        self.published = None  # (stage, epoch) of the weights that best.pt holds
        self.begin(0)

    def begin(self, number):
        """Stage `number`, from the weights that the model has."""
        run, stage, previous = self.run, self.stages[number], self.state
        self.ddp = None  # two DDP wrappers of one parameter would both sum its gradient
        self.stage, self.steps = stage, math.ceil(self.n / stage.batch_size)
        frozen, self.head = split_at(self.model, stage.trains, run.settings.amp)
        self.inputs = Inputs(run, self.data, frozen, stage.trains)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=stage.lr, weight_decay=stage.weight_decay, fused=run.device.type != "mps"
        )
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.settings.amp == "fp16")
        self.state = State(number, progress=previous.progress)
        self.state.losses, self.state.hits = torch.zeros(2, self.steps, device=run.device)
        if number:  # the model has the best weights so far: a stage that never does better ends with them
            self.state.best = dict(previous.best)
            self.state.best["weights"] = self.weights()

    def learning_rate(self):
        """1) linear warm-up from zero, 2) half a cosine down to zero."""
        step, warm = self.state.epoch * self.steps + self.state.step, self.stage.warmup_epochs * self.steps
        if step < warm:
            return self.stage.lr * (step + 1) / (warm + 1)
        rest = max(1.0, self.stage.epochs * self.steps - warm)
        return self.stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / rest)))

    def train_step(self, order):
        """One step; `order` is the epoch's permutation of the training set."""
        run, state = self.run, self.state
        first, last = self.n * state.step // self.steps, self.n * (state.step + 1) // self.steps
        index = order[first:last]  # the same images for any number of processes
        mine, theta = index[run.rank :: run.world], None
        if run.settings.augment:
            generator = rng(run.settings.seed, "augment", state.number, state.epoch, state.step)
            theta = draw_affine(len(index), generator)[run.rank :: run.world].to(run.device)
        y = self.data.labels["train"][mine]
        logits = (self.ddp or self.head)(self.inputs("train", mine, theta))
        loss = F.cross_entropy(logits, y, reduction="sum") / len(index)  # this process's share of the mean
        self.optimizer.zero_grad()
        # DDP takes the mean of the processes' gradients: times their number it is the sum over all images
        self.scaler.scale(loss * run.world).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # this process's share, which agree() turns into the sum
        state.losses[state.step], state.hits[state.step] = loss.detach(), (logits.argmax(1) == y).sum()
        if run.world > 1:
            self.agree(len(mine) / len(index))
        state.step += 1

    def agree(self, share):
        """Sums loss and hits over the processes and, on CPUs, averages BatchNorm's statistics by share."""
        step, state = self.state.step, self.state
        tensors = [state.losses[step : step + 1], state.hits[step : step + 1]]
        if self.run.device.type != "cuda":  # there SyncBatchNorm has the same statistics everywhere
            # a weighted mean over the processes: each one's share of it first, then the sum
            tensors += [b.mul_(share) for b in self.head.buffers() if b.is_floating_point()]
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))

    def train(self):
        """The stage to its last epoch, or until patience ends; the model then has the best weights."""
        run, state = self.run, self.state
        if state.done:
            return
        self.save()
        if not self.finished():
            self.inputs.compute(self.timer)
            if run.world > 1:
                self.wrap()
        self.began, self.first = time.monotonic(), state.epoch * self.steps + state.step  # for eta()
        try:
            while not self.finished():
                self.train_epoch()
                self.finish_epoch()
        except Diverged as e:
            if not state.number:
                raise
            run.say(f"{e}: this stage ends here, with the best weights so far")
            state.step, state.stale = 0, self.stage.patience
        self.model.load_state_dict(state.best["weights"], strict=False)
        state.done = True
        self.save()
        if state.epoch < self.stage.epochs:
            stage = self.stages[state.best.get("number", state.number)].trains
            back = f"epoch {state.best['epoch']}" + (f" of stage {stage}" if len(self.stages) > 1 else "")
            run.say(f"early stop after epoch {state.epoch}: back to the weights of {back}")
        run.poll(self.save)

    def wrap(self):
        """torch's DistributedDataParallel around the head, for training steps alone."""
        devices = None
        if self.run.device.type == "cuda":
            devices = [self.run.device]
            self.head = nn.SyncBatchNorm.convert_sync_batchnorm(self.head)  # shares parameters and statistics
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the flag's new name is not in torch 2.6
            self.ddp = nn.parallel.DistributedDataParallel(self.head, devices, broadcast_buffers=False)

    def train_epoch(self):
        run, state = self.run, self.state
        order = torch.randperm(self.n, generator=rng(run.settings.seed, "order", state.number, state.epoch))
        order, began, first = order.to(run.device), time.monotonic(), state.step
        self.head.train()
        while state.step < self.steps:
            self.train_step(order)
            run.poll(self.save)
            run.pulse(self.step_line, began, first)
        self.timer("steps")
        self.check_finite()

    def step_line(self, began, first):
        state = self.state
        rate = (state.step - first) * self.n / self.steps / max(1e-9, time.monotonic() - began)
        return (
            f"epoch {state.epoch + 1:2d}/{self.stage.epochs} | step {state.step}/{self.steps} "
            f"| loss {float(state.losses[state.step - 1]):.4f} | {rate:,.0f} images/s "
            f"| eta {duration(self.eta())}"
        )

    def finish_epoch(self):
        """Validation, early stopping, log line, checkpoint."""
        state = self.state
        loss, accuracy, tau = self.validate()
        self.timer("validation")
        better = accuracy > state.best["accuracy"]
        if better:
            state.best = {"accuracy": accuracy, "epoch": state.epoch + 1, "number": state.number, "tau": tau}
            state.best["weights"] = self.weights()
        state.stale += 1
        if accuracy > state.reference + MIN_DELTA:
            state.reference, state.stale = accuracy, 0
        history, spent = state.progress["history"], state.progress["seconds"]
        row = {
            "stage": self.stage.trains,
            "epoch": state.epoch + 1,
            "train_loss": float(state.losses.cpu().double().mean()),
            "train_accuracy": float(state.hits.cpu().double().sum()) / self.n,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": spent["steps"] + spent["validation"] - sum(row["seconds"] for row in history),
            "best": int(better),
        }
        history.append(row)
        state.epoch, state.step = state.epoch + 1, 0
        left = 0.0 if self.finished() else self.eta()
        self.run.say(epoch_line(row, self.stage.epochs, left))
        self.save()
        self.run.poll(self.save)

    def eta(self):
        """Seconds until the last epoch, at the rate measured since this start of the run."""
        now = self.state.epoch * self.steps + self.state.step
        rate = (time.monotonic() - self.began) / max(1, now - self.first)
        return rate * (self.stage.epochs * self.steps - now)

    def finished(self):
        return self.state.epoch >= self.stage.epochs or self.state.stale >= self.stage.patience

    def check_finite(self):
        """Raises Diverged with the step's number; once an epoch and before a save, as it waits for a GPU."""
        bad = (~torch.isfinite(self.state.losses[: self.state.step])).nonzero()
        if len(bad):
            loss, step = float(self.state.losses[bad[0]]), int(bad[0]) + 1
            raise Diverged(f"the loss is {loss} at step {step}/{self.steps} of epoch {self.state.epoch + 1}")

    def validate(self):
        """(loss, accuracy, best tau of the prior correction) on the validation set."""
        self.head.eval()
        y, width = self.data.labels["val"].cpu(), len(self.data.classes)

        @torch.no_grad()
        def forward(index):
            return self.head(self.inputs("val", index))

        poll = functools.partial(self.run.poll, self.save)
        logits = in_batches(self.run, forward, (len(y), width), "validation", poll).cpu()
        loss = float(F.cross_entropy(logits, y))
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after epoch {self.state.epoch + 1}")
        accuracy = float((logits.argmax(1) == y).double().mean())
        return loss, accuracy, tune_tau(logits, y, log_prior(self.data))

    def weights(self):
        """A copy of what trains, statistics included; the frozen rest is what --weights gave."""
        names, state = PARTS[self.stage.trains][1], self.model.state_dict()
        return {k: v.detach().cpu().clone() for k, v in state.items() if k.startswith(names)}

    def save(self):
        """last.pt, which alone decides where to go on; log.csv and best.pt follow from it."""
        run, state = self.run, self.state
        # after the last step of an epoch comes its validation, which may be stopped, too
        self.timer("steps" if state.step < self.steps else "validation")
        self.check_finite()  # a state that has diverged never replaces a good one
        state.progress["peak"] = max(state.progress.get("peak", 0), peak_bytes(run.device))
        if run.main:
            last = vars(state) | {"weights": self.weights(), "optimizer": self.optimizer.state_dict()}
            last |= {"scaler": self.scaler.state_dict(), "in_memory": self.inputs.in_memory}
            save_tensors(self.folder / "last.pt", last | {"arguments": vars(run.args)}, keep=True)
            self.publish()
        self.timer("checkpoint")
        run.saved_at = time.monotonic()

    def publish(self):
        state, settings = self.state, self.run.settings
        write_csv(self.folder / "log.csv", state.progress["history"])
        best_epoch = state.best.get("number", state.number), state.best["epoch"]
        if self.published == best_epoch or state.best["weights"] is None:
            return
        model = {k: v.detach().cpu() for k, v in self.model.state_dict().items()} | state.best["weights"]
        about = {"classes": self.data.classes, "image_size": settings.image_size, "amp": settings.amp}
        about |= {k: state.best[k] for k in ("accuracy", "epoch")} | {"dataset": self.data.name}
        save_tensors(self.folder / "best.pt", {"model": model, **about})
        self.published = best_epoch

    def load(self, last):
        """Resumes from what last.pt holds; raises an exception if something is missing or differs."""
        if not 0 <= last["number"] < len(self.stages):
            raise ValueError(f"stage {last['number']}")
        self.begin(last["number"])
        state = State(**{name: last[name] for name in vars(self.state)})
        state.progress = new_progress() | state.progress  # an older run's has no CPU seconds
        times = [*state.progress["seconds"].values(), *state.progress["cpu_seconds"].values()]
        tables = [*state.progress["history"], *state.progress["stages"], state.best]
        fits = state.losses.shape == state.hits.shape == (self.steps,)
        fits = fits and 0 <= state.step <= self.steps and 0 <= state.epoch <= self.stage.epochs
        fits = fits and last["weights"].keys() == self.weights().keys()
        fits = fits and math.isfinite(sum(times) + state.best["accuracy"] + state.best["tau"])
        fits = fits and all(isinstance(table, dict) for table in tables)
        weights = [*last["weights"].values(), *(state.best["weights"] or {}).values()]
        if not fits or not all(torch.isfinite(w).all() for w in weights):
            raise ValueError("it does not fit this regime")
        state.losses, state.hits = state.losses.to(self.run.device), state.hits.to(self.run.device)
        self.model.load_state_dict(last["weights"], strict=False)
        self.optimizer.load_state_dict(last["optimizer"])
        self.scaler.load_state_dict(last["scaler"])
        self.state, self.inputs.in_memory = state, last["in_memory"]
        self.timer = Timer(self.run.device, state.progress)

    def summary(self):
        """What metrics.json says about a finished stage."""
        ran = {"epochs_run": self.state.epoch, "early_stopped": self.state.epoch < self.stage.epochs}
        ran |= {"samples_per_epoch": self.n, "trainable_params": sum(p.numel() for p in self.params)}
        best = {"best_epoch": self.state.best["epoch"], "val_accuracy": self.state.best["accuracy"]}
        return asdict(self.stage) | ran | best


def epoch_line(row, epochs, left):
    return (
        f"epoch {row['epoch']:2d}/{epochs} "
        f"| train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%} "
        f"| val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.2%} | lr {row['lr']:.1e} "
        f"| {duration(row['seconds'])} | eta {duration(left)}" + (" | best" if row["best"] else "")
    )


def stages_of(name, settings):
    """A regime's stages, with what the command line overrides; a dry run takes one step."""
    names = ("lr", "epochs", "warmup_epochs", "batch_size", "patience")
    given = {k: getattr(settings, k) for k in names if getattr(settings, k) is not None}
    if settings.dry_run:
        given["epochs"] = 1
    return [replace(stage, **given) for stage in REGIMES[name]]


def resume(run, data, make_model, stages, folder):
    """The regime's trainer, continued from last.pt or the one before it, or else a new one."""
    for path in (folder / "last.pt", folder / "last.pt.prev"):
        last = run.share(try_read(path, vars(State())) if run.main and path.exists() else None)
        if last is not None:
            trainer = Trainer(run, data, make_model(), stages, folder)
            try:
                trainer.load(last)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
                run.say(f"{path} is not of this run or damaged ({one_line(e)}): not used")
                continue
            if run.main:
                os.replace(
                    path, folder / "last.pt"
                )  # the one before it, where a kill or damage left no other
                trainer.publish()
            return trainer, True
    return Trainer(run, data, make_model(), stages, folder), False


# ------------------------------------------------------------------------------------- regime and test set


def log_prior(data):
    """Logarithm of the classes' share of the training set, each counted once more than seen: [K]."""
    counts = torch.bincount(data.labels["train"].cpu(), minlength=len(data.classes)).double() + 1
    return (counts / counts.sum()).log()


def macro_f1(labels, predicted, k):
    """As scikit-learn's, from the confusion counts: fast enough to call 21 times."""
    counts = torch.bincount(labels * k + predicted, minlength=k * k).view(k, k).double()
    both = counts.sum(0) + counts.sum(1)
    return float((2 * counts.diagonal() / both.clamp(min=1))[both > 0].mean())


def tune_tau(logits, labels, prior):
    """Strength of the logit adjustment (Menon et al. 2021, arXiv 2007.07314; logits - tau * log prior) with
    the best macro-F1 on validation."""
    taus = [t / 20 for t in range(21)]
    return max(taus, key=lambda tau: macro_f1(labels, (logits - tau * prior).argmax(1), len(prior)))


def test_metrics(labels, logits, classes):
    """Figures on the test set by scikit-learn, 0..1."""
    y, scores = labels.numpy(), logits.numpy()
    predicted, every = scores.argmax(1), np.arange(len(classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, predicted, average="macro", zero_division=0
    )
    letter = np.array([ord(name.lower()) for name in classes])  # a letter is right in either case
    return {
        "test_accuracy": float(metrics.accuracy_score(y, predicted)),
        "test_precision_macro": float(precision),
        "test_recall_macro": float(recall),
        "test_f1_macro": float(f1),
        "test_top5": float(metrics.top_k_accuracy_score(y, scores, k=5, labels=every)),
        "test_accuracy_case_insensitive": float((letter[y] == letter[predicted]).mean()),
    }


def per_class(confusion, classes):
    """Images, precision, recall, F1 and most frequent error of every class."""
    rows = []
    for k, name in enumerate(classes):
        right, images, predicted = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
        errors = np.where(np.arange(len(classes)) == k, 0, confusion[k])
        row = {"class": name, "images": images, "errors": images - right}
        row["precision"], row["recall"] = right / max(1, predicted), right / max(1, images)
        row["f1"] = 2 * right / max(1, images + predicted)
        row["most_confused_with"] = classes[errors.argmax()] if errors.any() else ""
        rows.append(row)
    return rows


def test_logits(run, data, inputs, head):
    """Logits of the test set: [n, K] on the CPU."""
    head.eval()

    @torch.no_grad()
    def forward(index):
        return head(inputs("test", index))

    shape = (len(data.labels["test"]), len(data.classes))
    trials = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # trials of kernels may end otherwise in --evaluate
    logits = in_batches(run, forward, shape, "test", run.poll).cpu()
    torch.backends.cudnn.benchmark = trials
    return logits


def write_test_files(run, folder, data, logits, title):
    """Tables and pictures of the test set."""
    labels, predicted, classes = data.labels["test"].cpu(), logits.argmax(1), data.classes
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(len(classes)))
    if run.main:
        write_csv(folder / "per_class.csv", per_class(confusion, classes))
        counts = [{"true": c, **dict(zip(classes, row))} for c, row in zip(classes, confusion.tolist())]
        write_csv(folder / "confusion.csv", counts)
        heading = f"{title}, {data.name}, test set"
        draw_confusion(folder / "confusion.png", confusion, classes, heading)
    run.poll()
    if run.main:
        draw_top_confusions(folder / "confusions_top.png", confusion, data, predicted, title)
    run.poll()


def about_run(run, data, weights_name):
    """The keys of metrics.json that say on what and where."""
    return {
        "dataset": data.name,
        "weights": weights_name,
        "image_size": run.settings.image_size,
        "dry_run": run.settings.dry_run,
        "amp": run.settings.amp,
        "device": device_name(run.device),
        "processes": run.world,
        "torch": torch.__version__,
        "git_commit": git_commit(),
    }


def run_regime(run, name, data, weights, weights_name, todo):
    """Trains one row of the table, stage by stage, then tests its best weights; returns its metrics."""
    reset_peak(run.device)
    folder, stages = run.out / name, stages_of(name, run.settings)
    if run.main:
        folder.mkdir(exist_ok=True)

    def make_model():
        model = build_model(len(data.classes), weights, run.settings.seed)
        return model.to(run.device, memory_format=layout(run.device))

    trainer, resumed = resume(run, data, make_model, stages, folder)
    if not run.planned:
        plan(run, data, trainer, todo)
    for number in range(trainer.state.number, len(stages)):
        if number > trainer.state.number:
            trainer.begin(number)
        state, stage = trainer.state, stages[number]
        if resumed:
            place = f"epoch {state.epoch + 1}, after step {state.step} of {trainer.steps}"
            run.say(f"{name}: continuing in {place}")
        else:
            training = sum(p.numel() for p in trainer.params)
            total = sum(p.numel() for p in trainer.model.parameters())
            recipe = f"batch size {stage.batch_size}, lr {stage.lr:g}"
            run.say(f"{name}: {training:,} of {total:,} parameters train, {recipe}")
        resumed = False
        trainer.train()
        if len(trainer.state.progress["stages"]) == number:
            trainer.state.progress["stages"].append(trainer.summary())
    return finish_regime(run, name, data, weights_name, trainer)


def finish_regime(run, name, data, weights_name, trainer):
    """The test set, once, with the best weights; then tables and pictures; metrics.json comes last."""
    folder, state, settings, timer = trainer.folder, trainer.state, run.settings, trainer.timer
    progress, seconds = state.progress, state.progress["seconds"]
    timer("checkpoint")
    seconds["test"] = 0.0  # what an earlier start spent on a test that it did not finish does not count
    logits, labels = test_logits(run, data, trainer.inputs, trainer.head), data.labels["test"].cpu()
    timer("test")
    title = name + (" (dry run)" if settings.dry_run else "")
    if run.main:
        draw_curves(folder / "curves.png", progress["history"], title)
    write_test_files(run, folder, data, logits, title)
    timer("pictures")
    if not run.main:
        return None
    stages, last, tau = progress["stages"], progress["stages"][-1], state.best["tau"]
    training = sum(seconds.get(phase, 0.0) for phase in TRAINING)
    samples = sum(s["epochs_run"] * s["samples_per_epoch"] for s in stages)
    corrected = test_metrics(labels, logits - tau * log_prior(data), data.classes)
    row = {
        "regime": name,
        **about_run(run, data, weights_name),
        "seed": settings.seed,
        "augment": settings.augment,
        "limit": settings.limit or None,
        "learning_rate": last["lr"],
        "epochs_run": sum(s["epochs_run"] for s in stages),
        "max_epochs": sum(s["epochs"] for s in stages),
        "early_stopped": last["early_stopped"],
        "samples_per_epoch": trainer.n,
        "update_budget": samples,
        "trainable_params": last["trainable_params"],
        "total_params": sum(p.numel() for p in trainer.model.parameters()),
        "train_seconds": training,
        # of this process: far less than cores x train_seconds shows a run that other work disturbed
        "train_cpu_seconds": sum(progress["cpu_seconds"].get(phase, 0.0) for phase in TRAINING),
        "total_seconds": sum(seconds.values()),
        "seconds": seconds,
        "images_per_second": samples / training,
        "peak_memory_bytes": progress["peak"],
        "val_accuracy": state.best["accuracy"],
        **test_metrics(labels, logits, data.classes),
        "stages": stages,
        "prior_corrected": {"tau": tau, **corrected},
        "val_accuracies": [epoch["val_accuracy"] for epoch in progress["history"]],
    }
    write_json(folder / "metrics.json", row | {"checksum": checksum(row)})
    (folder / "last.pt.prev").unlink(missing_ok=True)
    run.say(
        f"{title}: test accuracy {row['test_accuracy']:.2%}, macro-F1 {row['test_f1_macro']:.4f}, top-5 "
        f"{row['test_top5']:.2%} (once, with the best epoch's weights); training {duration(training)}, "
        f"in all {duration(row['total_seconds'])}"
    )
    return row


def evaluate(args):
    """--evaluate best.pt: the test set with a checkpoint's weights; metrics and pictures in --out."""
    model, best = read_best(args.evaluate)
    run, classes = Run(args), best["classes"]
    if run.world > 1:
        raise InputError("--evaluate runs in one process")
    amp = choose_amp(best.get("amp", "auto") if args.amp == "auto" else args.amp, run.device)
    settings = {"limit": 0, "image_size": best["image_size"], "amp": amp}  # as the run was tested
    run.settings = argparse.Namespace(**vars(args) | settings)
    out = Path(args.out or f"results/resnet18-evaluate-{datetime.now():%Y%m%d-%H%M%S}")
    make_folder(out)
    if (out / "args.json").exists() or (out / "last.pt").exists():
        raise InputError(f"--out {out} is a run's own folder: name a new one")
    data = load_digits() if len(classes) == 10 else load_emnist(args.data_dir)
    split_data(data, run.settings)
    data.to(run.device)
    frozen, head = split_at(model.to(run.device, memory_format=layout(run.device)), "fc", amp)
    logits, name = test_logits(run, data, Inputs(run, data, frozen, "fc"), head), Path(args.evaluate).name
    write_test_files(run, out, data, logits, name)
    figures = test_metrics(data.labels["test"].cpu(), logits, classes)
    write_json(out / "metrics.json", {"checkpoint": args.evaluate, **about_run(run, data, name), **figures})
    accuracy, f1 = figures["test_accuracy"], figures["test_f1_macro"]
    run.say(f"{name}: test accuracy {accuracy:.2%}, macro-F1 {f1:.4f} ({data.name}); results in {out}")
    return 0


# ---------------------------------------------------------------------------------------------- plan


def time_per_image(run, data, model, trains):
    """About how many seconds an image takes: (frozen layers, a training step of the head)."""
    model, size = copy.deepcopy(model), run.settings.image_size  # the run's own weights and statistics stay
    frozen, head = split_at(model, trains, run.settings.amp)
    head.train()
    n = max(4, min(128, 400_000 // size**2)) if run.device.type == "cpu" else 128
    index = torch.arange(n, device=run.device) % len(data.labels["train"])
    images, labels = data.images["train"][index], data.labels["train"][index]

    @torch.no_grad()
    def forward():
        return frozen(prepare(images, size))

    def step(x):
        F.cross_entropy(head(x), labels).backward()

    seconds = []
    for work in (forward, functools.partial(step, forward())):
        times = []
        for _ in range(3):  # the first one also sets up kernels
            run.poll()
            began = time.perf_counter()
            work()
            synchronize(run.device)
            times.append(time.perf_counter() - began)
        seconds.append(min(times) / n / run.world)
    return seconds


def estimate(run, stages, costs, sizes, image_size, features_left, state=None):
    """About how many seconds a regime takes, or what is left of it after `state`, the test set included."""
    train, val, test = sizes
    seconds, begun = 0.0, state.number if state else 0
    for number, stage in enumerate(stages[begun:], begun):
        frozen, step = costs[stage.trains]
        epochs = stage.epochs
        if state and number == begun:
            epochs = 0 if state.done else epochs - state.epoch - state.step / len(state.losses)
        train_passes = val_passes = epochs  # through the frozen layers
        need = cache_bytes(train + val, image_size, run.settings.amp)
        if stage.trains == "fc":
            seconds += frozen * features_left if epochs else 0
            train_passes, val_passes, features_left = 0, 0, 0
        elif stage.trains == "layer4" and need <= cache_limit(run) and run.world == 1:
            train_passes = val_passes = 1 if epochs else 0  # a resumed run fills its cache again
        if run.settings.augment:
            train_passes = epochs
        seconds += frozen * (train * train_passes + val * val_passes)
        seconds += epochs * (step * train + step / 3 * val)  # forward is about a third of a training step
    return seconds + (frozen + step / 3) * test


def plan(run, data, trainer, todo):
    """Says how long the unfinished regimes take, from a few timed batches; and, without a GPU, how long the
    whole data set at full size would take."""
    settings, run.planned = run.settings, True
    stages = {name: stages_of(name, settings) for name in todo}
    every = sorted({stage.trains for name in todo for stage in stages[name]})
    costs = {trains: time_per_image(run, data, trainer.model, trains) for trains in every}
    sizes = [len(data.labels[name]) for name in ("train", "val", "test")]
    on_disk = len(list((run.out / "features").glob("*.pt"))) * CHUNK
    features_left = max(0, sizes[0] + sizes[1] - on_disk)
    texts = []
    for name in todo:
        state = trainer.state if name == todo[0] else None
        seconds = estimate(run, stages[name], costs, sizes, settings.image_size, features_left, state)
        texts.append(f"{name} about {about(seconds)}")
        if any(stage.trains == "fc" for stage in stages[name]):
            features_left = 0  # the next regime finds them on the disk
    trainer.timer("plan")
    fewer = run.args.limit is None and sizes[0] + sizes[1] < data.total
    smaller = run.args.image_size is None and settings.image_size < FULL_RUN["image_size"]
    if run.main and (fewer or smaller) and not settings.dry_run:
        size = FULL_RUN["image_size"]
        larger = (size / settings.image_size) ** 2
        costs = {trains: (frozen * larger, step * larger) for trains, (frozen, step) in costs.items()}
        sizes = 0.9 * data.total, 0.1 * data.total, sizes[2]
        seconds = sum(estimate(run, stages[k], costs, sizes, size, data.total) for k in todo)
        images = f"{min(settings.limit or data.total, data.total):,} of {data.total:,} images"
        words = shlex.join([sys.argv[0], *own_words(), "--limit", "0", "--image-size", str(size)])
        banner(
            f"NO GPU: this run takes {images}, at {settings.image_size} px.\n"
            f"All of them at {size} px would take about {about(seconds)} here: python {words}"
        )
    run.say(f"plan: {', '.join(texts)} on {device_name(run.device)}; less with early stopping")


# ---------------------------------------------------------------------------------------------- comparison

NUMBERS = (
    *("image_size", "seed", "processes", "trainable_params", "epochs_run", "samples_per_epoch"),
    *("update_budget", "train_seconds", "total_seconds", "test_accuracy", "test_f1_macro"),
)
DIFFERENCES = {  # what may tell two runs of one regime apart, and how a label names it
    "dataset": "{}",
    "weights": "{} weights",
    "image_size": "{} px",
    "samples_per_epoch": "{:,} training images",
    "augment": "augmented: {}",
    "learning_rate": "lr {:g}",
    "epochs_run": "{} epochs",
    "amp": "amp {}",
    "processes": "{} processes",
    "device": "{}",
    "seed": "seed {}",
}


def checksum(row):
    """Of a metrics.json or args.json: shows that somebody or something changed it."""
    rest = {k: v for k, v in row.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16]


def is_modified(row):
    return row.get("checksum", checksum(row)) != checksum(row)  # an older version's has none


def is_number(value):
    return type(value) in (int, float) and 0 <= value < 1e15  # neither NaN nor what overflows in a plot


def read_metrics(path):
    """A regime's metrics.json; ValueError if what a comparison needs is damaged or not there."""
    row = json.loads(path.read_bytes())
    if not isinstance(row, dict) or row.get("regime") not in REGIMES:
        raise ValueError("it has no regime of this script")
    wrong = [k for k in ("dataset", "weights", "device", "amp") if not isinstance(row.get(k), str)]
    wrong += [k for k in NUMBERS if not is_number(row.get(k))]
    if not is_number(row.get("learning_rate", 0)):  # older runs have neither this nor the next
        wrong.append("learning_rate")
    curve = row.get("val_accuracies", [])
    if wrong or not isinstance(curve, list) or not all(map(is_number, curve)):
        raise ValueError(f"{', '.join(wrong) or 'val_accuracies'} missing or of the wrong type")
    if min(row["train_seconds"], row["trainable_params"], row["update_budget"]) <= 0:
        raise ValueError("there is no training in it")
    return row


def label_rows(rows):
    """Gives every row a label: the regime and, where several rows have the same one, what differs."""
    for row in rows:
        same = [r for r in rows if r["regime"] == row["regime"]]
        differ = [k for k in DIFFERENCES if len({str(r.get(k)) for r in same}) > 1 and row.get(k) is not None]
        words = [DIFFERENCES[k].format(row[k]) for k in differ]
        if len(same) > 1 and not words:
            words = [f"run {same.index(row) + 1}"]
        row["label"] = row["regime"] + (f" ({', '.join(words)})" if words else "")


def trade_off(rows):
    """One sentence from the numbers: what the most accurate costs more than the cheapest."""
    cheap, best = min(rows, key=lambda r: r["train_seconds"]), max(rows, key=lambda r: r["test_accuracy"])
    if len(rows) == 1:
        return f"{best['label']} reaches {best['test_accuracy']:.2%}; there is nothing to compare it with."
    if cheap is best:
        return f"{best['label']} is both the cheapest and the most accurate ({best['test_accuracy']:.2%})."
    points, f1 = ((best[k] - cheap[k]) * 100 for k in ("test_accuracy", "test_f1_macro"))
    costs = ("train_seconds", "update_budget", "trainable_params")
    time_x, samples_x, params_x = (best[k] / max(cheap[k], 1e-9) for k in costs)
    return (
        f"{best['label']} reaches {best['test_accuracy']:.2%} against {cheap['test_accuracy']:.2%} of "
        f"{cheap['label']} ({points:+.2f} points, macro-F1 {f1:+.2f}) for {time_x:.1f}x the training time, "
        f"{samples_x:.1f}x the trained samples and {params_x:.0f}x the trainable parameters."
    )


def write_comparison(folder, rows):
    """comparison.json, comparison.md and comparison.png from the rows that metrics.json files hold."""
    label_rows(rows)
    head = "regime | hardware | accuracy | macro-F1 | trainable (M) | epochs x samples | training | in all"
    table = [head.split(" | "), ["---"] * 8]
    for r in rows:
        processes = f", {r['processes']} processes" if r["processes"] > 1 else ""
        quality = [f"{r['test_accuracy']:.2%}", f"{r['test_f1_macro']:.4f}"]
        cost = [f"{r['trainable_params'] / 1e6:.3f}", f"{r['epochs_run']} x {r['samples_per_epoch']:,}"]
        times = [duration(r["train_seconds"]), duration(r["total_seconds"])]
        table.append([r["label"], f"{r['device']}, {r['amp']}{processes}", *quality, *cost, *times])
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    about = dict.fromkeys(f"{r['dataset']}; {r['weights']} weights; {r['image_size']} px" for r in rows)
    dry = "DRY RUN, one batch: these numbers say nothing. " if any(r.get("dry_run") for r in rows) else ""
    sentence = dry + trade_off(rows)
    text = "\n".join([f"{dry}Test set of {' / '.join(about)}.", "", *lines, "", sentence, ""])
    draw_comparison(folder / "comparison.png", rows, dry)
    write_bytes(folder / "comparison.md", text.encode())
    write_json(folder / "comparison.json", {"rows": rows, "trade_off": sentence})
    return text


def compare(args):
    """--compare DIR...: one comparison of the finished regimes in several folders."""
    rows = []
    for folder in map(Path, args.compare):
        paths = [p for p in (folder / "metrics.json", *sorted(folder.glob("*/metrics.json"))) if p.exists()]
        if not paths:
            raise InputError(f"--compare {folder}: no metrics.json, no regime has finished there")
        for path in paths:
            try:
                row = read_metrics(path)
            except (OSError, ValueError) as e:
                raise InputError(f"--compare: {path} is damaged or not of this script ({one_line(e)})") from e
            if row.get("dry_run"):
                raise InputError(f"--compare: {path} comes from a dry run and means nothing")
            if is_modified(row):
                print(f"warning: {path} has been modified since the run wrote it", flush=True)
            rows.append(row)
    out = Path(args.out or f"results/resnet18-compare-{datetime.now():%Y%m%d-%H%M%S}")
    make_folder(out)
    print(write_comparison(out, sorted(rows, key=lambda r: r["train_seconds"])))
    print(f"in {out}: comparison.md, comparison.json, comparison.png")
    return 0


# ---------------------------------------------------------------------------------------------- pictures

# told apart by colour-blind readers too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BLUE, ORANGE = COLOURS[:2]


def new_figure(width, height, rows=1, columns=1, **kwargs):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_bytes(path, buffer.getbuffer())


def show_images(axes, images):
    for ax, image in zip(axes, images):
        ax.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=255)
    for ax in axes:
        ax.set_axis_off()


def draw_samples(path, data):
    """Training images, upright, with their labels; of EMNIST, first a row as its files hold them."""
    images, labels, title = data.images["train"][:50], data.labels["train"][:50], "training images and labels"
    if data.name.startswith("EMNIST"):
        images, labels = torch.cat([upright(images[:10]), images]), torch.cat([labels[:10], labels])
        title += "; top row: as the files hold those of the second row (transposed)"
    rows = math.ceil(len(images) / 10)
    figure, axes = new_figure(10, 1.1 * rows, rows, 10)
    show_images(list(axes.flat), images)
    for ax, label in zip(axes.flat, labels):
        ax.set_title(data.classes[label], fontsize=12)
    figure.suptitle(f"{data.name}: {title}")
    save_figure(figure, path)


def draw_curves(path, history, title):
    figure, axes = new_figure(10, 3.8, 1, 2)
    epochs = range(1, len(history) + 1)
    for ax, what, scale in zip(axes[0], ("loss", "accuracy"), (1, 100)):
        for name, label, colour, style in (
            ("train", "training", BLUE, "o--"),
            ("val", "validation", ORANGE, "s-"),
        ):
            values = [row[f"{name}_{what}"] * scale for row in history]
            ax.plot(epochs, values, style, color=colour, label=label, ms=4)
        for i in range(1, len(history)):
            if history[i]["stage"] != history[i - 1]["stage"]:
                ax.axvline(i + 0.5, color="gray", lw=1)
        ax.set(xlabel="epoch", ylabel="accuracy (%)" if what == "accuracy" else what)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    stages = dict.fromkeys(row["stage"] for row in history)
    figure.suptitle(f"{title}: {' | '.join(stages)}" if len(stages) > 1 else title)
    save_figure(figure, path)


def draw_confusion(path, confusion, classes, title):
    """Rows are true classes, normalised; colours follow the square root, so that rare errors are seen."""
    share, few = confusion / np.maximum(1, confusion.sum(1, keepdims=True)), len(classes) <= 12
    figure, axes = new_figure(*((7, 6) if few else (13, 12)))
    ax = axes[0, 0]
    picture = ax.imshow(np.sqrt(share), cmap="cividis", vmin=0, vmax=1)
    ax.set_xticks(range(len(classes)), classes, fontsize=10)
    ax.set_yticks(range(len(classes)), classes, fontsize=10)
    if few:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "black" if share[row, column] > 0.3 else "white"
            ax.text(column, row, count or "", ha="center", va="center", color=colour, fontsize=9)
    else:
        ax.tick_params(top=True, labeltop=True, right=True, labelright=True, length=2)
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_title(f"{title}: share of each true class" + (" (numbers: images)" if few else ""), fontsize=10)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    bar = figure.colorbar(picture, ax=ax, shrink=0.7, ticks=np.sqrt(ticks))
    bar.ax.set_yticklabels([f"{t:.0%}" for t in ticks])
    save_figure(figure, path)


def draw_top_confusions(path, confusion, data, predicted, title, pairs=12, examples=8):
    """The most frequent errors: true class, predicted class, how often, and some of the images."""
    errors = confusion - np.diag(np.diag(confusion))
    top = np.argsort(-errors, axis=None, kind="stable")[: min(pairs, np.count_nonzero(errors))]
    images, labels = data.images["test"], data.labels["test"].cpu()
    figure = Figure(figsize=(9.5, 0.85 * max(1, len(top)) + 0.5), layout="constrained")
    figure.suptitle(f"{title}, {data.name}: {errors.sum():,} errors in {confusion.sum():,} test images")
    if len(top):
        grid = figure.subplots(len(top), examples + 1, squeeze=False, width_ratios=[3.2] + [1] * examples)
        for row, pair in zip(grid, top.tolist()):
            true, read = divmod(pair, len(data.classes))
            count, seen = errors[true, read], confusion[true].sum()
            names = f"{data.classes[true]} read as {data.classes[read]}"
            text = f"{names}:  {count}  ({count / seen:.0%} of {seen})"
            row[0].text(1, 0.5, text, ha="right", va="center", fontsize=12)
            show_images(row[1:], images[((labels == true) & (predicted == read)).nonzero()[:examples, 0]])
            row[0].set_axis_off()
    save_figure(figure, path)


def draw_comparison(path, rows, dry):
    """Accuracy and macro-F1 against two costs, and how validation went."""
    curves = [[100 * a for a in r.get("val_accuracies", [])] for r in rows]  # an older run has none
    figure, axes = new_figure(15, 4.4, 1, 3 if any(curves) else 2)
    costs = {"train_seconds": "training time (s), caches included", "update_budget": "trained samples"}
    for ax, (cost, label) in zip(axes[0], costs.items()):
        for r, colour in zip(rows, COLOURS * len(rows)):
            for key, marker in (("test_accuracy", "o"), ("test_f1_macro", "^")):
                name = r["label"] if key == "test_accuracy" else None
                ax.plot(r[cost], 100 * r[key], marker, color=colour, ms=8, label=name)
                spot = {"xytext": (9, -4), "textcoords": "offset points", "fontsize": 9}
                ax.annotate(f"{100 * r[key]:.1f}", (r[cost], 100 * r[key]), **spot)
        ax.set(xlabel=label, ylabel="test set (%): ● accuracy, ▲ macro-F1")
        least, most = (pick(r[cost] for r in rows) for pick in (min, max))
        if most > 20 * least:
            ax.set(xscale="log", xlim=(least / 2, 2 * most))
            ax.xaxis.set_major_formatter("{x:,.0f}")
        else:
            ax.set_xlim(0, 1.2 * most)
        ax.margins(y=0.15)
        ax.grid(alpha=0.3)
    if any(curves):
        for curve, colour in zip(curves, COLOURS * len(rows)):
            axes[0, 2].plot(range(1, len(curve) + 1), curve, "o-", color=colour, ms=4)
        axes[0, 2].set(xlabel="epoch", ylabel="validation accuracy (%)")
        axes[0, 2].xaxis.get_major_locator().set_params(integer=True)
        axes[0, 2].grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(rows)))
    if dry:
        figure.suptitle(dry)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------- prediction


def open_picture(path):
    """Grey float32 [H, W] in 0..255, upright, the longer side 200 px, white behind what is transparent.

    Raises InputError for what is no image, a damaged image or one of more than 64 megapixels.
    """
    hint, hints = "", {b"%PDF": "a PDF: export the page as PNG; ", b"ftyp": "HEIC: save it as JPEG or PNG; "}
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow's own, about EXIF that is corrupt and the like
            head = file.read(12)
            hint = hints.get(head[:4]) or hints.get(head[4:8], "")
            picture = Image.open(file)
            w, h = picture.size
            if w * h > 64e6 or max(w, h) > 50 * min(w, h):  # before decoding: 20 KB of PNG may become 4 GB
                raise InputError(f"{w} x {h} pixels: more than 64 million, or a mere line")
            picture.draft("RGB", (200, 200))  # a JPEG is decoded at a half, a quarter or an eighth
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":  # 16 bits or more, often not all in use; convert() would clip them
                deep = np.nan_to_num(np.asarray(picture, np.float32), posinf=0).clip(0)
                picture = Image.fromarray(deep / max(deep.max(), 1e-9) * 255).convert("L")
            picture = ImageOps.contain(picture.convert("RGBA"), (200, 200))
            paper = Image.new("RGBA", picture.size, "white")
            return np.asarray(Image.alpha_composite(paper, picture).convert("L"), np.float32)
    except Exception as e:  # Pillow's readers throw whatever a damaged file leads to
        raise InputError(f"{path} can't be read ({hint}{one_line(e, 120)})") from e


def above_paper(grey):
    """How far each pixel of [H, W] is from the paper around it: 0 the paper, 1 black; of light ink, white."""
    width = min(grey.shape) * 6 // 100 + 1
    border = np.ones(grey.shape, bool)
    border[width:-width, width:-width] = False
    # ink differs most from its surroundings, whatever the light; the margin is for cropped pictures
    padded = np.pad(grey, 16, constant_values=np.median(grey[border]))
    if ((padded - ndimage.uniform_filter(padded, 101)) ** 3).sum() > 0:
        grey = 255 - grey  # light ink
    grey = ndimage.gaussian_filter(grey, 1)  # the sensor's noise
    paper = ndimage.grey_closing(grey, 61)  # wider than any stroke: what is left is paper, with its shadows
    return 1 - grey / paper.clip(1)


def otsu(values):
    """The threshold between the two classes whose means differ most for their sizes (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    n, total = counts.cumsum(), (counts * edges[1:]).cumsum()
    between = (total[-1] * n - total * n[-1]) ** 2 / (n * (n[-1] - n)).clip(1)
    return edges[1:][between.argmax()]


def choose_parts(mask):
    """Of the connected parts of a mask [H, W], those of the character: a mask; a warning or None."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    top, left, bottom, right = np.array([(y.start, x.start, y.stop, x.stop) for y, x in boxes]).T
    height, size = bottom - top, np.maximum(bottom - top, right - left)
    area = np.bincount(labels.ravel())[1:]
    # table, ruled line and punched hole reach the edge of the picture
    wanted = (top > 0) & (left > 0) & (bottom < mask.shape[0]) & (right < mask.shape[1])
    warning = None
    if not (wanted & (size > 12)).any():  # the character itself does; a speck may not
        wanted[:], warning = True, "it reaches the edge of the picture"
    main = np.where(wanted, area, 0).argmax()
    frame = (top < top[main]) & (left < left[main]) & (bottom > bottom[main]) & (right > right[main])
    beside = np.maximum(left - right[main], left[main] - right)  # the gap, negative where they overlap
    above = np.maximum(top - bottom[main], top[main] - bottom)
    as_large = (height > 0.5 * height[main]) & (area > 0.25 * area[main])
    other = wanted & ~frame & as_large & (beside > 0.08 * height[main])
    if other.any():
        warning = "several characters side by side, the largest is read"
    near = np.maximum(beside, above) < 0.5 * size[main]  # as the dot of an i
    wanted &= near & ~frame & ~other & (area > 0.05 * area[main])  # what is smaller is a speck
    return np.isin(labels, np.flatnonzero(wanted) + 1), warning


def find_ink(grey, name):
    """The character in a picture [H, W], light on dark, in a square grey Image; a warning or None.

    Raises InputError with the picture's name where nothing stands out from the paper.
    """
    dark = above_paper(grey)
    threshold = otsu(dark)
    ink, paper = dark[dark > threshold], dark[dark <= threshold]
    rise = ndimage.morphological_gradient(dark, 9).max()
    # shading grows slowly towards its darkest, ink at once; noise has no two classes
    if rise < max(0.1, 0.55 * dark.max()) or ink.mean() - paper.mean() < 3.4 * paper.std():
        raise InputError(f"{name} shows no character: nothing stands out from the paper")
    mask, warning = choose_parts(dark > np.percentile(ink, 90) / 2)  # ruled lines are paler than the ink
    # the edges stay soft, as the networks know them
    soft = (dark / np.percentile(dark[mask], 90)).clip(0, 1) * ndimage.binary_dilation(mask, iterations=3)
    rows, columns = ndimage.find_objects((soft > 0.1).astype(int))[0]
    image = Image.fromarray((255 * soft[rows, columns]).astype(np.uint8))
    return ImageOps.pad(image, [max(image.size)] * 2), warning


def read_character(path):
    """The character of a picture as EMNIST places them: uint8 [28, 28], and a warning or None."""
    square, warning = find_ink(open_picture(path), path)
    image = np.pad(np.asarray(square.resize((24, 24), Image.Resampling.LANCZOS), np.float32), 2)
    return torch.from_numpy(image * (255 / image.max())).round().byte(), warning


def predict(args):
    """--predict: the five most probable characters of each picture; status 2 if one of them can't be read."""
    model, classes, size = load_model(args.checkpoint)
    device, status = choose_device(args.device), 0
    frozen, head = split_at(model.to(device), "fc", choose_amp(args.amp, device))
    head.eval()
    for path in args.predict:
        try:
            image, warning = read_character(path)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            status = 2
            continue
        with torch.no_grad():
            shares = head(frozen(prepare(image[None].to(device), size))).softmax(1)[0]
        best = shares.argsort(descending=True)[:5].tolist()
        if shares[best[0]] < 0.5:
            warning = f"{warning}; low confidence" if warning else "low confidence"
        line = f"{path}: " + "  ".join(f"{classes[k]} {shares[k]:.1%}" for k in best)
        print(line + (f"  | warning: {warning}" if warning else ""), flush=True)
    return status


# ---------------------------------------------------------------------------------------------- plumbing
# Safe to skip: processes and the stop flag, devices, the log, files.


class Run:
    """Arguments, device, results folder, processes, log and stop flag: what every function needs."""

    def __init__(self, args):
        # args: what the command line says; settings: the same with what `auto` and defaults came to
        self.args, self.settings, self.out = args, args, None
        try:
            self.world = int(os.environ.get("WORLD_SIZE", 1))
            self.rank = int(os.environ["RANK"]) if self.world > 1 else 0
        except (KeyError, ValueError) as e:
            raise InputError(f"WORLD_SIZE and RANK must be set together, to numbers ({one_line(e)})") from e
        self.main, self.device, self.store = self.rank == 0, choose_device(args.device), None
        choose_amp(args.amp, self.device)  # a check
        if self.device.type != "cpu" and self.world > 1:
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            if self.device.type == "mps" or local >= torch.cuda.device_count():
                raise InputError("more processes than GPUs on this machine: start fewer, or --device cpu")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            group = dist.PrefixStore("group", self.store)
            dist.init_process_group(
                backend, store=group, rank=self.rank, world_size=self.world, timeout=timedelta(minutes=30)
            )
        self.live = self.main and sys.stdout.isatty()
        self.stop_asked = self.planned = False
        self.saved_at = self.printed_at = time.monotonic()
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: --amp is what trades precision
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(args.deterministic, warn_only=True)

    def say(self, text):
        if self.main:
            print(("\r\033[K" if self.live else "") + text, flush=True)
            self.printed_at = time.monotonic()

    def pulse(self, text, *args):
        """A sign of life, text(*args): a line that the next one overwrites, in a log file twice a minute."""
        since = time.monotonic() - self.printed_at
        if self.live and since > 0.3:
            print("\r\033[K" + text(*args)[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            self.printed_at = time.monotonic()
        elif self.main and not self.live and since > 20:  # with the batch that runs, no more than 30 s
            self.say(text(*args))

    def from_rank0(self, key, work):
        """What work() returns on rank 0, on every rank. The others ask every second and don't wait in a
        collective: nothing is saved yet, so that a signal must end them, and a download may take long."""
        box = []  # stays empty after an error
        if self.main:
            try:
                box.append(work())
            finally:
                if self.world > 1:
                    self.store.set(key, pickle.dumps(box))
                    time.sleep(0 if box else 2)  # this process may run the store: the others have to hear it
            return box[0]
        while not self.store.check([key]):
            time.sleep(1)
        box = pickle.loads(self.store.get(key))
        if not box:
            raise SystemExit(2)  # rank 0 says why
        return box[0]

    def share(self, thing):
        """Rank 0's plain object, on every rank."""
        box = [thing]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def catch_signals(self):
        """From here to the process's end SIGTERM and SIGINT set a flag, which poll() obeys."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.ask_stop)

    def ask_stop(self, *_):
        self.stop_asked = True

    def poll(self, save=lambda: None):
        """Between batches: save() when it is due, save() and Stopped when asked; the same on every rank."""
        due = time.monotonic() > self.saved_at + 60 * self.args.checkpoint_minutes
        stop, due = self.stop_asked, due or self.stop_asked
        if self.world > 1:
            agreed = torch.tensor([stop, due], dtype=torch.uint8)  # on the CPU: a GPU is not waited for
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            stop, due = agreed.tolist()
        if due:
            save()
        if stop:
            self.share(None)  # the others must not leave, and have rank 0 killed by torchrun, while it saves
            raise Stopped


def ignore_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: there is no {name} device here; use --device auto")
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
        given = os.environ.get("GIT_COMMIT")
        return given or subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
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
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:  # version 2
            mount, limit, used, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):  # version 1
            mount, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = system / "sys/fs/cgroup" / mount / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the limit reads 'max' where there is none
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))  # files read long ago give way


def peak_bytes(device):
    """The most memory held since reset_peak(): by torch on the GPU, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
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


def about(seconds):
    if seconds < 55:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pace(what, done, total, began, first=0):
    rate = (done - first) / max(1e-9, time.monotonic() - began)
    return f"{what}: {done:,}/{total:,} images | {rate:,.0f} images/s | eta {duration((total - done) / rate)}"


def one_line(error, limit=160):
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def banner(text):
    print("!" * 100 + f"\n{text}\n" + "!" * 100, flush=True)


@contextlib.contextmanager
def download(what, url, folder, flag, offline):
    """Around a download into a folder: one process at a time, a line twice a minute, and a silent server does
    not hang the run. DownloadError for the network's errors, InputError for those of the folder."""
    before, done, began = socket.getdefaulttimeout(), threading.Event(), time.monotonic()
    socket.setdefaulttimeout(30)  # seconds

    def tell():
        while not done.wait(20):
            print(f"downloading {what}: {duration(time.monotonic() - began)} so far", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, wait=True):
            print(f"downloading {what} from {url} ...", flush=True)
            yield
    except Exception as e:  # whatever network, server, archive or folder may throw
        # the errno of an URLError is None; an SSLError has one of its own numbering
        if getattr(e, "errno", None) in FOLDER_ERRORS and not isinstance(e, ssl.SSLError):
            raise InputError(f"{flag}: {folder} can't be written ({one_line(e)})") from e
        text = f"{what} can't be downloaded from {url} ({one_line(e)}). Offline: {offline}"
        raise DownloadError(text) from e
    finally:
        done.set()
        socket.setdefaulttimeout(before)


# the errors of a folder that can't be written; any other error of a download is the network's
FOLDER_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
}


def write_bytes(path, content, keep=False):
    """Whole or not at all: temporary file, fsync, rename; `keep` leaves the one before as NAME.prev."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, path.with_name(path.name + ".prev"))
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):  # half a file would keep a full disk full
            temporary.unlink()
        rest = "; the one before it stands" if path.exists() else ""
        raise RunFailed(f"{path} can't be written ({e.strerror}){rest}") from e


def write_json(path, content):
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def save_tensors(path, content, keep=False):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer(), keep)


def read_tensors(path):
    """torch.load of plain tensors and numbers; an archive's checksums are compared, as torch does not."""
    content = Path(path).read_bytes()
    if not content.startswith(b"\x80\x02"):  # a pickle: torch's format before 1.6, without checksums
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum does not match")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def try_read(path, keys):
    """The file's dict, or None with a message if it is torn or damaged or lacks one of the keys."""
    try:
        content = read_tensors(path)
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it lacks some of {', '.join(keys)}")
        return content
    except Exception as e:  # a torn file raises anything from BadZipFile to UnpicklingError
        print(f"{path} is torn or damaged ({one_line(e, 80)}): not used", flush=True)
        return None


@contextlib.contextmanager
def folder_lock(folder, wait=False):
    """Held until the block or the process ends; the system releases it however that happens."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / ".lock", "w"))
            if not fcntl:
                raise OSError(errno.ENOTSUP, "no locks on this system")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise InputError(f"another run is writing into {folder}") from e
        except OSError as e:
            if e.errno in FOLDER_ERRORS:
                raise
            print(f"warning: {folder} can't be locked ({e.strerror}): start no other run in it", flush=True)
        yield


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as e:
        raise InputError(f"--out {path} can't be used ({e.strerror})") from e


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def number(kind, low, above=None, below=math.inf):
    """Type of an argument: a number from `low` on, or above `above`; neither infinite nor NaN."""

    def read(text):
        value = kind(text)
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if not low <= value < below:
            limit = f"at least {low}" if value < low else f"below {below:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    read.__name__ = "number"
    return read


def parse_args(argv):
    p = Parser(description="Fine-tunes an ImageNet ResNet-18 on EMNIST ByClass, and compares regimes.")
    count, real = number(int, 1, below=2**31), number(float, 0)
    add = p.add_argument_group("data").add_argument
    text = "auto: EMNIST, or scikit-learn's digits where it can't be downloaded (default: %(default)s)"
    add("--dataset", choices=("auto", "emnist", "digits"), default="auto", help=text)
    add("--data-dir", default="data", metavar="DIR", help="where EMNIST is or goes to (default: %(default)s)")
    text = "images to take of the training set, 0: all (default: 0; with EMNIST on a CPU 12000)"
    add("--limit", type=number(int, 0), metavar="N", help=text)
    text = "pixels that images are scaled to (default: 224; with EMNIST on a CPU 64)"
    add("--image-size", type=number(int, 32, below=4096), metavar="S", help=text)
    add("--augment", action="store_true", help="small rotations, scales and shifts; disables the caches")
    add = p.add_argument_group("training").add_argument
    text = f"any of {', '.join(REGIMES)} (default: linear_probe partial_unfreeze)"
    add("--regimes", nargs="+", default=["linear_probe", "partial_unfreeze"], metavar="REGIME", help=text)
    text = "imagenet, none (random) or a file with a state dict (default: %(default)s)"
    add("--weights", default="imagenet", help=text)
    for flag, kind, text in (
        ("--epochs", count, "epochs of every stage, at most"),
        ("--batch-size", count, "images per step, over all processes"),
        ("--lr", number(float, 0, above=0, below=1e38), "highest learning rate"),  # float32 ends there
        ("--warmup-epochs", real, "epochs of linear warm-up"),
        ("--patience", count, "epochs without progress before stopping early"),
    ):
        probe, other = (getattr(stage, flag[2:].replace("-", "_")) for stage in (PROBE, PARTIAL))
        text += f" (default: {probe:g} where fc alone trains, else {other:g})"
        add(flag, type=kind, metavar="X" if kind is real else "N", help=text)
    text = "mixed precision; auto: bf16 or fp16 where the hardware has it (default: %(default)s)"
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help=text)
    text = "decides everything that is random (default: %(default)s)"
    add("--seed", type=number(int, 0, below=2**64), default=0, help=text)
    add = p.add_argument_group("run").add_argument
    text = "auto: cuda, mps or cpu, the first that is there (default: %(default)s)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    add("--deterministic", action="store_true", help="the same bits again, on CUDA too; slower")
    text = "memory for layer3's output, in GB (default: 70%% of what is free)"
    add("--cache-gb", type=real, metavar="GB", help=text)
    text = "longest time between two checkpoints (default: %(default)s)"
    add("--checkpoint-minutes", type=real, default=2.0, metavar="MINUTES", help=text)
    text = "results folder; an existing run is resumed (default: results/resnet18-<timestamp>)"
    add("--out", metavar="DIR", help=text)
    add("--dry-run", action="store_true", help="run one batch through every phase")
    add = p.add_argument_group("instead of training").add_argument
    add("--compare", nargs="+", metavar="DIR", help="one comparison of several finished runs, in --out")
    add("--evaluate", metavar="FILE", help="the test set with the weights of a best.pt, in --out")
    add("--predict", nargs="+", metavar="IMAGE", help="read pictures or photographs of one character each")
    add("--checkpoint", metavar="FILE", help="best.pt of a run, for --predict")
    args = p.parse_args(argv)
    if [] in vars(args).values():  # argparse reads "--seed=--" as a flag without a value
        p.error("-- is not a valid value of a flag")
    if 0 < (args.limit or 0) < 10:
        p.error(f"--limit {args.limit}: {args.limit} is not at least 10 (0: all)")
    args.regimes = [name for text in args.regimes for name in text.split(",") if name]
    wrong = [name for name in args.regimes if name not in REGIMES or args.regimes.count(name) > 1]
    if wrong or not args.regimes:
        named = f"{wrong[0]} is unknown or repeated" if wrong else "none given"
        p.error(f"--regimes: {named}; there are {', '.join(REGIMES)}")
    if (args.predict is None) != (args.checkpoint is None):
        p.error("--predict IMAGE... and --checkpoint FILE go together")
    if sum(bool(x) for x in (args.compare, args.evaluate, args.predict)) > 1:
        p.error("--compare, --evaluate and --predict exclude each other")
    return args


FREE = {"device", "data_dir", "cache_gb", "checkpoint_minutes", "out"}  # may differ when a run is continued
BEFORE = {"code", "commit", "resnet18.py"}  # what a batch job may put into OUT before the first start
FULL_RUN = {"limit": 0, "image_size": 224}  # as the assignment asks
CPU_RUN = {"limit": 12_000, "image_size": 64}  # what takes minutes and not hours on two cores


def open_out(args, stack):
    """Chooses, checks and locks OUT; returns it and what an earlier start left in args.json, or None."""
    out = Path(args.out or f"results/resnet18-{datetime.now():%Y%m%d-%H%M%S}")
    make_folder(out)
    path, new = out / "args.json", vars(args)
    files = sorted(p.name for p in out.iterdir() if p.name[0] != "." and p.name not in BEFORE)
    if files and not path.exists() and files != ["samples.png"]:
        raise InputError(f"--out {out} holds other files ({', '.join(files[:3])}): name a new folder")
    try:
        stack.enter_context(folder_lock(out))
    except OSError as e:
        raise InputError(f"--out {out} can't be used ({e.strerror})") from e
    if not path.exists():
        return out, None
    try:
        before = json.loads(path.read_bytes())
        old = before["arguments"]
        if "limit" not in before:  # an older version's: None meant all images, and the size was always given
            before |= {"limit": old["limit"] or 0, "image_size": old["image_size"]}
            new = new | {"image_size": new["image_size"] or old["image_size"]}
        elif before["checksum"] != checksum(before):
            raise ValueError("its checksum does not match")
        for k in ("dataset", "weights", "amp", "dataset_flag", "weights_flag", "limit", "image_size"):
            if type(before[k]) is not (int if k in FULL_RUN else str):
                raise TypeError(f"{k} is {before[k]!r}")
        differ = [f"--{k} {old.get(k)}, now {v}" for k, v in new.items() if k not in FREE and old.get(k) != v]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is damaged or not of this script ({one_line(e)}): name a new --out") from e
    if differ:
        text = "; ".join(differ).replace("_", "-")
        raise InputError(f"--out {out} holds a run with other arguments: {text}; for these, name a new --out")
    return out, before


def own_words():
    """The command line without --out."""
    words = sys.argv[1:]
    kept = [w for w, left in zip(words, ["", *words]) if "--out" not in (w, left)]
    return [w for w in kept if not w.startswith("--out=")]


def continue_line(out):
    """How to continue this run."""
    out = f"./{out}" if str(out).startswith("-") else str(out)
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc-per-node={processes}"] if processes else ["python"]
    return "continue with: " + shlex.join([*start, sys.argv[0], *own_words(), "--out", out])


def load_inputs(run, before):
    """(data, weights, what `auto` and the defaults came to); a resumed run keeps to what args.json says."""
    args, known = run.args, before or {}
    data = load_data(known.get("dataset_flag", args.dataset), args.data_dir)
    default = CPU_RUN if run.device.type == "cpu" and data.name != "digits" else FULL_RUN
    resolved = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in default.items()}
    resolved |= {k: known[k] for k in default if before}
    resolved["amp"] = choose_amp(known.get("amp", args.amp), run.device)
    spec = known.get("weights_flag", args.weights)
    try:
        weights, weights_name = load_weights(spec)
    except DownloadError as e:
        if data.name != "digits":
            raise
        banner(f"{e}\nCONTINUING WITH random weights")
        spec, weights, weights_name = "none", None, "random"
    run.settings = argparse.Namespace(**vars(args) | resolved)
    split_data(data, run.settings)
    check_batch_sizes(run.settings, len(data.labels["train"]), run.world)
    resolved |= {"dataset": data.name, "weights": weights_name, "weights_flag": spec}
    resolved["dataset_flag"] = "digits" if data.name == "digits" else "emnist"
    changed = [f"{k} was {known[k]}, now {v}" for k, v in resolved.items() if before and known[k] != v]
    if changed:
        raise InputError(f"--out {run.out} can't be resumed: {'; '.join(changed)}")
    return data, weights, resolved


def check_batch_sizes(settings, n, world):
    """BatchNorm needs two values per channel, and every process an image in every step."""
    for name in settings.regimes:
        for stage in stages_of(name, settings):
            smallest = n // math.ceil(n / stage.batch_size) // world
            if smallest < (2 if stage.trains != "fc" and settings.image_size == 32 else 1):
                raise InputError(f"--batch-size: only {smallest} images per process and step, too few")


def load_in_turn(run, before):
    """load_inputs() on rank 0, which downloads what is missing, then on the others: on another machine the
    first to take the lock downloads. Writes args.json."""
    inputs = []

    def load():
        inputs.extend(load_inputs(run, before))
        return inputs[2]

    resolved = run.from_rank0("inputs", load)
    if not run.main:
        inputs.extend(load_inputs(run, resolved))
    data, weights, _ = inputs
    if run.main and not before:
        draw_samples(run.out / "samples.png", data)
        content = {"arguments": vars(run.args), **resolved, "git_commit": git_commit()}
        content["torch"] = torch.__version__
        write_json(run.out / "args.json", content | {"checksum": checksum(content)})
    return data, weights, resolved["weights"]


def finished_rows(out, regimes, before):
    """(a finished regime's metrics.json, else None, for each; the comparison's sentence, if all is done)."""
    rows = []
    for path in [out / name / "metrics.json" for name in regimes]:
        row = None
        if before and path.exists():
            try:
                row = read_metrics(path)
                if is_modified(row):
                    raise ValueError("its checksum does not match")
            except (OSError, ValueError) as e:
                row = None
                print(f"{path} is damaged ({one_line(e)}): the test is done again", flush=True)
        rows.append(row)
    if not all(rows) or not (out / "comparison.json").exists():
        return rows, None
    label_rows(rows)
    return rows, trade_off(rows)


def train_all(run, data, weights, weights_name, rows):
    """All regimes that are not finished yet, and their comparison."""
    names, settings = run.args.regimes, run.settings
    train, val, test = (f"{len(data.labels[name]):,}" for name in ("train", "val", "test"))
    dry = "DRY RUN, one batch: " if settings.dry_run else ""
    run.say(f"{dry}{data.name}: {train} training, {val} validation, {test} test images")
    recipe = f"{settings.image_size} px | {weights_name} weights | amp {settings.amp} | seed {settings.seed}"
    run.say(f"{recipe} | {device_name(run.device)} | torch {torch.__version__}, processes: {run.world}")
    if run.world > 1 and run.device.type == "cpu" and run.args.regimes != ["linear_probe"]:
        run.say("BatchNorm that trains sees each process's share of a step; its statistics are averaged")
    data.to(run.device)
    for k, name in enumerate(names):
        if rows[k] is None:
            todo = [n for n, row in zip(names[k:], rows[k:]) if row is None]
            rows[k] = run_regime(run, name, data, weights, weights_name, todo)
    run.poll()
    ignore_signals()  # a second or two to the end
    if run.main:
        text = write_comparison(run.out, rows)
        shutil.rmtree(run.out / "features", ignore_errors=True)
        run.say(f"\n{text}\nresults in {run.out}")


def run_training(args):
    """Training from the command line to the last line; exit status 0, 1, or 75 after a saved stop."""
    run = Run(args)
    with contextlib.ExitStack() as stack:
        if run.world > 1:
            stack.callback(dist.destroy_process_group)
        run.out, before = run.from_rank0("out", lambda: open_out(args, stack))
        rows, sentence = run.from_rank0("finished", lambda: finished_rows(run.out, args.regimes, before))
        if sentence:
            run.say(f"all is done: {sentence}")
            return 0
        run.say(continue_line(run.out))
        try:
            inputs = load_in_turn(run, before)
        except InputError:
            if run.main and not (run.out / "args.json").exists():
                with contextlib.suppress(OSError):  # nothing was begun: leave nothing, where nothing else is
                    (run.out / ".lock").unlink()
                    run.out.rmdir()
            raise
        run.catch_signals()
        try:
            train_all(run, *inputs, rows)
            return 0
        except Stopped:
            ignore_signals()
            run.say(f"stopped between two steps, everything is saved\n{continue_line(run.out)}")
            return 75


def failure(error):
    """One line on stderr for what a user can fix; anything else keeps its traceback."""
    text = one_line(error, 400)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        text = "out of memory: continue with --cache-gb 0, or take a smaller --batch-size and a new --out"
    elif isinstance(error, Diverged):
        text = f"{error}: try a smaller --lr, with a new --out"
    elif isinstance(error, RunFailed):
        text = str(error)
    elif "gloo" in text.lower() or "nccl" in text.lower() or isinstance(error, dist.DistError):
        text = f"another process of this run has ended, or the connection to it ({text})"
    elif not isinstance(error, OSError):
        raise error
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 1


def guard_streams():
    """A closed stdout or stderr, or one that takes only ASCII, must not end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    guard_streams()
    try:
        args = parse_args(argv)
        if args.compare:
            status = compare(args)
        elif args.evaluate:
            status = evaluate(args)
        elif args.predict:
            status = predict(args)
        else:
            status = run_training(args)
        sys.stdout.flush()
        return status
    except InputError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 2
    except OSError as e:
        # mostly of a print: the reader of a pipe has gone, as `head` does, or a disk is full; without this
        # line the interpreter complains when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141 if isinstance(e, BrokenPipeError) else failure(e)  # 141: as a shell shows SIGPIPE
    except (RuntimeError, MemoryError) as e:
        return failure(e)


if __name__ == "__main__":
    status = main()
    ignore_signals()  # the results are there, or the state is saved
    sys.exit(status)
