"""ResNet-18 fine-tuned on EMNIST ByClass (62 classes): frozen layers are cached, killed runs resume.

    python resnet18.py                                  # linear probe and partial unfreezing, compared
    python resnet18.py --regimes full gradual           # any of linear_probe, partial_unfreeze, full, gradual
    python resnet18.py --out DIR                        # the same command resumes where it was killed
    torchrun --nproc-per-node=4 resnet18.py --out DIR   # several processes share each step
    python resnet18.py --compare DIR DIR                # one comparison of several runs
    python resnet18.py --evaluate DIR/partial_unfreeze/best.pt --out DIR2
    python resnet18.py --predict photo.png --checkpoint DIR/partial_unfreeze/best.pt

The last lines of a run (12,000 images at 64 px; EMNIST ByClass 116k/16k re-split, approximate
ImageNet weights, two cores of an AMD EPYC without bf16, torch 2.14, seed 0, six and a half minutes in all):

    partial_unfreeze reaches 83.14% against 75.73% of linear_probe (+7.41 points, macro-F1 +0.0840) for 7.5x
    the training time, 0.5x the samples seen and 265x the trainable parameters.

From an image's file to the test accuracy (N images of a batch, S --image-size, K classes):

    load_emnist()   uint8 [n, 28, 28]       read from the files, turned upright; stays in memory like this
    split_data()    draws --limit images, a tenth of them for validation; train_all() moves all to the device
    prepare()       float [N, 3, S, S]      resized, grey in three channels, normalised as ImageNet's images
    frozen          the layers that don't train: [N, 512] if only fc does, [N, 256, S/16, S/16] if layer4 does
    Inputs          their output, kept in memory (the probe's on disk, too), or computed anew for every batch
    head            the layers that train, average pooling unless frozen, fc: logits float32 [N, K]
    test_metrics()  accuracy and F1; write_test_files() draws the confusion matrix

Training, validation, test and prediction all call the head on the frozen layers' output. Skip everything
from "plumbing" on, except load_inputs() and train_all(), which call the code above.
`run` is a Run: args (the flags as typed), settings (the same with defaults filled in), device, out (the
results folder); this process is `rank` of `world`, and `main` if its rank is 0. run.say() prints, run.pulse()
shows progress, run.poll(save) saves when that is due and ends the run after a signal, run.share(x) returns
rank 0's x on every process.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a run at once while there is nothing to save

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
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure  # pyplot would set up a display and global state on import
from matplotlib.ticker import PercentFormatter
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
FULL_RUN = {"limit": 0, "image_size": 224}  # as the assignment asks
CPU_RUN = {"limit": 12_000, "image_size": 64}  # what takes minutes and not hours on two cores
EVAL_BATCH = 256  # validation and test; fixed, since another batch size may change the last bit
CHUNK = 2048  # images per feature file: at most this many are recomputed after a kill
MIN_DELTA = 0.0005  # validation accuracy (0..1) that counts as progress for early stopping


@dataclass(frozen=True)
class Stage:
    """One fine-tuning: what trains (a key of PARTS), and the recipe."""

    trains: str
    lr: float  # the peak
    epochs: int  # at most
    warmup_epochs: float
    batch_size: int  # images per step, over all processes
    patience: int  # epochs without progress before stopping early
    weight_decay: float = 0.01


# All use AdamW; report/LOG.md has what else was tried, on validation. The course's recipes: PROBE as it is
# here; for partial unfreezing, --lr 0.0005 --epochs 20.
PROBE = Stage("fc", lr=1e-2, epochs=15, warmup_epochs=0.5, batch_size=256, patience=5)
PARTIAL = Stage("layer4", lr=1e-3, epochs=8, warmup_epochs=1, batch_size=128, patience=3)
FULL = Stage("all", lr=1e-3, epochs=8, warmup_epochs=1, batch_size=128, patience=3)
REGIMES = {  # each stage starts from the previous one's best weights
    "linear_probe": (PROBE,),
    "partial_unfreeze": (PARTIAL,),
    "full": (FULL,),
    "gradual": (PROBE, PARTIAL, FULL),
}


class InputError(ValueError):
    """Bad input from the user: one line, exit status 2."""


class DownloadError(InputError):
    """A file could not be fetched over the network."""


class RunFailed(RuntimeError):
    """A training that can't go on: one line, exit status 1."""


class Diverged(RunFailed):
    """A loss that is not finite."""


class Stopped(Exception):
    """Stopped by SIGTERM or SIGINT, progress saved: exit status 75."""


def rng(*key):
    """A generator seeded by its key, such as (seed, "order", stage, epoch): no generator's state has to be
    saved, as a resumed run draws the same numbers again."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Images uint8 [n, 28, 28], upright, and labels int64 [n], by set: train, val, test."""

    name: str
    classes: str
    images: dict
    labels: dict
    total: int = 0  # training and validation images before --limit

    def checksum(self):
        """Of all images and labels: as many others may have the same name."""
        return tensors_checksum([*self.images.values(), *self.labels.values()])

    def to(self, device):
        for tensors in (self.images, self.labels):
            tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})


def upright(images):
    """Undoes the transposition of EMNIST's files, which hold every image rotated and mirrored."""
    return images.transpose(1, 2).contiguous()  # N, 28, 28


def emnist_files(root):
    raw = Path(root) / "EMNIST" / "raw"
    kinds = [(name, kind) for name in ("train", "test") for kind in ("images-idx3", "labels-idx1")]
    return [raw / f"emnist-byclass-{name}-{kind}-ubyte" for name, kind in kinds]


def download_emnist(root):
    """Downloads torchvision's archive, checks it, unpacks it aside and moves complete files into place."""
    raw = Path(root) / "EMNIST" / "raw"
    beside = raw / ".download"  # on the same disk, even if raw is a link to another one
    offline = f"put the four files emnist-byclass-*-ubyte into {raw}, or see --data-dir"
    with download("EMNIST (536 MB)", torchvision.datasets.EMNIST.url, Path(root), "--data-dir", offline):
        if all(path.exists() for path in emnist_files(root)):
            return  # another process was faster
        for path in emnist_files(beside):
            path.unlink(missing_ok=True)  # may be half unpacked
        torchvision.datasets.EMNIST(beside, split="byclass", download=True)
        for source, target in zip(emnist_files(beside), emnist_files(root)):
            os.replace(source, target)
        shutil.rmtree(beside, ignore_errors=True)


def load_emnist(root):
    """EMNIST ByClass from `root`, downloaded if missing; InputError if a file is damaged."""
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
            if not_the_files_fault(e):
                raise
            damaged = files[0].parent / f"emnist-byclass-{name}-*"
            raise InputError(f"{damaged} is damaged ({one_line(e)}): delete it and start again") from e
        data.images[name], data.labels[name] = upright(images), labels
    n, m = (len(data.labels[name]) for name in ("train", "test"))
    if (n, m) != (697_932, 116_323):  # results on a copy of another size must not bear the official name
        data.name += f", {n / 1000:.0f}k/{m / 1000:.0f}k re-split" if m >= 1000 else f", {n}/{m} re-split"
    return data


def load_digits():
    """scikit-learn's 1,797 real 8x8 digits; a fixed fifth of them is the test set. Scaled to 24x24 in the
    middle of 28x28, about where EMNIST has its characters."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images / 16 * 255, dtype=torch.float32)[:, None]  # n, 1, 8, 8
    images = F.interpolate(images, size=(24, 24), mode="bilinear")[:, 0].round().byte()
    images = F.pad(images, (2, 2, 2, 2))  # n, 28, 28
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
            raise DownloadError(f"{e}, or use --dataset digits") from e
        banner(f"{e}\nFALLING BACK to scikit-learn's digits: 10 classes, 8x8 pixels")
        return load_digits()


def split(n, limit, seed):
    """Indices of the training (90 %) and validation (10 %) images, of all n or of `limit` drawn at random."""
    chosen = torch.randperm(n, generator=rng(seed, "limit"))[:limit] if limit else torch.arange(n)
    chosen = chosen[torch.randperm(len(chosen), generator=rng(seed, "split"))]
    cut = len(chosen) * 9 // 10
    # back to file order; each epoch shuffles anyway
    return chosen[:cut].sort().values, chosen[cut:].sort().values


def split_data(data, settings):
    """Takes the validation set out of the training set; InputError if too few images are left."""
    data.total = len(data.labels["train"])
    train, val = split(data.total, settings.limit, settings.seed)
    if not len(val) or len(train) < 2:
        raise InputError(f"{len(train)} training and {len(val)} validation images are too few")
    for tensors in (data.images, data.labels):
        whole = tensors["train"]
        tensors["train"], tensors["val"] = whole[train], whole[val]
        if settings.dry_run:
            tensors.update({name: tensor[: settings.batch_size or 32] for name, tensor in tensors.items()})


def resize(images, size):
    """Bilinear, as torchvision's Resize: uint8 [N, 28, 28] -> float [N, 1, S, S] in 0..255."""
    return F.interpolate(images[:, None].float(), size=(size, size), mode="bilinear", align_corners=False)


def draw_affine(n, generator):
    """Random maps for affine_grid [n, 2, 3]: within ±10°, scaled by 0.89 to 1.14, ±1.4 of 28 pixels."""
    u = torch.rand(n, 4, generator=generator) * 2 - 1
    angle, scale = u[:, 0] * math.radians(10), 1 + 0.12 * u[:, 1]
    # affine_grid's unit is half an image, 14 pixels; coordinates scaled by s shrink the image by s
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, u[:, 2:] * 0.1
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)


def warp(images, theta, size):
    """Augments and resizes in one interpolation, as two would blur; with the identity, it equals resize()."""
    where = "cpu" if images.device.type == "mps" else images.device  # mps has no "border" padding
    theta = theta.to(where, non_blocking=True)  # otherwise every step would wait for the GPU
    grid = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)
    grey = images[:, None].to(where).float()
    return F.grid_sample(grey, grid, "bilinear", "border", align_corners=False).to(images.device)


def prepare(images, size, theta=None):
    """uint8 [N, 28, 28] -> the network's input: float [N, 3, S, S], normalised as ImageNet's images were."""
    grey = resize(images, size) if theta is None else warp(images, theta, size)  # N, 1, S, S
    # plain numbers: a tensor of them would have to be copied to the GPU, and a copy waits for it
    return torch.cat([(grey / 255 - mean) / std for mean, std in zip(MEAN, STD)], 1)


# ---------------------------------------------------------------------------------------------- model


def load_weights(spec):
    """State dict of the backbone (None: random) and the name to report; InputError if it can't be read."""
    if spec == "none":
        return None, "random"
    path, name, hint = Path(spec), Path(spec).name, "expected a state dict of ResNet-18"
    if spec == "imagenet":
        source = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        path = Path(torch.hub.get_dir(), "checkpoints", Path(source.url).name)
        name, hint = "ImageNet (IMAGENET1K_V1)", "delete it to download it again"
        if not path.exists():
            offline = "fetch the file elsewhere and pass --weights FILE, or --weights none for random ones"
            with download("ImageNet weights (45 MB)", source.url, path.parent, "TORCH_HOME", offline):
                source.get_state_dict(progress=False, check_hash=True)
    try:
        state = {k: v for k, v in read_tensors(path).items() if not k.startswith("fc.")}
        missing, unknown = torchvision.models.resnet18().load_state_dict(state, strict=False)
        optional = ("fc.weight", "fc.bias", "num_batches_tracked")
        wrong = unknown + [k for k in missing if not k.endswith(optional)]
        wrong += [k for k, v in state.items() if not torch.isfinite(v).all()]
        if wrong:
            raise ValueError(f"missing, unknown or not finite: {', '.join(wrong[:3])}")
    except Exception as e:  # whatever torch.load raises for a file that is something else
        if not_the_files_fault(e) and not isinstance(e, (FileNotFoundError, IsADirectoryError)):
            raise
        raise InputError(f"--weights: {path} can't be used ({one_line(e, 300)}): {hint}") from e
    return state, name


def build_model(classes, weights, seed):
    """torchvision's ResNet-18 with a new fc; only the seed decides the random part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18()
    if weights is not None:
        model.load_state_dict(weights, strict=False)  # all but fc
    model.fc = nn.Linear(512, classes)
    for p in (model.fc.weight, model.fc.bias):
        # as nn.Linear's own initialisation; p.dim() gives weight and bias a seed each
        nn.init.uniform_(p, -(512**-0.5), 512**-0.5, generator=rng(seed, "fc", p.dim()))
    return model.to(memory_format=torch.channels_last)


def layout(device):
    """channels_last makes convolutions faster on CPUs and GPUs; on mps, it breaks BatchNorm gradients."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Section(nn.Module):
    """Consecutive blocks of the network, in mixed precision, then pooling and fc if they belong to it."""

    def __init__(self, blocks, amp, pool=False, fc=None):
        super().__init__()
        self.blocks, self.amp, self.pool, self.fc = nn.Sequential(*blocks), amp, pool, fc

    def forward(self, x):
        if len(self.blocks):  # none: the frozen part of "all", the head of "fc"
            x = x.contiguous(memory_format=layout(x.device))
            kind = torch.float16 if self.amp == "fp16" else torch.bfloat16  # without effect if "off"
            with torch.autocast(x.device.type, kind, enabled=self.amp != "off"):
                x = self.blocks(x)
        if self.pool:
            x = x.float().mean((2, 3))  # N, 512: in float32, as 16 bits lose digits in a long sum
        return x if self.fc is None else self.fc(x)


class Part(NamedTuple):
    """What trains: all but the first `frozen_blocks` of stem, layer1, layer2, layer3 and layer4."""

    frozen_blocks: int
    prefixes: tuple  # of the trained parameters' names
    parameters: int  # trained ones, without fc's


PARTS = {
    "fc": Part(5, ("fc.",), 0),
    "layer4": Part(4, ("layer4.", "fc."), 8_393_728),
    "all": Part(0, ("",), 11_176_512),  # every name begins with ""
}


def split_at(model, trains, amp):
    """Splits the model into (frozen, head), which share its layers. The frozen ones get no gradients and stay
    in evaluation mode: head.train() does not reach their BatchNorm, so its statistics don't change. A model
    that no longer trains is split at "fc", with all blocks frozen."""
    cut, _, count = PARTS[trains]
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = [stem, model.layer1, model.layer2, model.layer3, model.layer4]
    # pooling goes with the last block, frozen or not: a probe's features are then 512 numbers
    frozen = Section(blocks[:cut], amp, pool=cut == len(blocks))
    head = Section(blocks[cut:], amp, pool=cut < len(blocks), fc=model.fc)
    model.requires_grad_(True)  # an earlier stage may have frozen more
    frozen.eval().requires_grad_(False)
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert training == count + sum(p.numel() for p in model.fc.parameters()), f"{training:,} parameters train"
    return frozen, head


def read_best(path):
    """(model in evaluation mode, on the CPU; best.pt's content); InputError if it can't be used."""
    try:
        best = read_tensors(path)
        if "0.W" in best:
            raise ValueError("it is cnn_from_scratch.py's")
        best["image_size"] = int(best["image_size"])
        model = build_model(len(best["classes"]), None, 0)
        model.load_state_dict(best["model"])
        if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
            raise ValueError("a weight is not finite")
        return model.eval(), best
    except Exception as e:  # unpickling fails in many ways
        if out_of_memory(e):
            raise
        raise InputError(f"{path} is damaged or not this script's best.pt ({one_line(e)})") from e


def load_model(path):
    """A run's best.pt -> (model in evaluation mode, on the CPU; classes, a string; image size in pixels).

    logits = model(prepare(images, size)) for images uint8 [N, 28, 28], upright, light on dark. Raises
    InputError if the file is damaged or not a best.pt.
    """
    model, best = read_best(path)
    return model, best["classes"], best["image_size"]


# ---------------------------------------------------------------------------------------------- frozen layers


def clock():
    """[wall, CPU] seconds, as a tensor, so that two of them subtract and add up."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Timer:
    """timer("steps") adds the [wall, CPU] seconds since its last call to those of the phase "steps".

    The sums are saved in last.pt, so they cover all starts of a run.
    """

    def __init__(self, device, spent):
        self.device, self.spent, self.last = device, spent, clock()

    def __call__(self, what):
        synchronize(self.device)  # else the next phase would be charged for queued work
        now = clock()
        self.spent[what] = self.spent.get(what, 0) + now - self.last
        self.last = now


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.cuda, torch.mps


def in_batches(run, forward, shape, what, start=0, total=None, dtype=torch.float32, save=lambda: None):
    """Calls forward(indices) for the images start, start + 1, ... of a set, in batches of EVAL_BATCH, and
    collects its outputs in one tensor of the given shape. forward is, for example, prepare() and the frozen
    layers. Processes take batches in turn; each gets all rows. `total`, the set's size, is for the progress
    line.
    """
    memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    rows = torch.empty(shape, dtype=dtype, device=run.device, memory_format=memory).zero_()
    n, together, began = len(rows), EVAL_BATCH * run.world, time.monotonic()
    for first in range(0, n, together):
        begin = first + run.rank * EVAL_BATCH  # of this process's batch, which is empty past the end
        end = min(begin + EVAL_BATCH, n)
        if begin < end:
            # a slice: with --deterministic, writing by index would make CUDA copy all of `rows`
            rows[begin:end] = forward(torch.arange(start + begin, start + end, device=run.device))
        run.poll(save)
        run.pulse(pace_line, what, start + min(first + together, n), total or start + n, began, start)
    if run.world > 1:
        dist.all_reduce(rows)  # a row is zero on all processes but one, so the sum is exact
    return rows


def features(run, name, n, forward):
    """(forward(indices) of a whole set, [n, 512]; the [wall, CPU] seconds it took).

    Kept in OUT/features, CHUNK images a file: a kill loses at most one; later regimes reuse them, as every
    probe starts from the pretrained layers.
    """
    rows = torch.empty(n, 512, device=run.device)  # torch.cat would need up to 1.3 GB twice
    folder, spent = run.out / "features", torch.zeros(2, dtype=torch.float64)
    if run.main:
        folder.mkdir(exist_ok=True)
    for start in range(0, n, CHUNK):
        path, stop = folder / f"{name}-{start // CHUNK:05d}.pt", min(start + CHUNK, n)
        # None: missing or damaged
        chunk = run.share(try_read(path, ["rows", "spent"]) if run.main and path.exists() else None)
        if chunk is None or chunk["rows"].shape != rows[start:stop].shape:
            began, shape = clock(), (stop - start, 512)
            part = in_batches(run, forward, shape, f"features, {name}", start, n)
            chunk = {"rows": part.cpu(), "spent": clock() - began}
            if run.main:
                save_tensors(path, chunk)
        rows[start:stop] = chunk["rows"]
        spent += chunk["spent"]
    return rows, spent


AMP_TYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def layer3_shape(count, size):
    return count, 256, math.ceil(size / 16), math.ceil(size / 16)


def cache_fits(run, count, size):
    """(Whether layer3's output of `count` images fits in memory, its bytes, the bytes allowed)."""
    settings = run.settings
    need = math.prod(layer3_shape(count, size)) * AMP_TYPES[settings.amp].itemsize
    limit = 0.7 * free_bytes(run.device) if settings.cache_gb is None else settings.cache_gb * 1e9
    return need <= limit and run.world == 1, need, limit  # several processes would each hold all of it


def kept_sets(settings):
    """The sets whose frozen output can be kept: not training's with --augment, as it changes every epoch."""
    return ("val",) if settings.augment else ("train", "val")


class Inputs:
    """The head's inputs: outputs of the frozen layers (the prepared images, if all layers train).

    Sets kept by compute() are looked up; for any other set, each call runs the frozen layers.
    """

    def __init__(self, run, data, frozen, trains):
        self.run, self.data, self.frozen, self.trains = run, data, frozen, trains
        self.kept = {}  # name of a set -> the frozen layers' output for all of it
        # whether layer3's output is kept; None: undecided. Saved in last.pt, the checkpoint, because kept and
        # recomputed values may differ in the last bit: a resumed run must not switch
        self.in_memory = None

    @torch.no_grad()
    def run_frozen(self, name, index, theta=None):
        return self.frozen(prepare(self.data.images[name][index], self.run.settings.image_size, theta))

    def __call__(self, name, index, theta=None):
        """[N, 512] or [N, C, h, w] for the images `index` of a set."""
        # a kept set is never augmented, so theta is None
        return self.kept[name][index] if name in self.kept else self.run_frozen(name, index, theta)

    def compute(self, timer):
        """Fills `kept`."""
        run, names = self.run, kept_sets(self.run.settings)
        count = sum(len(self.data.labels[name]) for name in names)
        if self.trains == "fc":
            spent = 0
            for name in names:
                forward = functools.partial(self.run_frozen, name)
                self.kept[name], cost = features(run, name, len(self.data.labels[name]), forward)
                spent += cost
            timer("features")
            timer.spent["features"] = spent  # what making the files took, in any start
            rate = count / spent[0]
            run.say(f"features of {count:,} images: {duration(spent[0])} ({rate:,.0f} images/s)")
        elif self.trains == "layer4" and self.decide_cache(count):
            began = time.monotonic()
            for name in names:
                forward = functools.partial(self.run_frozen, name)
                shape = layer3_shape(len(self.data.labels[name]), run.settings.image_size)
                kind = AMP_TYPES[run.settings.amp]
                self.kept[name] = in_batches(run, forward, shape, f"cache, {name}", dtype=kind)
            timer("cache")
            run.say(f"layer3's output computed in {duration(time.monotonic() - began)}")

    def decide_cache(self, count):
        """Decides whether layer3's output is kept in memory, and prints it. A resumed run keeps its choice,
        unless --cache-gb is given or there are several processes."""
        run = self.run
        fits, need, limit = cache_fits(run, count, run.settings.image_size)
        if self.in_memory is None or run.settings.cache_gb is not None or run.world > 1:
            self.in_memory = fits
        why = "several processes" if run.world > 1 else "--cache-gb sets the budget"
        verdict = "kept in memory" if self.in_memory else f"recomputed for every batch ({why})"
        run.say(f"layer3's output: {need / 1e9:.2f} GB, budget {limit / 1e9:.2f} GB: {verdict}")
        return self.in_memory


# ---------------------------------------------------------------------------------------------- training


def logits_of(run, data, inputs, head, name, save=lambda: None):
    """Logits of the validation or the test set: [n, K] on the CPU."""
    head.eval()
    # so that --evaluate has the same figures: cuDNN's benchmark might pick other kernels there, and without
    # `deterministic` those that it has picked in training would be used here
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    shape = len(data.labels[name]), len(data.classes)
    with torch.no_grad():
        logits = in_batches(run, lambda index: head(inputs(name, index)), shape, name, save=save).cpu()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    return logits


def log_prior(data):
    """Logarithm of each class's share of the training set [K]; one is added to keep all finite."""
    counts = torch.bincount(data.labels["train"].cpu(), minlength=len(data.classes)).double() + 1
    return (counts / counts.sum()).log()


def accuracy_of(logits, labels):
    return float((logits.argmax(1) == labels).double().mean())


def macro_f1(labels, predicted, k):
    """As scikit-learn's, which takes 10 ms a call, too slow for tune_tau(); from confusion counts."""
    counts = torch.bincount(labels * k + predicted, minlength=k * k).view(k, k).double()
    both = counts.sum(0) + counts.sum(1)
    return float((2 * counts.diagonal() / both.clamp(min=1))[both > 0].mean())


def tune_tau(logits, labels, prior):
    """The tau in 0, 0.05, ..., 1 with the best macro-F1 of logits - tau * prior on validation (prior: log
    frequencies): it offsets the bias towards frequent classes (Menon et al. 2021, arXiv 2007.07314)."""
    taus = [t / 20 for t in range(21)]
    return max(taus, key=lambda tau: macro_f1(labels, (logits - tau * prior).argmax(1), len(prior)))


@dataclass
class State:
    """How far a regime has got. last.pt adds weights, optimizer, scaler and in_memory."""

    sums: torch.Tensor  # [loss, correct images], added up over the current epoch's steps
    best: dict  # the best epoch on validation of all stages so far, with its weights
    number: int = 0  # of the current stage
    epoch: int = 0  # epochs finished in this stage
    step: int = 0  # steps finished in this epoch
    reference: float = -1.0  # validation accuracy that the next epoch must beat by MIN_DELTA
    stale: int = 0  # epochs since it was last beaten
    done: bool = False  # the stage has ended and the model has the best weights
    diverged: bool = False
    # of the whole regime
    peak: int = 0  # bytes
    logged: float = 0.0  # the seconds of training and validation in log.csv
    spent: dict = field(default_factory=dict)  # phase -> [wall, CPU] seconds: a Timer's
    history: list = field(default_factory=list)  # the rows of log.csv
    stages: list = field(default_factory=list)  # summaries of the finished ones


class Trainer:
    """A regime's training, stage by stage: model, optimizer, early stopping, checkpoints."""

    def __init__(self, run, data, model, recipes, folder):
        self.run, self.data, self.model, self.recipes, self.folder = run, data, model, recipes, folder
        self.n = len(data.labels["train"])
        best = {"accuracy": -1.0, "epoch": 0, "number": 0, "tau": 0.0, "weights": {}}
        self.state = State(torch.zeros(2, device=run.device), best)
        self.timer = Timer(run.device, self.state.spent)
        self.begin(0)

    def begin(self, number):
        """Starts stage `number` from the model's weights."""
        run, stage = self.run, self.recipes[number]
        # the head's DistributedDataParallel, see wrap()
        self.ddp = None  # before the next is made: two wrappers would each reduce a shared gradient
        self.stage, self.steps = stage, math.ceil(self.n / stage.batch_size)  # steps per epoch
        frozen, self.head = split_at(self.model, stage.trains, run.settings.amp)
        self.inputs = Inputs(run, self.data, frozen, stage.trains)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=stage.lr, weight_decay=stage.weight_decay, fused=run.device.type != "mps"
        )
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.settings.amp == "fp16")
        # if no epoch improves on the stage before, this one ends with the weights that it starts from; they
        # are copied again, as it trains other layers
        best = self.state.best | {"weights": self.trained_weights()}
        whole_regime = ("peak", "logged", "spent", "history", "stages")
        carried = {name: getattr(self.state, name) for name in whole_regime}
        self.state = State(torch.zeros(2, device=run.device), best, number, **carried)

    def learning_rate(self):
        """1) linear warm-up, 2) half a cosine towards zero."""
        step = self.state.epoch * self.steps + self.state.step
        warm = self.stage.warmup_epochs * self.steps
        if step < warm:
            return self.stage.lr * (step + 1) / (warm + 1)
        rest = max(1.0, self.stage.epochs * self.steps - warm)
        return self.stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / rest)))

    def train_step(self, order):
        """One step; `order` is the epoch's permutation of the training set."""
        run, state = self.run, self.state
        # steps of equal size, give or take one image: a small last one would have too much weight
        first, last = self.n * state.step // self.steps, self.n * (state.step + 1) // self.steps
        index = order[first:last]  # independent of the number of processes
        mine = index[run.rank :: run.world]  # this process's share of them
        theta = None
        if run.settings.augment:
            generator = rng(run.settings.seed, "augment", state.number, state.epoch, state.step)
            theta = draw_affine(len(index), generator)[run.rank :: run.world]
        y = self.data.labels["train"][mine]
        head = self.ddp or self.head  # DDP averages the gradients over the processes
        logits = head(self.inputs("train", mine, theta))
        # this process's part of the step's mean loss
        loss = F.cross_entropy(logits, y, reduction="sum") / len(index)
        self.optimizer.zero_grad()
        # times the number of processes: DDP takes the mean of their gradients, which are to be added up
        self.scaler.scale(loss * run.world).backward()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        sums = torch.stack([loss.detach(), (logits.argmax(1) == y).sum().float()])
        if run.world > 1:
            self.agree(sums, len(mine) / len(index))
        state.sums += sums
        state.step += 1

    def agree(self, sums, share):
        """Adds up `sums` over the processes. On CPUs, where SyncBatchNorm does not run, also averages
        BatchNorm's statistics, weighted by `share`, as rank 0 may save after any step."""
        dist.all_reduce(sums)
        for buffer in self.head.buffers():
            if self.run.device.type == "cpu" and buffer.is_floating_point():
                dist.all_reduce(buffer.mul_(share))

    def train(self):
        """Trains the stage to its last epoch or early stop, then restores the best weights."""
        run, state = self.run, self.state
        if state.done:
            return
        self.save()  # a kill while inputs are computed must not fall back to the previous stage
        if not self.finished():  # a resumed stage may be
            self.inputs.compute(self.timer)
            if run.world > 1:
                self.wrap()
        try:
            while not self.finished():
                self.train_epoch()
                self.finish_epoch()
        except Diverged as e:
            if not state.number:
                raise
            run.say(f"{e}: ending this stage with the best weights so far")
            state.step, state.stale = 0, self.stage.patience  # finished() from now on
            state.diverged, state.logged = True, self.seconds()
            state.sums.zero_()
        # head and frozen layers are the model's own: all three have the best weights now
        self.model.load_state_dict(state.best["weights"], strict=False)
        state.done = True
        self.save()
        if state.epoch < self.stage.epochs and not state.diverged:
            back = f"epoch {state.best['epoch']}"
            if len(self.recipes) > 1:
                back += f" of stage {self.recipes[state.best['number']].trains}"
            run.say(f"early stop after epoch {state.epoch}: back to the weights of {back}")
        run.poll(self.save)

    def wrap(self):
        """Wraps the head in torch's DistributedDataParallel, for training only."""
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
            if state.step == self.steps:
                self.timer("steps")  # before poll(), whose save() charges what follows to the validation
            run.poll(self.save)
            run.pulse(self.step_line, began, first)
        self.check_finite()

    def step_line(self, began, first):
        state = self.state
        rate = (state.step - first) / max(1e-9, time.monotonic() - began)  # steps per second
        left = (self.stage.epochs - state.epoch) * self.steps - state.step
        loss, images = float(state.sums[0]) / state.step, rate * self.n / self.steps
        place = f"epoch {state.epoch + 1:2d}/{self.stage.epochs} | step {state.step}/{self.steps}"
        return f"{place} | loss {loss:.4f} | {images:,.0f} images/s | eta {duration(left / rate)}"

    def finish_epoch(self):
        """Validation, early stopping, log line, checkpoint."""
        state, labels = self.state, self.data.labels["val"].cpu()
        logits = logits_of(self.run, self.data, self.inputs, self.head, "val", self.save)
        self.timer("validation")
        loss, accuracy = float(F.cross_entropy(logits, labels)), accuracy_of(logits, labels)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after epoch {state.epoch + 1}")
        better = accuracy > state.best["accuracy"]  # any gain makes this the best epoch ...
        if better:
            state.best = {"accuracy": accuracy, "epoch": state.epoch + 1, "number": state.number}
            state.best["tau"] = tune_tau(logits, labels, log_prior(self.data))
            state.best["weights"] = self.trained_weights()
        self.timer("validation")
        state.stale += 1
        if accuracy > state.reference + MIN_DELTA:  # ... but only real progress resets the patience
            state.reference, state.stale = accuracy, 0
        row = {
            "stage": self.stage.trains,
            "epoch": state.epoch + 1,
            "train_loss": float(state.sums[0]) / self.steps,
            "train_accuracy": float(state.sums[1]) / self.n,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds() - state.logged,
            "best": int(better),
        }
        state.history.append(row)
        state.logged = self.seconds()
        state.epoch, state.step = state.epoch + 1, 0
        state.sums.zero_()
        self.save()
        if self.run.main:
            self.publish(better)
        # only now: an epoch that is in the log must survive a kill
        epochs_left = 0 if self.finished() else self.stage.epochs - state.epoch
        train = f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.2%}"
        self.run.say(
            f"epoch {state.epoch:2d}/{self.stage.epochs} | {train} | val loss {loss:.4f} acc {accuracy:.2%} "
            f"| lr {row['lr']:.1e} | {duration(row['seconds'])} "
            f"| eta {duration(epochs_left * row['seconds'])}" + (" | best" if better else "")
        )
        self.run.poll(self.save)

    def seconds(self):
        """Of training and validation, so far."""
        spent = self.state.spent
        return sum(float(spent[phase][0]) for phase in ("steps", "validation") if phase in spent)

    def finished(self):
        return self.state.epoch >= self.stage.epochs or self.state.stale >= self.stage.patience

    def check_finite(self):
        """Raises Diverged; per epoch and save only, as it waits for a GPU."""
        if not torch.isfinite(self.state.sums[0]):
            raise Diverged(f"the loss is {float(self.state.sums[0])} in epoch {self.state.epoch + 1}")
        if not torch.stack([torch.isfinite(p).all() for p in self.params]).all():
            raise Diverged(f"a weight is no longer finite in epoch {self.state.epoch + 1}")

    def trained_weights(self):
        """A copy of what trains, statistics included; the frozen rest never changes and is not in last.pt."""
        prefixes = PARTS[self.stage.trains].prefixes
        return {k: v.cpu().clone() for k, v in self.model.state_dict().items() if k.startswith(prefixes)}

    def save(self):
        """Saves last.pt, all of the training's own state."""
        run, state = self.run, self.state
        # a stop or checkpoint may come during training or, after the last step, validation
        self.timer("steps" if state.step < self.steps else "validation")
        self.check_finite()  # a state that has diverged never replaces a good one
        state.peak = max(state.peak, peak_bytes(run.device))
        if run.main:
            last = vars(state) | {"weights": self.trained_weights(), "optimizer": self.optimizer.state_dict()}
            last |= {"scaler": self.scaler.state_dict(), "in_memory": self.inputs.in_memory}
            save_tensors(self.folder / "last.pt", last, keep=True)
        self.timer("checkpoint")
        run.saved_at = time.monotonic()

    def publish(self, better=True):
        """Writes log.csv and, if `better`, best.pt: both derive from the state."""
        state, settings = self.state, self.run.settings
        write_csv(self.folder / "log.csv", state.history)
        if better:
            best = {k: state.best[k] for k in ("accuracy", "epoch")} | {"dataset": self.data.name}
            best |= {"classes": self.data.classes, "image_size": settings.image_size, "amp": settings.amp}
            best["data_checksum"] = self.run.data_checksum
            model = {k: v.cpu() for k, v in self.model.state_dict().items()}
            save_tensors(self.folder / "best.pt", best | {"model": model | state.best["weights"]})
        self.timer("checkpoint")

    def load(self, last):
        """Resumes from last.pt's content; raises if something is missing or does not fit."""
        self.begin(last["number"])
        fresh = self.state  # as begin() makes it: what has to be there, of which types and shapes
        state = State(**{name: last[name] for name in vars(fresh)})
        checks = [type(getattr(state, name)) is type(value) for name, value in vars(fresh).items()]
        checks += [0 <= state.number, 0 <= state.epoch <= self.stage.epochs, 0 <= state.step <= self.steps]
        checks += [state.sums.shape == fresh.sums.shape, state.best.keys() == fresh.best.keys()]
        checks += [len(state.history) >= state.epoch, len(state.stages) >= state.number]
        checks += [last["in_memory"] in (None, True, False)]
        for weights in (last["weights"], state.best["weights"]):
            checks += [weights.keys() == fresh.best["weights"].keys()]
            checks += [torch.isfinite(w).all() for w in weights.values()]
        if not all(checks):
            raise ValueError("it does not fit this regime")
        state.sums = state.sums.to(self.run.device)
        self.model.load_state_dict(last["weights"], strict=False)
        self.optimizer.load_state_dict(last["optimizer"])
        self.scaler.load_state_dict(last["scaler"])
        self.state, self.inputs.in_memory = state, last["in_memory"]
        self.timer = Timer(self.run.device, state.spent)

    def summary(self):
        """What metrics.json says about a finished stage."""
        early = self.state.epoch < self.stage.epochs and not self.state.diverged
        ran = {"epochs_run": self.state.epoch, "early_stopped": early}
        ran |= {"samples_per_epoch": self.n, "trainable_params": sum(p.numel() for p in self.params)}
        best = self.state.best  # of all stages so far
        ran |= {"diverged": self.state.diverged, "best_stage": self.recipes[best["number"]].trains}
        ran |= {"best_epoch": best["epoch"], "val_accuracy": best["accuracy"]}
        return asdict(self.stage) | ran


def stages_of(name, settings):
    """A regime's stages, with what the command line overrides."""
    names = ("lr", "epochs", "warmup_epochs", "batch_size", "patience")
    given = {k: getattr(settings, k) for k in names if getattr(settings, k) is not None}
    if settings.dry_run:
        given["epochs"] = 1  # of one step, as split_data() leaves one batch
    return [replace(stage, **given) for stage in REGIMES[name]]


def resume(run, data, make_model, stages, folder):
    """(The regime's trainer, restored from last.pt or the checkpoint before it, or new; whether restored)."""
    for path in (folder / "last.pt", folder / "last.pt.prev"):
        last = run.share(try_read(path, ["number"]) if run.main and path.exists() else None)
        if last is None:
            continue
        trainer = Trainer(run, data, make_model(), stages, folder)
        try:
            trainer.load(last)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            if not_the_files_fault(e):
                raise
            run.say(f"{path} is damaged or not this run's ({one_line(e)}): not used")
            continue
        if run.main and path.name != "last.pt":  # last.pt is missing, or was refused above
            os.replace(path, folder / "last.pt")
            run.say(f"continuing from the previous checkpoint, {path.name}")
        if run.main and trainer.state.history:
            trainer.publish()  # a kill may have come between last.pt and these
        return trainer, True
    if (folder / "log.csv").exists():
        run.say(f"{folder} has no usable last.pt: starting again from the beginning")
    return Trainer(run, data, make_model(), stages, folder), False


# ------------------------------------------------------------------------------------- regime and test set


def test_metrics(labels, logits, classes):
    """Test-set metrics from scikit-learn, 0..1."""
    y, scores = labels.numpy(), logits.numpy()
    predicted, every = scores.argmax(1), np.arange(len(classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, predicted, average="macro", zero_division=0
    )
    letter = np.array([ord(name.lower()) for name in classes])  # ignores case
    return {
        "test_accuracy": float(metrics.accuracy_score(y, predicted)),
        "test_precision_macro": float(precision),
        "test_recall_macro": float(recall),
        "test_f1_macro": float(f1),
        "test_top5": float(metrics.top_k_accuracy_score(y, scores, k=5, labels=every)),
        "test_accuracy_case_insensitive": float((letter[y] == letter[predicted]).mean()),
    }


def per_class(labels, predicted, confusion, classes):
    """Images, precision, recall, F1 and most frequent error of every class."""
    every, rows = range(len(classes)), []
    figures = metrics.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    errors = confusion - np.diag(np.diag(confusion))
    for k, (precision, recall, f1, images) in enumerate(zip(*figures)):
        row = {"class": classes[k], "images": int(images), "errors": int(errors[k].sum())}
        row |= {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
        rows.append(row | {"most_confused_with": classes[errors[k].argmax()] if errors[k].any() else ""})
    return rows


def write_test_files(run, folder, data, logits, title):
    """Tables and pictures of the test set."""
    labels, predicted, classes = data.labels["test"].cpu(), logits.argmax(1), data.classes
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(len(classes)))  # [true, predicted]
    if run.main:
        write_csv(folder / "per_class.csv", per_class(labels, predicted, confusion, classes))
        counts = [{"true": c, **dict(zip(classes, row))} for c, row in zip(classes, confusion.tolist())]
        write_csv(folder / "confusion.csv", counts)
        draw_confusion(folder / "confusion.png", confusion, classes, f"{title}, {data.name}, test set")
    run.poll()  # all processes take part
    if run.main:
        draw_top_confusions(folder / "confusions_top.png", confusion, data, predicted, title)
    run.poll()


def about_run(run, data, weights_name):
    """What metrics.json says of data, weights and machine."""
    return {
        "dataset": data.name,
        "weights": weights_name,
        "image_size": run.settings.image_size,
        "dry_run": run.settings.dry_run,
        "amp": run.settings.amp,
        "device": device_name(run.device),
        "processes": run.world,
        "torch": torch.__version__,
        "git_commit": run.git_commit,
    }


def run_regime(run, name, data, weights, weights_name, todo):
    """Trains a regime, stage by stage, and tests its best weights; returns its metrics. `todo`: all regimes
    that are to be trained; the first one prints the plan, which needs a trainer."""
    folder, stages = run.out / name, stages_of(name, run.settings)
    if run.main:
        folder.mkdir(exist_ok=True)

    def make_model():
        model = build_model(len(data.classes), weights, run.settings.seed)
        return model.to(run.device, memory_format=layout(run.device))

    trainer, resumed = resume(run, data, make_model, stages, folder)
    if name == todo[0] and not resumed:
        plan(run, data, trainer, todo)  # prints an estimate, changes nothing
    reset_peak(run.device)
    for number in range(trainer.state.number, len(stages)):
        if number > trainer.state.number:  # the first of these stages is already set up
            trainer.begin(number)
        state, stage = trainer.state, stages[number]
        place = f"{name}, {stage.trains} (stage {number + 1} of {len(stages)})" if len(stages) > 1 else name
        if resumed:
            step = f"epoch {state.epoch + 1}, after step {state.step} of {trainer.steps}"
            run.say(f"{place}: training has ended" if state.done else f"{place}: continuing in {step}")
        else:
            training = sum(p.numel() for p in trainer.params)
            total = sum(p.numel() for p in trainer.model.parameters())
            recipe = f"batch size {stage.batch_size}, lr {stage.lr:g}"
            run.say(f"{place}: {training:,} of {total:,} parameters train, {recipe}")
        resumed = False
        trainer.train()
        state.stages.append(trainer.summary())  # unlike `stages`, what came out
    return finish_regime(run, name, data, weights_name, trainer)


def finish_regime(run, name, data, weights_name, trainer):
    """The test set, once, with the best weights; then tables and pictures; metrics.json comes last."""
    folder, state, timer = trainer.folder, trainer.state, trainer.timer
    # "test" is never kept: prepare() and the frozen layers run here
    logits = logits_of(run, data, trainer.inputs, trainer.head, "test")
    timer("test")
    title = name + (" (dry run)" if run.settings.dry_run else "")
    if run.main:
        draw_curves(folder / "curves.png", state.history, f"{title}, {data.name}")
    write_test_files(run, folder, data, logits, title)
    timer("pictures")
    if not run.main:
        return None
    row = about_run(run, data, weights_name) | training_figures(name, trainer)
    # tau was tuned on validation
    labels, corrected = data.labels["test"].cpu(), logits - state.best["tau"] * log_prior(data)
    row |= test_metrics(labels, logits, data.classes)
    row["prior_corrected"] = {"tau": state.best["tau"], **test_metrics(labels, corrected, data.classes)}
    write_json(folder / "metrics.json", row | {"checksum": checksum(row)})
    (folder / "last.pt.prev").unlink(missing_ok=True)
    run.say(
        f"{title}: test accuracy {row['test_accuracy']:.2%}, macro-F1 {row['test_f1_macro']:.4f}, top-5 "
        f"{row['test_top5']:.2%} (once, with the best epoch's weights); training "
        f"{duration(row['train_seconds'])}, in all {duration(row['total_seconds'])}"
    )
    return row


def training_figures(name, trainer):
    """metrics.json's keys on training and cost."""
    state, settings, last = trainer.state, trainer.run.settings, trainer.state.stages[-1]
    seconds = {phase: float(wall) for phase, (wall, _) in state.spent.items()}
    # validation, test set, pictures and checkpoints are not counted
    counted = [state.spent[phase] for phase in ("features", "cache", "steps") if phase in seconds]
    training, cpu_seconds = sum(counted).tolist()
    samples = sum(s["epochs_run"] * s["samples_per_epoch"] for s in state.stages)
    return {
        "regime": name,
        "seed": settings.seed,
        "augment": settings.augment,
        "limit": settings.limit or None,
        "learning_rate": last["lr"],
        "epochs_run": sum(s["epochs_run"] for s in state.stages),
        "max_epochs": sum(s["epochs"] for s in state.stages),
        "early_stopped": last["early_stopped"],
        "samples_per_epoch": trainer.n,
        "update_budget": samples,
        "trainable_params": last["trainable_params"],
        "total_params": sum(p.numel() for p in trainer.model.parameters()),
        "train_seconds": training,
        # of this process: if far below cores x train_seconds, other work disturbed the run
        "train_cpu_seconds": cpu_seconds,
        "total_seconds": sum(seconds.values()),
        "seconds": seconds,
        "images_per_second": samples / training,
        "peak_memory_bytes": state.peak,
        "val_accuracy": state.best["accuracy"],
        "val_accuracies": [epoch["val_accuracy"] for epoch in state.history],
        "stages": state.stages,
    }


def evaluate(args):
    """--evaluate best.pt: the test set with a checkpoint's weights; metrics and pictures in --out."""
    model, best = read_best(args.evaluate)
    run, classes, name = Run(args), best["classes"], Path(args.evaluate).name
    if run.world > 1:
        raise InputError("--evaluate runs in one process")
    dataset = "digits" if len(classes) == 10 else "emnist"
    if args.dataset not in ("auto", dataset):
        raise InputError(f"--evaluate: {name} comes from a run on {dataset}, not {args.dataset}")
    if missing := {"dataset", "data_checksum", "amp"} - best.keys():
        raise InputError(f"--evaluate: {name} is an older version's: it lacks {', '.join(sorted(missing))}")
    amp, trained = args.amp, best["amp"]
    if amp == "auto" and not (trained == "fp16" and run.device.type != "cuda"):
        amp = trained
    amp = choose_amp(amp, run.device)
    settings = {"limit": 0, "image_size": best["image_size"], "amp": amp}  # as the run was tested
    run.settings = argparse.Namespace(**vars(args) | settings)
    out = Path(args.out or f"results/resnet18-evaluate-{datetime.now():%Y%m%d-%H%M%S}")
    refuse_run_folder(out)
    data = load_digits() if dataset == "digits" else load_emnist(args.data_dir)
    if data.checksum() != best["data_checksum"]:  # its test images may be among those of the training
        files = data.name if data.name != best["dataset"] else f"these files in {args.data_dir}"
        raise InputError(f"--evaluate: {name} comes from a run on {best['dataset']}, not {files}")
    make_folder(out)
    split_data(data, run.settings)
    data.to(run.device)
    frozen, head = split_at(model.to(run.device, memory_format=layout(run.device)), "fc", amp)
    logits = logits_of(run, data, Inputs(run, data, frozen, "fc"), head, "test")
    write_test_files(run, out, data, logits, name)
    row = test_metrics(data.labels["test"].cpu(), logits, classes)
    content = {"checkpoint": args.evaluate, **about_run(run, data, name), **row}
    write_json(out / "metrics.json", content | {"checksum": checksum(content)})
    accuracy, f1 = row["test_accuracy"], row["test_f1_macro"]
    dry = "DRY RUN, one batch: " if args.dry_run else ""
    run.say(f"{dry}{name}: test accuracy {accuracy:.2%}, macro-F1 {f1:.4f} ({data.name}); results in {out}")
    return 0


# ---------------------------------------------------------------------------------------------- plan


def time_per_image(run, data, model, trains):
    """Rough seconds per image: (frozen layers, a training step of the head)."""
    model, size = copy.deepcopy(model), run.settings.image_size  # the run's own weights and statistics stay
    frozen, head = split_at(model, trains, run.settings.amp)
    head.train()
    most = min(128, run.settings.batch_size or 128)  # a small GPU may have no memory for more
    n = max(4, min(most, 400_000 // size**2)) if run.device.type == "cpu" else most
    index = torch.arange(n, device=run.device) % len(data.labels["train"])
    images, labels, times = data.images["train"][index], data.labels["train"][index], []
    for _ in range(3):  # the first one also sets up kernels
        run.poll()
        began = time.perf_counter()
        with torch.no_grad():
            x = frozen(prepare(images, size))
        synchronize(run.device)
        middle = time.perf_counter()
        F.cross_entropy(head(x), labels).backward()
        synchronize(run.device)
        times.append((middle - began, time.perf_counter() - middle))
    return [min(seconds) / n / run.world for seconds in zip(*times)]


def plan(run, data, trainer, todo):
    """Says roughly how long the regimes will take, from a few timed batches; without a GPU, also what all
    images at 224 px would take."""
    settings, texts, costs, training, testing = run.settings, [], {}, 0.0, 0.0
    train, val, test = (len(data.labels[name]) for name in ("train", "val", "test"))
    kept_images = sum(len(data.labels[name]) for name in kept_sets(settings))
    fits = cache_fits(run, kept_images, settings.image_size)[0]
    for name in todo:
        seconds = 0.0
        for stage in stages_of(name, settings):
            passes = stage.epochs  # through the frozen layers
            if stage.trains == "fc":
                passes = 0 if "fc" in costs else 1  # a later regime finds the features
            elif stage.trains == "layer4" and fits:
                passes = 1
            train_passes = stage.epochs if settings.augment else passes
            if stage.trains not in costs:
                costs[stage.trains] = time_per_image(run, data, trainer.model, stage.trains)
            frozen, step = costs[stage.trains]
            seconds += frozen * (train_passes * train + passes * val)
            seconds += stage.epochs * step * (train + val / 3)  # forward is about a third of a training step
        test_seconds = (frozen + step / 3) * test
        training, testing = training + seconds, testing + test_seconds
        texts.append(f"{name} about {duration(seconds + test_seconds)}")
    trainer.timer("plan")
    run.say(f"plan: {', '.join(texts)} on {device_name(run.device)}; less with early stopping")
    size, images = settings.image_size, train + val
    fewer = run.args.limit is None and images < data.total
    smaller = run.args.image_size is None and size < FULL_RUN["image_size"]
    if run.main and (fewer or smaller) and run.device.type == "cpu" and not settings.dry_run:
        pixels = (FULL_RUN["image_size"] / size) ** 2
        all_of_them = pixels * (training * data.total / images + testing)
        banner(
            f"NO GPU: this run uses {images:,} of {data.total:,} images, at {size} px. For all of them at\n"
            f"224 px, add --limit 0 --image-size 224 and a new --out: at least {duration(all_of_them)} here."
        )


# ---------------------------------------------------------------------------------------------- comparison

SETTING = ("dataset", "weights", "image_size", "samples_per_epoch")
DIFFERENCES = {  # how two runs may differ, and a label's words for it
    "dataset": "{}",
    "weights": "{} weights",
    "image_size": "{} px",
    "samples_per_epoch": "{:,} training images",
    "augment": "augmented: {}",
    "learning_rate": "lr {:g}",
    "epochs_run": "epochs: {}",
    "amp": "amp {}",
    "processes": "{} processes",
    "device": "{}",
    "seed": "seed {}",
}


def checksum(row):
    """Of a metrics.json or args.json: reveals later changes."""
    rest = {k: v for k, v in row.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16]


def read_metrics(path):
    """A regime's metrics.json; ValueError if it is damaged or was changed."""
    row = json.loads(path.read_bytes())
    if not isinstance(row, dict) or row.get("checksum") != checksum(row):
        raise ValueError("it is not as the run wrote it")
    return row


def label_rows(rows):
    """Gives every row a label: the regime and what differs in the setting or between runs of this regime."""
    for row in rows:
        words = []
        for key, text in DIFFERENCES.items():
            others = [r for r in rows if key in SETTING or r["regime"] == row["regime"]]
            if len({str(r[key]) for r in others}) > 1:
                words.append(text.format(row[key]))
        text = row["regime"] + (f" ({', '.join(words)})" if words else "")
        row["label"] = text.replace("|", "/")  # of a file's name; in a table, it would end the cell
    labels = [row["label"] for row in rows]
    for k, label in enumerate(labels):
        if labels.count(label) > 1:
            rows[k]["label"] += f" (run {labels[: k + 1].count(label)})"


def trade_off(rows):
    """One sentence from the numbers: what the most accurate costs over the cheapest."""
    cheap = min(rows, key=lambda r: r["train_seconds"])
    best = max(rows, key=lambda r: (r["test_accuracy"], -r["train_seconds"]))
    if any(r["dry_run"] for r in rows):
        return "DRY RUN, one batch: these numbers say nothing."
    if len({r["dataset"] for r in rows}) > 1:
        return "These runs had different test sets: their accuracies can't be compared."
    if len(rows) == 1:
        return f"{best['label']} reaches {best['test_accuracy']:.2%}; there is nothing to compare it with."
    if cheap is best:
        return f"{best['label']} is both the cheapest and the most accurate ({best['test_accuracy']:.2%})."
    accuracy, f1 = (best[k] - cheap[k] for k in ("test_accuracy", "test_f1_macro"))
    costs = ("train_seconds", "update_budget", "trainable_params")
    time_x, samples_x, params_x = (best[k] / max(cheap[k], 1e-9) for k in costs)
    return (
        f"{best['label']} reaches {best['test_accuracy']:.2%} against {cheap['test_accuracy']:.2%} of "
        f"{cheap['label']} ({100 * accuracy:+.2f} points, macro-F1 {f1:+.4f}) for {time_x:.1f}x the training "
        f"time, {samples_x:.1f}x the samples seen and {params_x:.0f}x the trainable parameters."
    )


def write_comparison(folder, rows):
    """comparison.json, comparison.md and comparison.png from the rows that metrics.json files hold."""
    label_rows(rows)
    head = "regime | hardware | accuracy | macro-F1 | trainable (M) | epochs x samples | training | in all"
    table = [head, " | ".join(["---"] * 8)]
    for r in rows:
        processes = f", {r['processes']} processes" if r["processes"] > 1 else ""
        table.append(
            f"{r['label']} | {r['device']}, {r['amp']}{processes} | {r['test_accuracy']:.2%} "
            f"| {r['test_f1_macro']:.4f} | {r['trainable_params'] / 1e6:.3f} "
            f"| {r['epochs_run']} x {r['samples_per_epoch']:,} "
            f"| {duration(r['train_seconds'])} | {duration(r['total_seconds'])}"
        )
    tests = dict.fromkeys(f"{r['dataset']}; {r['weights']} weights; {r['image_size']} px" for r in rows)
    sentence = trade_off(rows)
    dry = f"{sentence} " if any(r["dry_run"] for r in rows) else ""
    title = f"{dry}Test set of {' / '.join(tests)}"
    lines = [f"{title}.", "", *(f"| {row} |" for row in table), "", sentence, ""]
    draw_comparison(folder / "comparison.png", rows, title)
    write_bytes(folder / "comparison.md", "\n".join(lines).encode(errors="backslashreplace"))
    write_json(folder / "comparison.json", {"rows": rows, "trade_off": sentence})
    return "\n".join(lines)


def compare(args):
    """--compare DIR...: one comparison of the finished regimes in several folders."""
    rows = []
    for folder in map(Path, args.compare):
        paths = [p for p in (folder / "metrics.json", *sorted(folder.glob("*/metrics.json"))) if p.exists()]
        if not paths:
            print(f"{folder}: no finished regime (metrics.json) there; skipped", flush=True)
        for path in paths:
            try:
                row = read_metrics(path)
            except (OSError, ValueError) as e:
                raise InputError(f"--compare: {path} can't be used ({one_line(e)})") from e
            if "checkpoint" in row:
                print(f"{path}: the result of --evaluate, not of a run; skipped", flush=True)
            elif row.get("dry_run"):
                raise InputError(f"--compare: {path} comes from a dry run and means nothing")
            else:
                rows.append(row)
    if not rows:
        raise InputError("--compare: no regime has finished there")
    out = make_folder(args.out or f"results/resnet18-compare-{datetime.now():%Y%m%d-%H%M%S}")
    refuse_run_folder(out)
    try:
        print(write_comparison(out, sorted(rows, key=lambda r: r["train_seconds"])))
    except KeyError as e:
        raise InputError(f"--compare: a metrics.json is another version's: it lacks {e}") from e
    print(f"in {out}: comparison.md, comparison.json, comparison.png")
    return 0


# ---------------------------------------------------------------------------------------------- pictures

# told apart by colour-blind readers too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BLUE, ORANGE = COLOURS[:2]
CLASS_FONT = {"family": "monospace", "fontsize": 11}  # in which I, l and 1 differ, and O and 0


def new_figure(width, height, rows=1, columns=1, title="", **kwargs):
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, parse_math=False)  # $ is a dollar
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_bytes(path, buffer.getbuffer())


def show_images(axes, images):
    for ax in axes:
        ax.set_axis_off()
    for ax, image in zip(axes, images):
        ax.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=255)


def finish_axes(ax, **labels):
    ax.set(**labels)
    if labels["xlabel"] == "epoch":
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.grid(alpha=0.3)


def draw_samples(path, data):
    """Upright training images with labels; for EMNIST, first a row as stored in its files."""
    images, labels, title = data.images["train"][:50], data.labels["train"][:50], "training images and labels"
    if data.name.startswith("EMNIST"):
        # transposed again, they are as in the files
        images, labels = torch.cat([upright(images[:10]), images]), torch.cat([labels[:10], labels])
        title += "; top row: the second row as the files store it (transposed)"
    rows = math.ceil(len(images) / 10)
    figure, axes = new_figure(10, 1.1 * rows, rows, 10, f"{data.name}: {title}")
    show_images(axes.ravel(), images)
    for ax, label in zip(axes.ravel(), labels):
        ax.set_title(data.classes[label], **CLASS_FONT)
    save_figure(figure, path)


def draw_curves(path, history, title):
    stages = [row["stage"] for row in history]
    heading = f"{title}: {' | '.join(dict.fromkeys(stages))}" if len(set(stages)) > 1 else title
    figure, axes = new_figure(10, 3.8, 1, 2, heading)
    for ax, what, scale, unit in zip(axes[0], ("loss", "accuracy"), (1, 100), ("", " (%)")):
        for name, label, colour, style in (
            ("train", "training, mean over the epoch", BLUE, "o--"),
            ("val", "validation, after the epoch", ORANGE, "s-"),
        ):
            values = [row[f"{name}_{what}"] * scale for row in history]
            ax.plot(range(1, len(values) + 1), values, style, color=colour, label=label, ms=4)
        for k in range(1, len(stages)):
            if stages[k] != stages[k - 1]:
                ax.axvline(k + 0.5, color="gray", lw=1)
        finish_axes(ax, xlabel="epoch", ylabel=what + unit)
        ax.legend()
    save_figure(figure, path)


def draw_confusion(path, confusion, classes, title):
    """Rows are true classes, normalised; a square-root colour scale makes rare errors visible."""
    share, few = confusion / np.maximum(1, confusion.sum(1, keepdims=True)), len(classes) <= 12
    figure, axes = new_figure(*((7, 6) if few else (13, 12)))
    ax = axes[0, 0]
    picture = ax.imshow(share, cmap="cividis", norm=PowerNorm(0.5, 0, 1))
    ax.set_xticks(range(len(classes)), classes, **CLASS_FONT)
    ax.set_yticks(range(len(classes)), classes, **CLASS_FONT)
    if few:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "black" if share[row, column] > 0.3 else "white"
            ax.text(column, row, count or "", ha="center", va="center", color=colour, fontsize=9)
    else:
        ax.tick_params(top=True, labeltop=True, right=True, labelright=True, length=2)
    ax.set(xlabel="predicted", ylabel="true")
    heading = f"{title}: share of each true class" + (" (numbers: images)" if few else "")
    ax.set_title(heading, fontsize=10, parse_math=False)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    figure.colorbar(picture, ax=ax, shrink=0.7, ticks=ticks, format=PercentFormatter(1, 0))
    save_figure(figure, path)


def draw_top_confusions(path, confusion, data, predicted, title, pairs=12, examples=8):
    """The most frequent errors: true class, predicted class, how often, and some of the images."""
    errors, labels = confusion - np.diag(np.diag(confusion)), data.labels["test"].cpu()
    heading = f"{title}, {data.name}: {errors.sum():,} errors in {confusion.sum():,} test images"
    rows = max(1, min(pairs, np.count_nonzero(errors)))
    widths = [3.2] + [1] * examples  # the text, then the images
    figure, grid = new_figure(9.5, 0.85 * rows + 0.5, rows, examples + 1, heading, width_ratios=widths)
    for row, pair in zip(grid, np.argsort(-errors, axis=None, kind="stable").tolist()):
        true, read = divmod(pair, len(data.classes))
        count, seen = errors[true, read], confusion[true].sum()
        names = f"{data.classes[true]} read as {data.classes[read]}"
        text = f"{names}:  {count}  ({count / seen:.0%} of {seen})" if count else "no errors"
        row[0].text(1, 0.5, text, ha="right", va="center", **CLASS_FONT)
        row[0].set_axis_off()
        wanted = ((labels == true) & (predicted == read)).nonzero()[:examples, 0]
        show_images(row[1:], data.images["test"][wanted] if count else [])
    save_figure(figure, path)


def draw_comparison(path, rows, title):
    """Accuracy and macro-F1 against two costs; validation curves."""
    colours = COLOURS * len(rows)
    figure, axes = new_figure(15, 4.6, 1, 3, title)
    costs = {"train_seconds": "training time (s), caches included", "update_budget": "samples seen"}
    for ax, (cost, label) in zip(axes[0], costs.items()):
        for r, colour in zip(rows, colours):
            for key, marker in (("test_accuracy", "o"), ("test_f1_macro", "^")):
                name = r["label"].replace("$", r"\$") if key == "test_accuracy" else None
                ax.plot(r[cost], 100 * r[key], marker, color=colour, ms=8, label=name)
                spot = {"xytext": (9, -4), "textcoords": "offset points", "fontsize": 9}
                ax.annotate(f"{100 * r[key]:.1f}", (r[cost], 100 * r[key]), **spot)
        finish_axes(ax, xlabel=label, ylabel="test set (%): ● accuracy, ▲ macro-F1")
        values = [r[cost] for r in rows]
        least, most = min(values), max(values)
        if most > 20 * least > 0:
            ax.set(xscale="log", xlim=(least / 2, 2 * most))
            ax.xaxis.set_major_formatter("{x:,.0f}")
        else:
            ax.set_xlim(0, 1.2 * most)
        ax.margins(y=0.15)
    for r, colour in zip(rows, colours):
        curve = [100 * accuracy for accuracy in r["val_accuracies"]]
        axes[0, 2].plot(range(1, len(curve) + 1), curve, "o-", color=colour, ms=4)
    finish_axes(axes[0, 2], xlabel="epoch", ylabel="validation accuracy (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(rows)))
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------- prediction


def open_picture(path):
    """A grey Image, upright, longer side 200 to 800 px, without transparency.

    Raises InputError if it is not an image, is damaged, too large or too thin.
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
                raise InputError(f"{w} x {h} pixels: more than 64 million, or one side 50 times the other")
            picture.draft("RGB", (800, 800))  # a JPEG is decoded at a half, a quarter or an eighth
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":  # 16 bits or more, often not all in use; convert() would clip them
                deep = np.nan_to_num(np.asarray(picture, np.float32), posinf=0).clip(0)
                picture = Image.fromarray(deep / max(deep.max(), 1e-9) * 255).convert("L")
            side = min(max(200, *picture.size), 800)
            picture = ImageOps.contain(picture.convert("RGBA"), (side, side))
            # what is transparent is paper: black if the ink is light
            grey, alpha = (part / 255 for part in np.moveaxis(np.asarray(picture.convert("LA")), 2, 0))
            ink = alpha > 0.5
            light = ink.mean() < 0.5 and (grey[ink] < 0.4).sum() < 0.01 * ink.sum()  # else a sticker
            paper = Image.new("RGBA", picture.size, "black" if light else "white")
            return Image.alpha_composite(paper, picture).convert("L")
    except Exception as e:  # Pillow's readers throw whatever a damaged file leads to
        raise InputError(f"{path} can't be read ({hint}{one_line(e, 120)})") from e


def above_paper(grey):
    """How much darker each pixel [H, W] is than the paper around it, 0 to 1; lighter, if the ink is light."""
    width = min(grey.shape) * 6 // 100 + 1
    border = np.ones(grey.shape, bool)
    border[width:-width, width:-width] = False
    # ink deviates most: a positive skew means light ink. The margin is for cropped pictures; its brightness
    # is halfway from border to picture, as the border may be ink, or a table around the sheet
    margin = (grey[border].mean() + grey.mean()) / 2
    padded = np.pad(grey, 16, constant_values=margin)
    if ((padded - ndimage.uniform_filter(padded, 101)) ** 3).sum() > 0:
        grey = 255 - grey  # light ink
    grey = ndimage.gaussian_filter(grey, 1)  # less sensor noise
    paper = ndimage.grey_closing(grey, 61)  # wider than any stroke: what is left is paper, with its shadows
    return 1 - grey / paper.clip(1)


def otsu(values):
    """The threshold that maximises the variance between the two classes (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    n, total = counts.cumsum(), (counts * edges[1:]).cumsum()  # of the values up to each threshold
    # n · (N - n) · (difference of the two means)², but for a factor
    between = (total[-1] * n - total * n[-1]) ** 2 / (n * (n[-1] - n)).clip(1)
    return edges[1:][between.argmax()]


def crop_to_sheet(picture):
    """A grey Image cropped to the sheet of paper in it, what is around the sheet painted like paper.

    Unchanged if it shows no sheet: a light rectangle with marks on it, away from the picture's edge. Marks
    are smaller than the holes of a light B or D.
    """
    grey = ndimage.gaussian_filter(np.asarray(ImageOps.contain(picture, (200, 200)), np.float32), 1)
    light = grey > otsu(grey)
    labels, count = ndimage.label(light)
    if not count:
        return picture
    sheet = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    filled = ndimage.binary_fill_holes(sheet)
    rows, columns = ndimage.find_objects(filled.astype(int))[0]
    box = np.array([columns.start, rows.start, columns.stop, rows.stop])
    inside = (box[:2] > 0).all() and (box[2:] < filled.shape[::-1]).all()
    # of the boxes around it in all directions, a rectangle fills the smallest
    (y, x), a = filled.nonzero(), np.radians(np.arange(0, 90, 3))[:, None]
    width = np.ptp(x * np.cos(a) + y * np.sin(a), 1) + 1
    height = np.ptp(y * np.cos(a) - x * np.sin(a), 1) + 1
    area, marks = filled.sum(), (filled & ~light).sum()
    rectangle = area > 0.08 * filled.size and area > 0.9 * (width * height).min()
    if not (inside and rectangle and 0.003 < marks / area < 0.2):
        return picture
    mask = Image.fromarray(ndimage.binary_erosion(filled, iterations=3)).resize(picture.size)
    paper = Image.new("L", picture.size, int(np.median(grey[sheet])))
    corners = (box * max(picture.size) / 200).astype(int).tolist()
    return Image.composite(picture, paper, mask).crop(corners)


def choose_parts(mask):
    """(Mask of the connected parts of a mask [H, W] that form the character, a warning or None)."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    top, left, bottom, right = np.array([(y.start, x.start, y.stop, x.stop) for y, x in boxes]).T
    height, size = bottom - top, np.maximum(bottom - top, right - left)
    area = np.bincount(labels.ravel())[1:]
    # table, ruled line and punched hole reach the edge of the picture
    wanted = (top > 0) & (left > 0) & (bottom < mask.shape[0]) & (right < mask.shape[1])
    warning = None
    if not (wanted & (size > 8)).any():  # apart from specks, everything touches the edge
        wanted[:], warning = True, "the character touches the edge"
    main = np.where(wanted, area, 0).argmax()
    frame = (top < top[main]) & (left < left[main]) & (bottom > bottom[main]) & (right > right[main])
    beside = np.maximum(left - right[main], left[main] - right)  # the gap, negative where they overlap
    above = np.maximum(top - bottom[main], top[main] - bottom)
    as_large = (height > 0.5 * height[main]) & (area > 0.25 * area[main])
    other = wanted & ~frame & as_large & (np.maximum(beside, above) > 0.08 * height[main])
    if other.any():
        warning = "several characters; the largest was read"
    near = np.maximum(beside, above) < 0.5 * size[main]  # as the dot of an i
    wanted &= near & ~frame & ~other & (area > 0.05 * area[main])  # anything smaller: a speck
    return np.isin(labels, np.flatnonzero(wanted) + 1), warning


def find_ink(picture, name, small=60):
    """(The character in a grey Image, as a square one, light on dark; a warning or None).

    Raises InputError, naming the picture, if nothing stands out from the paper. The numbers here and in
    choose_parts() were chosen on the photographs that tests.py makes (report/LOG.md).
    """
    dark = above_paper(np.asarray(ImageOps.contain(picture, (200, 200)), np.float32))
    threshold = otsu(dark)
    ink, paper = dark[dark > threshold], dark[dark <= threshold]
    rise = ndimage.morphological_gradient(dark, 9).max()
    # shading darkens gradually, ink abruptly; noise doesn't split into two classes
    if rise < max(0.1, 0.55 * dark.max()) or ink.mean() - paper.mean() < 3.4 * paper.std():
        raise InputError(f"{name} shows no character: nothing stands out from the paper")
    mask, warning = choose_parts(dark > np.percentile(ink, 98) / 2)  # lines, shadows and forms are paler
    # keep soft edges, as in the training images
    soft = (dark / np.percentile(dark[mask], 90)).clip(0, 1) * ndimage.binary_dilation(mask, iterations=3)
    rows, columns = ndimage.find_objects((soft > 0.1).astype(int))[0]
    side = max(rows.stop - rows.start, columns.stop - columns.start)
    if side < small:  # of the 200 px: once more, closer, with a margin as wide as the character
        ends = np.array([columns.start - side, rows.start - side, columns.stop + side, rows.stop + side])
        box = (ends * max(picture.size) / 200).clip(0, (*picture.size, *picture.size))
        return find_ink(picture.crop(tuple(map(int, box))), name, small=0)[0], warning
    image = Image.fromarray((255 * soft[rows, columns]).astype(np.uint8))
    return ImageOps.pad(image, [max(image.size)] * 2), warning


def read_character(path):
    """A picture's character, placed as in EMNIST: uint8 [28, 28], and a warning or None."""
    square, warning = find_ink(crop_to_sheet(open_picture(path)), path)
    image = np.pad(np.asarray(square.resize((24, 24), Image.Resampling.LANCZOS), np.float32), 2)
    return torch.from_numpy(image * (255 / image.max())).round().byte(), warning


def predict(args):
    """--predict: the five most probable characters of each picture; status 2 if one of them can't be read."""
    model, best = read_best(args.checkpoint)
    classes, size = best["classes"], best["image_size"]
    if best.get("dataset") == "digits":
        print("warning: trained on scikit-learn's small digits, this network often misreads photographs")
    device, status = choose_device(args.device), 0
    model = model.to(device, memory_format=layout(device))
    frozen, head = split_at(model, "fc", choose_amp(args.amp, device))
    head.eval()
    for path in args.predict:
        try:
            image, warning = read_character(path)
        except InputError as e:
            say_error(e)
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
        # args: the command line as it was typed; settings: the same with `auto` and defaults filled in
        self.args, self.settings, self.out = args, args, None
        self.git_commit = git_commit()  # of the code that runs: the checkout may move on
        self.data_checksum = None
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
        self.stop_asked = False
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
        elif self.main and not self.live and since > 20:  # plus the current batch: at most 30 s between lines
            self.say(text(*args))

    def from_rank0(self, key, work):
        """What work() returns on rank 0, on every rank. The others ask every second and don't wait in a
        collective: nothing has been saved yet, so a signal must end them, and a download may take long."""
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
        """Called between batches: save() when a checkpoint is due; save(), then Stopped after a signal. All
        ranks agree on both."""
        due = time.monotonic() > self.saved_at + 60 * self.args.checkpoint_minutes
        stop, due = self.stop_asked, due or self.stop_asked
        if self.world > 1:
            agreed = torch.tensor([stop, due], dtype=torch.uint8)  # on the CPU: a GPU is not waited for
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            stop, due = agreed.tolist()
        if due:
            save()
        if stop:
            self.share(None)  # wait for rank 0: if another exits first, torchrun kills it while it saves
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
        hint = "use auto, bf16 or off (and a new --out, if the run was begun in fp16)"
        raise InputError(f"--amp fp16 needs a CUDA device, this is {device.type}: {hint}")
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
    threads = torch.get_num_threads()
    return f"{name} ({threads} thread)" if threads == 1 else f"{name} ({threads} threads)"


def git_commit():
    """Short hash of the code's commit; GIT_COMMIT names it for a copy outside of a checkout."""
    call = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        given = os.environ.get("GIT_COMMIT")
        return given or subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


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
    lines, v2 = [], ("", "memory.max", "memory.current", "inactive_file")
    v1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with contextlib.suppress(OSError):
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    for kinds, path in (line.split(":", 2)[1:] for line in lines):
        if kinds and "memory" not in kinds.split(","):
            continue
        mount, limit, used, cache = v1 if kinds else v2
        group = system / "sys/fs/cgroup" / mount / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the limit reads 'max' where there is none
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))  # the kernel can reclaim these


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


def pace_line(what, done, total, began, first=0):
    rate = (done - first) / max(1e-9, time.monotonic() - began)
    return f"{what}: {done:,}/{total:,} images | {rate:,.0f} images/s | eta {duration((total - done) / rate)}"


def out_of_memory(error):
    """Whether the CPU's or a GPU's memory has run out; some of these errors are plain RuntimeErrors."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)


def not_the_files_fault(error):
    """Whether reading a file failed for another reason than its content: it must not be taken for damaged."""
    gpu = type(error).__name__ == "AcceleratorError"  # which torch 2.6 does not have
    return gpu or isinstance(error, OSError) or out_of_memory(error)


def one_line(error, limit=160):
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def say_error(text):
    # on a terminal, a progress line may stand where this goes
    print(("\r\033[K" if sys.stderr.isatty() else "") + f"error: {text}", file=sys.stderr, flush=True)


def banner(text):
    print("!" * 100 + f"\n{text}\n" + "!" * 100, flush=True)


@contextlib.contextmanager
def download(what, url, folder, flag, offline):
    """Around a download into a folder: one process at a time, a line every 20 seconds, and a silent server
    does not hang the run. DownloadError for the network's errors, InputError for those of the folder."""
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
        # the errno of a URLError is None; an SSLError has one of its own numbering
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
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
}


def tensors_checksum(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy() if tensor.dim() else b"")
    return digest.hexdigest()[:16]


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
        rest = "; the previous version is intact" if path.exists() else ""
        raise RunFailed(f"{path} can't be written ({e.strerror}){rest}") from e


def write_json(path, content):
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def save_tensors(path, content, keep=False):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer(), keep)


def read_tensors(path):
    """torch.load of plain tensors and numbers; also verifies an archive's checksums, unlike torch.load."""
    content = Path(path).read_bytes()
    if not content.startswith(b"\x80\x02"):  # before torch 1.6: a bare pickle, which has no checksums
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum does not match")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def try_read(path, keys):
    """The file's dict, or None with a message if it is torn or damaged or lacks one of the keys.

    Raises the error if it can't be read for other reasons, as it may be whole.
    """
    try:
        content = read_tensors(path)
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it lacks some of {', '.join(keys)}")
        return content
    except Exception as e:  # a torn file raises anything from BadZipFile to UnpicklingError
        if not_the_files_fault(e):
            raise
        print(f"{path} is torn or damaged ({one_line(e, 80)}): not used", flush=True)
        return None


@contextlib.contextmanager
def folder_lock(folder, wait=False):
    """Held until the block or the process ends; the system releases it however that happens."""
    # a lock of its own for downloads: --out and --data-dir may be one folder, and flock would wait for itself
    with open(folder / (".download.lock" if wait else ".lock"), "w") as file:
        try:
            if not fcntl:
                raise OSError(errno.ENOTSUP, "no locks on this system")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise InputError(f"another run is writing into {folder}: name another --out") from e
        except OSError as e:
            print(f"warning: {folder} can't be locked ({e.strerror}): start no other run in it", flush=True)
        yield


def make_folder(name):
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as e:
        raise InputError(f"--out {path} can't be used ({e.strerror})") from e
    return path


def refuse_run_folder(out):
    """Where --compare and --evaluate write, no run may be, as its files would be replaced."""
    if any((out / name).exists() for name in ("args.json", "last.pt", "log.csv")):
        raise InputError(f"--out {out} is a run's own folder: name a new one")


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
            finite = "finite" if below == math.inf else f"below {below:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {f'at least {low}' if value < low else finite}")
        return value

    read.__name__ = "number"
    return read


def build_parser():
    p = Parser(description="Fine-tunes an ImageNet ResNet-18 on EMNIST ByClass, and compares regimes.")
    count, real = number(int, 1, below=2**31), number(float, 0)
    add = p.add_argument_group("data").add_argument
    text = "auto: EMNIST, or scikit-learn's digits if it can't be downloaded (default: %(default)s)"
    add("--dataset", choices=("auto", "emnist", "digits"), default="auto", help=text)
    add("--data-dir", default="data", metavar="DIR", help="folder with EMNIST/raw (default: %(default)s)")
    text = "training + validation images, at least 10; 0: all (default: 0; EMNIST on a CPU: 12000)"
    add("--limit", type=number(int, 0), metavar="N", help=text)
    text = "side in pixels after resizing, at least 32 (default: 224; EMNIST on a CPU: 64)"
    add("--image-size", type=number(int, 32, below=4096), metavar="S", help=text)
    add("--augment", action="store_true", help="random rotation, scale and shift; training set not cached")
    add = p.add_argument_group("training").add_argument
    text = f"any of {', '.join(REGIMES)} (default: linear_probe partial_unfreeze)"
    add("--regimes", nargs="+", default=["linear_probe", "partial_unfreeze"], metavar="REGIME", help=text)
    text = "imagenet, none (random) or a state-dict file (default: %(default)s)"
    add("--weights", default="imagenet", help=text)
    for flag, kind, text in (
        ("--epochs", count, "maximum epochs per stage"),
        ("--batch-size", count, "images per step, over all processes"),
        ("--lr", number(float, 0, above=0, below=1e38), "peak learning rate"),  # float32 ends there
        ("--warmup-epochs", real, "epochs of linear warm-up"),
        ("--patience", count, f"epochs in which val accuracy must gain {100 * MIN_DELTA:g} points"),
    ):
        probe, other = (getattr(stage, flag[2:].replace("-", "_")) for stage in (PROBE, PARTIAL))
        text += f" (default: {probe:g} if only fc trains, else {other:g})"
        add(flag, type=kind, metavar="N" if kind is count else "X", help=text)
    text = "mixed precision; auto: bf16 or fp16 if the hardware has it, else off (default: %(default)s)"
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help=text)
    text = "seeds all randomness (default: %(default)s)"
    add("--seed", type=number(int, 0, below=2**64), default=0, help=text)
    add = p.add_argument_group("run").add_argument
    text = "auto: the first available of cuda, mps, cpu (default: %(default)s)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    add("--deterministic", action="store_true", help="bit-exact repeats, on CUDA too; slower")
    text = "memory in GB, the GPU's or else the CPU's, for layer3's output (default: 70%% of what is free)"
    add("--cache-gb", type=number(float, 0), metavar="GB", help=text)
    text = "maximum time between checkpoints (default: %(default)s)"
    add("--checkpoint-minutes", type=number(float, 0), default=2.0, metavar="MINUTES", help=text)
    text = "results folder; a run in it is resumed (default: results/resnet18-<timestamp>)"
    add("--out", metavar="DIR", help=text)
    add("--dry-run", action="store_true", help="run one batch through every phase")
    add = p.add_argument_group("instead of training").add_argument
    add("--compare", nargs="+", metavar="DIR", help="compare several finished runs; writes to --out")
    text = "test the weights of a best.pt on its run's test set and image size; writes to --out"
    add("--evaluate", metavar="FILE", help=text)
    add("--predict", nargs="+", metavar="IMAGE", help="read pictures or photographs of one character each")
    add("--checkpoint", metavar="FILE", help="best.pt of a run, for --predict")
    return p


def parse_args(argv):
    p = build_parser()
    args = p.parse_args(argv)
    # argparse reads "--seed=--" as a flag without a value; "--out $OUT" may come from an unset variable
    if any(value in ([], "", [""]) for value in vars(args).values()):
        p.error("a flag's value is empty or --")
    if 0 < (args.limit or 0) < 10:
        p.error(f"--limit {args.limit}: {args.limit} is not at least 10 (0: all)")
    args.regimes = [name for text in args.regimes for name in text.split(",") if name]
    wrong = [name for name in args.regimes if name not in REGIMES or args.regimes.count(name) > 1]
    if wrong or not args.regimes:
        named = f"{wrong[0]} is unknown or repeated" if wrong else "none given"
        p.error(f"--regimes: {named}; choose from {', '.join(REGIMES)}")
    if (args.predict is None) != (args.checkpoint is None):
        p.error("--predict IMAGE... and --checkpoint FILE go together")
    if sum(bool(x) for x in (args.compare, args.evaluate, args.predict)) > 1:
        p.error("--compare, --evaluate and --predict exclude each other")
    return args


FREE = {"device", "data_dir", "cache_gb", "checkpoint_minutes", "out"}  # may differ when a run is continued
# in args.json: what `auto` and the defaults came to
RESOLVED = {"dataset", "dataset_flag", "data_checksum", "weights", "weights_flag", "weights_checksum"}
RESOLVED |= {"limit", "image_size", "amp"}
BEFORE = {"code", "commit", "resnet18.py"}  # what a batch job may put into OUT before the first start


def open_out(args, stack):
    """Makes, checks and locks OUT; returns it and what an earlier start left in args.json, or None."""
    out = make_folder(args.out or f"results/resnet18-{datetime.now():%Y%m%d-%H%M%S}")
    path = out / "args.json"
    files = sorted(p.name for p in out.iterdir() if p.name[0] != "." and p.name not in BEFORE)
    if files and not path.exists() and files != ["samples.png"]:
        names = ", ".join(files[:3])
        raise InputError(f"--out {out} holds other files ({names}) and no args.json: name a new folder")
    try:
        stack.enter_context(folder_lock(out))
        return out, read_args(path, args) if path.exists() else None
    except OSError as e:
        raise InputError(f"--out {out} can't be used ({e.strerror})") from e


def read_args(path, args):
    """args.json of an earlier start; InputError if it is damaged or of other arguments than now."""
    new = dict(vars(args))
    try:
        before = json.loads(path.read_bytes())
        old = before["arguments"]
        if before["checksum"] != checksum(before):
            raise ValueError("its checksum does not match")
        if missing := RESOLVED - before.keys():
            raise KeyError(*missing)
        differ = [k for k, v in new.items() if k not in FREE and old.get(k) != v]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is damaged or not of this script ({one_line(e)}): name a new --out") from e
    if differ:
        words = [f"--{k.replace('_', '-')} was {typed(old.get(k))}, now {typed(new[k])}" for k in differ]
        text = f"{'; '.join(words)}; for these, name a new --out (in a job: OUT_DIR)"
        raise InputError(f"--out {path.parent} holds a run with other arguments: {text}")
    return before


def typed(value):
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def say_how_to_continue(run):
    """Prints the command that continues this run; in a batch job, run_resnet.sbatch does."""
    script, *words = sys.argv
    if Path(script).parent == run.out / "code":  # the copy that a batch job runs
        return
    out = [] if run.args.out else [f"--out={run.out}"]
    start, per_node = ["python"], os.environ.get("LOCAL_WORLD_SIZE")  # which torchrun sets
    if per_node and run.world > int(per_node):
        run.say(" ".join(["continue with: the same command on every machine", *out]))
        return
    if per_node:
        start = ["torchrun", f"--nproc-per-node={per_node}"]
    run.say("continue with: " + shlex.join([*start, script, *words, *out]))


def load_inputs(run, before):
    """(data, weights, resolved: what `auto` and the defaults came to). A resumed run takes that from
    args.json, so that another machine doesn't change it."""
    args, known = run.args, before or {}
    data = load_data(known.get("dataset_flag", args.dataset), args.data_dir)
    run.data_checksum = data.checksum()
    default = CPU_RUN if run.device.type == "cpu" and data.name != "digits" else FULL_RUN
    given = {k: getattr(args, k) for k in default if getattr(args, k) is not None}
    resolved = {k: known.get(k, given.get(k, value)) for k, value in default.items()}
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
    # what a run is continued with must be what it began with, not other files under the same names
    resolved["weights_checksum"] = tensors_checksum((weights or {}).values())
    resolved["data_checksum"] = run.data_checksum
    resolved["dataset_flag"] = "digits" if data.name == "digits" else "emnist"
    changed = [f"{k} was {known[k]}, now {v}" for k, v in resolved.items() if before and known[k] != v]
    if changed:
        raise InputError(f"--out {run.out} can't be resumed: {'; '.join(changed)}")
    return data, weights, resolved


def check_batch_sizes(settings, n, world):
    """Every process needs an image in every step, and BatchNorm two values per channel: at 32 px layer4's
    maps are single pixels."""
    for name in settings.regimes:
        for stage in stages_of(name, settings):
            smallest = n // math.ceil(n / stage.batch_size) // world
            if smallest < (2 if stage.trains != "fc" and settings.image_size == 32 else 1):
                raise InputError(f"--batch-size: only {smallest} images per process and step, too few")


def load_in_turn(run, before):
    """load_inputs() on rank 0, which downloads what is missing, then on the others: on another machine the
    first to take the lock downloads. Writes args.json."""
    data = weights = None

    def load():
        nonlocal data, weights
        data, weights, resolved = load_inputs(run, before)
        return resolved  # only this goes to the other processes

    resolved = run.from_rank0("inputs", load)
    if not run.main:
        data, weights, _ = load_inputs(run, resolved)
    if run.main and not before:
        draw_samples(run.out / "samples.png", data)
        content = {"arguments": vars(run.args), **resolved, "git_commit": run.git_commit}
        content["torch"] = torch.__version__
        write_json(run.out / "args.json", content | {"checksum": checksum(content)})
    return data, weights, resolved["weights"]


def finished_rows(out, regimes, before):
    """(a finished regime's metrics.json, else None, for each; the comparison's sentence, if all is done)."""
    rows = [None] * len(regimes)
    for k, path in enumerate(out / name / "metrics.json" for name in regimes):
        if before and path.exists():
            try:
                rows[k] = read_metrics(path)
                best, last = path.with_name("best.pt"), path.with_name("last.pt")
                if last.exists() and not (best.exists() and try_read(best, ["model"])):
                    rows[k] = None  # last.pt has the weights: resume() writes best.pt again
            except ValueError as e:
                print(f"{path} is damaged ({one_line(e)}): the test is done again", flush=True)
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
    run.say(f"{recipe} | {device_name(run.device)} | torch {torch.__version__} | processes: {run.world}")
    if run.world > 1 and run.device.type == "cpu" and run.args.regimes != ["linear_probe"]:
        run.say("each process's BatchNorm sees only its share of a step; its statistics are averaged")
    data.to(run.device)
    todo = [name for name, row in zip(names, rows) if row is None]
    if run.main and todo:  # what an earlier start may have written of these
        for path in ("comparison.json", *(f"{name}/metrics.json" for name in todo)):
            (run.out / path).unlink(missing_ok=True)
    for name in todo:
        rows[names.index(name)] = run_regime(run, name, data, weights, weights_name, todo)
    run.poll()
    ignore_signals()  # a second or two to the end
    if run.main:
        # before the comparison: with it, the run counts as done, and after a kill nobody would come back
        shutil.rmtree(run.out / "features", ignore_errors=True)
        text = write_comparison(run.out, rows)
        run.say(f"\n{text}\nresults in {run.out}")


def run_training(args):
    """Training from the command line to the last line; exit status 0, 1, or 75 after a saved stop."""
    run = Run(args)
    with contextlib.ExitStack() as stack:
        if run.world > 1:
            # not after an error: NCCL would wait for the others, and no message would be printed
            stack.push(lambda error, *_: None if error else dist.destroy_process_group())
        run.out, before = run.from_rank0("out", lambda: open_out(args, stack))
        rows, sentence = run.from_rank0("finished", lambda: finished_rows(run.out, args.regimes, before))
        if sentence:
            run.say(f"all is done in {run.out}: {sentence}")
            run.poll()  # wait: this process may run the store, which the others ask once a second
            return 0
        say_how_to_continue(run)
        inputs = load_in_turn(run, before)
        run.catch_signals()
        try:
            train_all(run, *inputs, rows)
            return 0
        except Stopped:
            ignore_signals()
            run.say("stopped: everything is saved")
            say_how_to_continue(run)
            return 75


def failure(error):
    """One line on stderr for what a user can fix; anything else keeps its traceback."""
    text = one_line(error, 400)
    if out_of_memory(error):
        text = "out of memory: continue with --cache-gb 0, or take a smaller --batch-size and a new --out"
    elif isinstance(error, Diverged):
        text = f"{error}: try a smaller --lr, with a new --out"
    elif isinstance(error, RunFailed):
        text = str(error)
    elif isinstance(error, OSError):
        pass
    elif "gloo" in text.lower() or "nccl" in text.lower() or isinstance(error, dist.DistError):
        text = f"another process of this run ended, or the connection to it was lost ({text})"
    else:
        raise error
    say_error(text)
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
        say_error(e)
        return 2
    except OSError as e:
        # usually from a print: the pipe's reader has exited, as `head` does, or a disk is full; without this
        # line the interpreter complains when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141 if isinstance(e, BrokenPipeError) else failure(e)  # 141: as a shell shows SIGPIPE
    except (RuntimeError, MemoryError) as e:
        return failure(e)


if __name__ == "__main__":
    status = main()
    ignore_signals()  # the results are there, or the state is saved
    sys.exit(status)
