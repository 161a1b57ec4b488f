"""Tests of both scripts on random tensors and small made-up data: no network, nothing left behind.

    python tests.py                       # all of them; each prints what it measured
    python tests.py Conv test_gradients   # those whose class or name begins so
    python tests.py bench                 # tables of speed, pass or fail nothing; `bench cnn` that one alone
    python tests.py soak 50               # resnet18.py killed 50 times at random points, compared bit by bit

The last line is `N passed, N failed, N skipped`; the exit status is 1 if one failed. pytest works as well.

The oracle of a gradient is torch's autograd in float64 on the CPU, with random upstream gradients.
"""

import ast
import contextlib
import csv
import errno
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import cnn_from_scratch as c
import resnet18 as r

# ---------------------------------------------------------------------------------------------- helpers


class Case(unittest.TestCase):
    """A test prints one line of what it measured: self.say(text)."""

    @classmethod
    def setUpClass(cls):
        cls.addClassCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # small tensors: on a busy machine, waiting for a second thread takes longer
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.tmp = Path(folder.name)

    def setUp(self):
        torch.manual_seed(0)
        self.rng = random.Random(0)

    def say(self, text):
        print(f"{type(self).__name__ + '.' + self._testMethodName[5:]:34} {text}", flush=True)

    def within(self, limit, error, text):
        self.say(f"{text}: worst relative error {error:.1e}")
        self.assertLessEqual(error, limit)


def error(got, want):
    """Largest difference relative to the largest entry; infinite for other shapes or what is no number."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    if got.shape != want.shape or got.isnan().any() or not torch.equal(got.isinf(), want.isinf()):
        return math.inf
    if torch.equal(got.isinf() * got.sign(), want.isinf() * want.sign()):  # a pooling's -inf
        got, want = got.nan_to_num(neginf=0, posinf=0), want.nan_to_num(neginf=0, posinf=0)
    off = float((got - want).abs().max()) if want.numel() else 0.0
    return off / float(want.abs().max()) if off else 0.0


def arrange(x, how):
    """x with the same values in another memory order."""
    if how == "contiguous":
        return x.contiguous()
    if how == "sliced":  # every second entry of something larger
        larger = x.new_full([2 * n + 1 for n in x.shape], math.nan)
        view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if how == "expanded":  # all of the batch is one sample
        return x[:1].expand_as(x)
    order = {"channels last": (0, 2, 3, 1), "batch last": (1, 2, 3, 0), "reversed": (3, 2, 1, 0)}[how]
    order = order if x.dim() == 4 else range(x.dim())[::-1]
    return x.permute(*order).contiguous().permute(*np.argsort(order).tolist())


DENSE = ("contiguous", "channels last", "batch last", "reversed")


def compare(layer, reference, x, g_how="contiguous"):
    """Worst relative error of layer(x) and its gradients against autograd through reference(x, *parameters).

    On the way: nothing that went in is modified.
    """
    params = layer.parameters()
    ideal = [t.detach().cpu().double().contiguous().requires_grad_() for t in (x, *params)]
    want = reference(*ideal)
    g = arrange(torch.randn(want.shape, dtype=x.dtype).to(x.device), g_how)
    want.backward(g.cpu().double())
    before = [t.clone() for t in (x, g, *params)]
    out = layer(x)
    out.g = g
    layer.backward()
    assert all(map(torch.equal, (x, g, *params), before)), "an input was modified"
    assert out.g is g and not any(t.requires_grad for t in (out, x.g, *(p.g for p in params)))
    for t in (x, *params):
        assert t.g.dtype == t.dtype and t.g.device == t.device
        assert t.g.is_contiguous() or not t.is_contiguous(), "x.view(-1) works, x.g.view(-1) does not"
    return max(error(out, want), *(error(t.g, i.grad) for t, i in zip((x, *params), ideal)))


def kind(dtype=torch.float64, device="cpu"):
    return {"dtype": dtype, "device": device}


def linear(n_in, n_out, **where):
    layer = c.Linear(n_in, n_out, **where)
    layer.b.normal_()
    return layer, lambda x, w, b: x @ w + b


def conv(*sizes, stride=1, padding=0, bias=True, **where):
    layer = c.Conv2D(*sizes, stride=stride, padding=padding, bias=bias, **where)
    if bias:
        layer.b.normal_()
    return layer, lambda x, W, b=None: F.conv2d(x, W, b, stride, padding)


def pool(kernel, stride=None, padding=0):
    return c.MaxPool2D(kernel, stride, padding), lambda x: F.max_pool2d(x, kernel, stride, padding)


def size_or_pair(rng, least, most):
    """An int, or a pair, of random size."""
    values = rng.randint(least, most), rng.randint(least, most)
    return values[0] if rng.random() < 0.4 else values


def fitting(rng, kernel, padding, room=7):
    """Random height and width that the kernel fits into, from just so to with room to spare."""
    kernel, padding = c.as_pair("", kernel), c.as_pair("", padding, 0)
    return [max(1, k - 2 * p) + rng.randint(0, room) for k, p in zip(kernel, padding)]


def conv_case(rng, **where):
    """(error, description) of one random convolution."""
    kernel, stride, padding = (size_or_pair(rng, *r) for r in ((1, 4), (1, 3), (0, 2)))
    N, C, O = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4)
    layer, reference = conv(C, O, kernel, stride=stride, padding=padding, bias=rng.random() < 0.7, **where)
    layer.W = arrange(layer.W, rng.choice(DENSE))
    x = torch.randn(N, C, *fitting(rng, kernel, padding), dtype=layer.W.dtype).to(layer.W.device)
    x = arrange(x, rng.choice((*DENSE, "sliced", "expanded")))
    how = rng.choice((*DENSE, "sliced", "expanded"))
    return compare(layer, reference, x, how), (list(x.shape), O, kernel, stride, padding, x.stride(), how)


def pool_case(rng, dtype, device):
    """(error, description) of one random pooling, many with ties or windows of nothing but -inf."""
    kernel, padding = size_or_pair(rng, 1, 4), 0
    stride = None if rng.random() < 0.3 else size_or_pair(rng, 1, 4)
    if rng.random() < 0.5:
        padding = tuple(rng.randint(0, k // 2) for k in c.as_pair("", kernel))
    layer, reference = pool(kernel, stride, padding)
    x = torch.randn(rng.randint(1, 4), rng.randint(1, 3), *fitting(rng, kernel, padding), dtype=dtype)
    x = x.round() if rng.random() < 0.5 else x
    x = x.masked_fill(torch.rand(x.shape) < rng.choice((0, 0.3, 1)), -math.inf)
    x = arrange(x.to(device), rng.choice((*DENSE, "sliced", "expanded")))
    how = rng.choice((*DENSE, "sliced", "expanded"))
    return compare(layer, reference, x, how), (list(x.shape), kernel, stride, padding, x.stride(), how)


def linear_case(rng, **where):
    sizes = rng.randint(1, 9), rng.randint(1, 9)
    layer, reference = linear(*sizes, **where)
    layer.w = arrange(layer.w, rng.choice(("contiguous", "reversed")))
    x = torch.randn(rng.randint(1, 9), sizes[0], dtype=layer.w.dtype).to(layer.w.device)
    x = arrange(x, rng.choice(("contiguous", "reversed", "sliced", "expanded")))
    how = rng.choice(("contiguous", "reversed", "sliced", "expanded"))
    return compare(layer, reference, x, how), (list(x.shape), sizes, x.stride(), how)


def simple_case(layer, reference, rng, dtype, device):
    """One random ReLU or Flatten."""
    shape = [rng.randint(1, 5) for _ in range(rng.choice((2, 4)))]
    x = torch.randn(shape, dtype=dtype).to(device)
    x = x.round() if rng.random() < 0.5 else x  # exact zeros
    x = arrange(x, rng.choice(("contiguous", "reversed", "sliced", "expanded")))
    how = rng.choice(("contiguous", "sliced", "expanded"))
    return compare(layer, reference, x, how), (shape, x.stride(), how)


def relu_case(rng, dtype, device):
    return simple_case(c.ReLU(), F.relu, rng, dtype, device)


def flatten_case(rng, dtype, device):
    return simple_case(c.Flatten(), lambda x: x.flatten(1), rng, dtype, device)


def loss_case(rng, dtype, device):
    """(error, description) of one random cross entropy; half of them with a gradient for the loss."""
    N, classes, scale = rng.randint(1, 9), rng.randint(1, 12), rng.choice((1, 30))
    logits = (scale * torch.randn(N, classes, dtype=dtype)).to(device)
    logits = arrange(logits, rng.choice(("contiguous", "reversed", "sliced")))
    targets = torch.randint(classes, (N,), device=device)
    criterion, before = c.CrossEntropy(), logits.clone()
    loss = criterion(logits, targets)
    g = rng.choice((None, 2.5, torch.tensor(-0.3, dtype=dtype, device=device)))
    if g is not None:
        loss.g = g
    criterion.backward()
    ideal = logits.detach().cpu().double().requires_grad_()
    want = F.cross_entropy(ideal, targets.cpu())
    want.backward(torch.tensor(1 if g is None else float(g), dtype=torch.float64))
    want = float(want.detach())
    assert torch.equal(logits, before) and not loss.requires_grad
    # the difference of near-equal numbers: what counts is its size beside 1/N
    off = float((logits.g.cpu().double() - ideal.grad).abs().max()) * N
    return max(off, abs(float(loss) - want) / max(1, want)), (N, classes, scale, g)


CASES = {
    "linear": linear_case,
    "conv2d": conv_case,
    "relu": relu_case,
    "maxpool2d": pool_case,
    "flatten": flatten_case,
    "cross entropy": loss_case,
}


def worst(case, count, rng, **where):
    """The worst of `count` random cases: (error, description)."""
    return max((case(rng, **where) for _ in range(count)), key=lambda found: found[0])


def small_layers():
    """One of everything, float64, with an input that fits: (layer, reference, input)."""
    x = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    return (
        (*linear(7, 4, **kind()), torch.randn(3, 7, dtype=torch.float64)),
        (*conv(2, 3, (3, 2), stride=(2, 1), padding=1, **kind()), x),
        (*conv(2, 3, 1, bias=False, **kind()), x),
        (c.ReLU(), F.relu, x),
        (*pool(2), x),
        (*pool(1), x),
        (*pool((1, 2), (2, 1)), x),
        (*pool(3, 2, 1), x),
        (c.Flatten(), lambda x: x.flatten(1), x),
    )


def to_torch(model, device="cpu"):
    """torch.nn's net with the weights of build_cnn()."""
    nn, convs, dense = torch.nn, (model.layers[0], model.layers[3]), model.layers[-1]
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, 10)),
    ).to(device, dense.w.dtype)
    with torch.no_grad():
        for ours, theirs in zip(convs, (net[0], net[3])):
            theirs.weight.copy_(ours.W)
            theirs.bias.copy_(ours.b)
        net[-1].weight.copy_(dense.w.t())
        net[-1].bias.copy_(dense.b)
    return net


def step(model, x, targets):
    """Forward, loss, backward: (loss, gradients of the parameters, logits)."""
    criterion, logits = c.CrossEntropy(), model(x)
    loss = criterion(logits, targets)
    criterion.backward()
    model.backward(logits, input_grad=False)
    return loss, [p.g for p in model.parameters()], logits


def write_idx(path, array):
    head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def write_mnist(root, train=400, test=100):
    """Files in MNIST's layout, made from scikit-learn's digits."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = (torch.cat(both).numpy() for both in zip(*c.load_digits()))
    for part, rows in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[rows])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[rows])
    return raw


def call(*argv, script=c):
    """(status, stdout, stderr) of a script's main() in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([str(a) for a in argv])
        except SystemExit as e:  # argparse
            status = e.code
    return status, out.getvalue(), err.getvalue()


def contents(folder):
    """Name, bytes and time of every file."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).iterdir())}


def offline():
    return mock.patch.object(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def same_run(a, b):
    """Whether two run folders hold the same bits but for times and the command."""
    figures, logs = [], []
    for out in (Path(a), Path(b)):
        metrics = json.loads((out / "metrics.json").read_text())
        figures.append({k: v for k, v in metrics.items() if "seconds" not in k and k != "command"})
        rows = csv.DictReader(io.StringIO((out / "log.csv").read_text()))
        logs.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    files = [(Path(out) / "best.pt").read_bytes() for out in (a, b)]
    return figures[0] == figures[1] and logs[0] == logs[1] and files[0] == files[1]


# ---------------------------------------------------------------------------------------------- layers


class SideBySide(Case):
    """Every layer once: the same expression twice, by hand and by torch, with a random upstream gradient."""

    def same(self, *pairs):
        self.within(1e-12, max(error(mine, theirs) for mine, theirs in pairs), f"{len(pairs)} tensors")

    def test_linear(self):
        x, layer = torch.randn(4, 3, dtype=torch.float64), c.Linear(3, 2, **kind())
        tx, tw, tb = (t.clone().requires_grad_() for t in (x, layer.w, layer.b))
        mine, theirs = layer(x), tx @ tw + tb
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad), (layer.w.g, tw.grad), (layer.b.g, tb.grad))

    def test_conv2d(self):
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
        layer = c.Conv2D(3, 4, (3, 2), stride=2, padding=1, **kind())
        tx, tW, tb = (t.clone().requires_grad_() for t in (x, layer.W, layer.b))
        mine, theirs = layer(x), F.conv2d(tx, tW, tb, stride=2, padding=1)
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad), (layer.W.g, tW.grad), (layer.b.g, tb.grad))

    def test_relu(self):
        x, layer = torch.randn(4, 3, dtype=torch.float64), c.ReLU()
        tx = x.clone().requires_grad_()
        mine, theirs = layer(x), F.relu(tx)
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad))

    def test_maxpool2d(self):
        x, layer = torch.randn(2, 3, 7, 6, dtype=torch.float64), c.MaxPool2D(3, stride=2, padding=1)
        tx = x.clone().requires_grad_()
        mine, theirs = layer(x), F.max_pool2d(tx, 3, stride=2, padding=1)
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad))

    def test_flatten(self):
        x, layer = torch.randn(2, 3, 4, 5, dtype=torch.float64), c.Flatten()
        tx = x.clone().requires_grad_()
        mine, theirs = layer(x), tx.flatten(1)
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad))

    def test_cross_entropy(self):
        logits, targets, loss = (
            torch.randn(5, 4, dtype=torch.float64),
            torch.randint(4, (5,)),
            c.CrossEntropy(),
        )
        tlogits = logits.clone().requires_grad_()
        mine, theirs = loss(logits, targets), F.cross_entropy(tlogits, targets)
        loss.backward()
        theirs.backward()
        self.same((mine, theirs), (logits.g, tlogits.grad))


class Gradients(Case):
    """Random sweeps against autograd in float64; every case also checks that inputs stay as they are."""

    def check(self, name, count):
        off, where = worst(CASES[name], count, self.rng, **kind())
        self.say(f"{name}, {count} cases: worst relative error {off:.1e}")
        self.assertLessEqual(off, 1e-12, where)

    def test_linear(self):
        self.check("linear", 200)

    def test_conv2d(self):
        self.check("conv2d", 400)

    def test_relu(self):
        self.check("relu", 200)

    def test_maxpool2d(self):
        self.check("maxpool2d", 400)

    def test_flatten(self):
        self.check("flatten", 100)

    def test_cross_entropy(self):
        self.check("cross entropy", 300)

    def test_ties(self):
        """Constant input, and what a ReLU leaves: each window's first maximum gets all of the gradient."""
        off, count = 0.0, 0
        images = [torch.full((2, 3, 8, 9), value) for value in (0, 1, -math.inf)]
        images.append(torch.randn(2, 3, 8, 9).clamp_min(0))
        for sizes in ((2, None, 0), (3, 2, 1), (3, 1, 1), ((2, 3), (1, 2), (1, 0)), (4, 3, 2)):
            for x, how in itertools.product(images, (*DENSE, "sliced")):
                off = max(off, compare(*pool(*sizes), arrange(x.double(), how)))
                count += 1
        self.within(1e-12, off, f"{count} poolings of equal numbers, -inf among them")

    def test_rest_of_stride(self):
        """Rows and columns that no window reaches get zero."""
        off = 0.0
        for size in range(5, 12):
            x = torch.randn(2, 2, size, 16 - size, dtype=torch.float64)
            off = max(off, compare(*pool(2, 3), x), compare(*pool(3, 2), x), compare(*pool(1, 3), x))
            for kernel, stride in ((1, 2), (2, 3), (3, 2), (4, 4)):
                off = max(off, compare(*conv(2, 3, kernel, stride=stride, **kind()), x))
        self.within(1e-12, off, "49 strides that leave a remainder or skip pixels")

    def test_network(self):
        """build_cnn() against torch.nn with the same weights, loss and all."""
        model = c.build_cnn(**kind())
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases not zero
        off = 0.0
        for N in (1, 5, 64):
            x, y = torch.randn(N, 1, 28, 28, dtype=torch.float64), torch.randint(10, (N,))
            net, ideal = to_torch(model), x.clone().requires_grad_()
            want = F.cross_entropy(net(ideal), y)
            want.backward()
            criterion, logits = c.CrossEntropy(), model(x)
            loss = criterion(logits, y)
            criterion.backward()
            model.backward(logits)
            theirs = [p.grad for p in net.parameters()]
            theirs[4] = theirs[4].t()
            pairs = [(p.g, w) for p, w in zip(model.parameters(), theirs)]
            off = max(off, *(error(a, b) for a, b in (*pairs, (loss, want), (x.g, ideal.grad))))
        self.within(1e-12, off, "whole network, batches of 1, 5, 64")

    def test_finite_differences(self):
        """Central differences of (out · g) along random directions of the input and of every parameter."""
        off, h, count = 0.0, 1e-6, 0
        for layer, _, x in small_layers():
            out = layer(x)
            g = out.g = torch.randn_like(out)
            layer.backward()
            for t in (x, *layer.parameters()):
                analytic, held = t.g.clone(), t.clone()
                for _ in range(5):
                    d = torch.randn_like(t)
                    t.copy_(held + h * d)
                    up = float(layer(x).mul(g).sum())
                    t.copy_(held - h * d)
                    down = float(layer(x).mul(g).sum())
                    t.copy_(held)
                    want = float((analytic * d).sum())
                    off = max(off, abs((up - down) / (2 * h) - want) / max(1, abs(want)))
                    count += 1
        self.within(1e-7, off, f"{count} central differences")

    def test_float32(self):
        """Within float32's rounding of float64."""
        found = {n: worst(f, 100, self.rng, **kind(torch.float32))[0] for n, f in CASES.items()}
        self.say(", ".join(f"{name} {off:.0e}" for name, off in found.items()))
        self.assertLess(max(found.values()), 5e-6)

    def test_float32_network(self):
        """The real sizes, where other product kernels work than for the small cases."""
        exact, model = c.build_cnn(**kind()), c.build_cnn(**kind(torch.float32))
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
        off = 0.0
        for N in (1, 64, 640):
            images, y = torch.randint(256, (N, 28, 28), dtype=torch.uint8), torch.randint(10, (N,))
            x = c.to_input(images)
            ours, want = step(model, x, y), step(exact, x.double(), y)
            off = max(off, *(error(a, b) for a, b in zip(ours[1], want[1])), error(ours[2], want[2]))
        self.within(1e-5, off, "float32, batches of 1, 64, 640")


class Devices(Case):
    def on(self, device, dtypes):
        for dtype, limit in dtypes:
            found = {n: worst(f, 60, self.rng, **kind(dtype, device))[0] for n, f in CASES.items()}
            self.say(f"{dtype}: " + ", ".join(f"{name} {off:.0e}" for name, off in found.items()))
            self.assertLess(max(found.values()), limit)

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA device here")
    def test_cuda(self):
        self.on("cuda", ((torch.float64, 1e-12), (torch.float32, 5e-6)))

    @unittest.skipUnless(torch.backends.mps.is_available(), "no MPS device here")
    def test_mps(self):
        self.on("mps", ((torch.float32, 5e-6),))

    def test_defaults(self):
        """As torch.nn: DEVICE and the default dtype, unless told otherwise."""
        made = []
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                made += [(dtype, p) for p in (*c.Linear(2, 3).parameters(), *c.Conv2D(1, 2, 3).parameters())]
                made += [(dtype, p) for p in c.build_cnn().parameters()]
            finally:
                torch.set_default_dtype(torch.float32)
        self.assertTrue(all(p.dtype == dtype and p.device.type == c.DEVICE.type for dtype, p in made))
        self.assertEqual(c.DEVICE.type, "cuda" if torch.cuda.is_available() else "cpu")
        told = c.build_cnn("cpu", torch.float64).parameters()
        self.assertTrue(all(p.dtype == torch.float64 and p.device.type == "cpu" for p in told))
        self.say(f"{len(made)} parameters follow default dtype and {c.DEVICE}")


class Layers(Case):
    def test_shapes(self):
        """Outputs and parameters; MNIST's net layer by layer."""
        shapes, x = [], torch.randn(5, 1, 28, 28).to(c.DEVICE)
        model = c.build_cnn()
        for layer in model.layers:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
        want = [(8, 28, 28), (8, 28, 28), (8, 14, 14), (16, 14, 14), (16, 14, 14), (16, 7, 7), (784,), (10,)]
        self.assertEqual((shapes, len(x)), (want, 5))
        held = [tuple(p.shape) for p in model.parameters()]
        self.assertEqual(held, [(8, 1, 3, 3), (8,), (16, 8, 3, 3), (16,), (784, 10), (10,)])
        self.assertEqual(sum(p.numel() for p in model.parameters()), 9098)
        self.assertIsNone(c.Conv2D(1, 2, 3, bias=False).b)
        self.say("9,098 parameters, eight layers as specified")

    def test_empty_batch(self):
        """Passes through as in torch: outputs [0, ...], parameter gradients of zeros, loss not a number."""
        for layer, reference, x in small_layers():
            x = x[:0]
            self.assertEqual(compare(layer, reference, x), 0)
            self.assertTrue(all(bool((p.g == 0).all()) for p in layer.parameters()))
        model, y = c.build_cnn(**kind()), torch.zeros(0, dtype=torch.long)
        loss, gradients, logits = step(model, torch.randn(0, 1, 28, 28, dtype=torch.float64), y)
        self.assertEqual((tuple(logits.shape), math.isnan(loss)), ((0, 10), True))
        self.assertTrue(math.isnan(F.cross_entropy(logits, y)))
        self.assertTrue(all(bool((g == 0).all()) for g in gradients))
        self.say("9 layers, whole network: zero gradients; loss nan like torch's")

    def test_large_logits(self):
        """±1e4, each row with another maximum: finite, and equal to float64's."""
        logits = torch.randn(64, 10).mul(1e4)
        logits[:8] += torch.arange(8)[:, None] * 1e4  # one maximum for all rows would underflow here
        y, criterion = torch.randint(10, (64,)), c.CrossEntropy()
        off = 0.0
        for x in (logits, logits.double()):
            loss = criterion(x, y)
            criterion.backward()
            ideal = x.detach().double().requires_grad_()
            want = F.cross_entropy(ideal, y)
            want.backward()
            off = max(off, error(loss, want), error(x.g, ideal.grad))
        self.say(f"loss {float(loss):.1f}, finite, worst relative error {off:.1e}")
        self.assertLess(off, 1e-6)

    def test_target_types(self):
        logits, y = torch.randn(6, 10, dtype=torch.float64), torch.tensor([3, 0, 9, 9, 1, 5])
        names = "uint8 int8 int16 int32 int64 uint16 uint32 uint64".split()
        for name in names:
            criterion = c.CrossEntropy()
            loss = criterion(logits, y.to(getattr(torch, name)))
            criterion.backward()
            if name == "uint8":
                first = float(loss), logits.g
            self.assertEqual(float(loss), first[0])
            self.assertTrue(torch.equal(logits.g, first[1]))
        self.say(f"{', '.join(names)}: the same")

    def test_assigned_not_accumulated(self):
        """A second backward() gives the same numbers, not twice as much; also over stale gradients."""
        for layer, _, x in small_layers():
            out = layer(x)
            out.g = torch.randn_like(out)
            layer.backward()
            first = [t.g.clone() for t in (x, *layer.parameters())]
            layer.backward()
            self.assertTrue(all(torch.equal(t.g, g) for t, g in zip((x, *layer.parameters()), first)))
        logits, criterion = torch.randn(4, 10), c.CrossEntropy()
        criterion(logits, torch.arange(4))
        criterion.backward()
        first = logits.g.clone()
        criterion.backward()
        self.assertTrue(torch.equal(logits.g, first))
        self.say("10 layers, backward() twice: the same gradients")

    def test_perturbed_in_place(self):
        """The same tensors with other numbers: nothing is remembered by identity."""
        off = 0.0
        for layer, reference, x in small_layers():
            off = max(off, compare(layer, reference, x))
            for t in (x, *layer.parameters()):
                t.normal_()
                off = max(off, compare(layer, reference, x))
                with torch.no_grad():
                    t.data.view(-1)[0] += 1e-3
                off = max(off, compare(layer, reference, x))
        self.within(1e-12, off, "9 layers, x and parameters changed in place")

    def test_nothing_held_changes(self):
        """Outputs and gradients that a caller keeps survive later calls of any batch size."""
        count = 0
        for layer, _, x in small_layers():
            kept, copies = [], []
            for n in (3, 3, 1, 7, 3, 0, 3):
                x = torch.randn(n, *x.shape[1:], dtype=x.dtype)
                out = layer(x)
                out.g = torch.randn_like(out)
                layer.backward()
                new = [x, out, out.g, x.g, *layer.parameters(), *(p.g for p in layer.parameters())]
                kept += new
                copies += [t.clone() for t in new]
                count += len(new)
            self.assertTrue(all(map(torch.equal, kept, copies)), type(layer).__name__)
        self.say(f"{count} tensors unchanged by later calls")

    def test_output_is_not_input(self):
        """Writing into an output does not reach the input (Flatten's may be a view, as in torch)."""
        for layer, _, x in small_layers():
            if not isinstance(layer, c.Flatten):
                before = x.clone()
                layer(x).fill_(7)
                self.assertTrue(torch.equal(x, before), type(layer).__name__)
        self.say("8 layers")

    def test_late_backward(self):
        """bwd(out1, x1) after a forward on x2 (same size, other size, same tensor) is still right."""
        off, count = 0.0, 0
        for layer, reference, x1 in small_layers():
            params = layer.parameters()
            for between in (1, 3, 5):
                x2 = torch.randn(between, *x1.shape[1:], dtype=x1.dtype)
                out1, out2 = layer(x1), layer(x2)
                for out, x in ((out1, x1), (out2, x2), (out1, x1)):
                    out.g = torch.randn_like(out)
                    layer.bwd(out, x)
                    ideal = [t.detach().clone().requires_grad_() for t in (x, *params)]
                    reference(*ideal).backward(out.g)
                    off = max(off, *(error(t.g, i.grad) for t, i in zip((x, *params), ideal)))
                    count += 1
        criterion, logits = c.CrossEntropy(), [torch.randn(4, 10).double() for _ in range(2)]
        targets = [torch.randint(10, (4,)) for _ in range(2)]
        losses = [criterion(x, y) for x, y in zip(logits, targets)]
        criterion.bwd(losses[0], logits[0], targets[0])
        ideal = logits[0].clone().requires_grad_()
        F.cross_entropy(ideal, targets[0]).backward()
        off = max(off, error(logits[0].g, ideal.grad))
        self.within(1e-12, off, f"{count + 1} late bwd(out, x)")


class NoAutograd(Case):
    """Nothing of torch's autograd, nor its kernels for these layers, in the script or at work."""

    def test_source(self):
        tree = ast.parse(Path(c.__file__).read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        words, functional = [], set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                words.append(node.attr)
                if isinstance(node.value, ast.Name) and node.value.id == "F":
                    functional.add(node.attr)
            elif isinstance(node, ast.Name):
                words.append(node.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                words += [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            elif isinstance(node, (ast.keyword, ast.arg)):
                words.append(node.arg or "")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                words += re.findall(r"[\w.]+", node.value)
        banned = re.compile(
            r"autograd|requires_grad|enable_grad|grad_fn|^grad$|functorch|^torch\.func|vjp|jvp|_backward|"
            r"backward_|conv\d?d$|conv_|convolution|max_pool|avg_pool|cross_entropy|nll|log_softmax|"
            r"^torch\.optim|^optim$"
        )
        found = sorted({w for w in words if banned.search(w)})
        self.say(
            f"{len(set(words))} names, banned: {found or 'none'}; torch.nn.functional: {sorted(functional)}"
        )
        self.assertEqual(found, [])
        self.assertLessEqual(functional, {"pad", "interpolate"})

    def test_kernels(self):
        """Every kernel that a training step calls, by its name."""
        seen = set()

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        model = c.build_cnn(**kind(torch.float32))
        sgd = c.SGD(model.parameters(), 0.1, 0.9, True, 5e-4)
        with Record():
            step(model, torch.randn(4, 1, 28, 28), torch.arange(4))
            sgd.step()
        banned = sorted(k for k in seen if re.search(r"conv|pool|backward|softmax|nll|entropy|threshold", k))
        self.say(f"{len(seen)} kernels in a step, banned: {banned or 'none'}")
        self.assertEqual(banned, [])
        self.assertGreater(len(seen), 10)

    def test_nothing_requires_grad(self):
        """With autograd on, as it is by default, and with it off: the same, and nothing requires grad."""
        self.assertTrue(torch.is_grad_enabled())
        model = c.build_cnn(**kind())
        x, y = torch.randn(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
        on = step(model, x, y)
        with torch.no_grad():
            off = step(model, x, y)
        for a, b in zip((on[0], *on[1], on[2]), (off[0], *off[1], off[2])):
            self.assertTrue(torch.equal(a, b))
            self.assertFalse(a.requires_grad)
        held = [v for layer in model.layers for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        self.assertFalse(any(t.requires_grad or t.grad_fn is not None for t in held))
        self.say("the same with torch.no_grad()")

    def test_input_requires_grad(self):
        """A checker may hand in a tensor that it also differentiates with autograd."""
        for layer, reference, x in small_layers():
            ideal = x.clone().requires_grad_()
            name = type(layer).__name__
            try:
                out = layer(ideal)
                out.g = torch.randn(out.shape, dtype=out.dtype)
                layer.backward()
            except RuntimeError as e:
                self.fail(f"{name}: {e}")
            self.assertFalse(out.requires_grad, name)
            self.assertFalse(ideal.g.requires_grad, name)
            reference(ideal, *layer.parameters()).backward(out.g)
            self.assertLessEqual(error(ideal.g, ideal.grad), 1e-12)
        self.say("9 layers")


class Model(Case):
    def test_input_grad(self):
        """False leaves the input without a gradient; the parameters' gradients are the same."""
        model, x, y = c.build_cnn(**kind()), torch.randn(5, 1, 28, 28, dtype=torch.float64), torch.arange(5)
        gradients = []
        for wanted in (False, True):
            criterion, logits = c.CrossEntropy(), model(x)
            criterion(logits, y)
            criterion.backward()
            model.backward(logits, input_grad=wanted)
            gradients.append([p.g.clone() for p in model.parameters()])
            self.assertEqual(hasattr(x, "g"), wanted)
        self.assertTrue(all(map(torch.equal, *gradients)))
        self.say("six parameter gradients the same to the bit")

    def test_input_grad_once(self):
        """input_grad=False holds for that one call: the layer by itself gives x.g again."""
        model, x = c.Sequential(c.Conv2D(1, 2, 3, **kind())), torch.randn(2, 1, 5, 5, dtype=torch.float64)
        out = model(x)
        out.g = torch.randn_like(out)
        model.backward(out, input_grad=False)
        layer, again = model.layers[0], x.clone()
        out = layer(again)
        out.g = torch.randn_like(out)
        layer.backward()
        self.assertTrue(hasattr(again, "g"))
        self.say("the layer alone gives x.g afterwards")

    def test_repeated(self):
        """A kept loop of the same model over changing batches: each step as a fresh model would do it."""
        model, count = c.build_cnn(**kind()), 0
        for n in (4, 4, 1, 6, 4):
            x, y = torch.randn(n, 1, 28, 28, dtype=torch.float64), torch.randint(10, (n,))
            fresh = c.build_cnn(**kind())
            for p, q in zip(fresh.parameters(), model.parameters()):
                p.copy_(q)
            a, b = step(model, x, y), step(fresh, x, y)
            self.assertTrue(all(map(torch.equal, (a[0], *a[1]), (b[0], *b[1]))))
            c.SGD(model.parameters(), 0.1).step()
            count += 1
        self.say(f"{count} steps the same to the bit as a fresh model's")

    def test_sgd(self):
        """Ten steps against torch.optim.SGD; the third parameter has no gradient, the second only later."""
        off, settings, kept = 0.0, 0, []
        for momentum in (0, 0.9):
            for nesterov in {False, momentum > 0}:
                for decay in (0, 0.05):
                    ours = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
                    theirs = [p.clone().requires_grad_() for p in ours]
                    keys = dict(momentum=momentum, nesterov=nesterov, weight_decay=decay)
                    a, b = c.SGD(ours, 0.1, **keys), torch.optim.SGD(theirs, 0.1, **keys)
                    for k in range(10):
                        a.lr = b.param_groups[0]["lr"] = 0.1 / (k + 1)
                        for p, q in list(zip(ours, theirs))[: 1 if k < 4 else 2]:
                            p.g = torch.randn_like(p)
                            q.grad = p.g.clone()
                            kept.append((p.g, p.g.clone()))
                        a.step()
                        b.step()
                    self.assertTrue(all(torch.equal(*both) for both in kept))  # gradients stay as they are
                    off = max(off, *(error(p, q) for p, q in zip(ours, theirs)))
                    settings += 1
        self.within(1e-14, off, f"{settings} settings, 10 steps each")

    def test_initial_weights(self):
        """Glorot's uniform limits, with the kernel's area in both fans; biases zero; by seed."""
        reached = []
        for layer, fans in ((c.Conv2D(5, 6, 7), 11 * 49), (c.Linear(300, 200), 500)):
            weight, limit = layer.parameters()[0], math.sqrt(6 / fans)
            reached.append(float(weight.abs().max()) / limit)
            self.assertTrue(0.99 < reached[-1] <= 1)
            self.assertAlmostEqual(float(weight.std()) / limit, 1 / math.sqrt(3), delta=0.02)  # uniform
        models = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            models.append(c.build_cnn().parameters())
        self.assertTrue(all(map(torch.equal, models[0], models[1])))
        self.assertFalse(torch.equal(models[0][0], models[2][0]))
        self.assertTrue(all(bool((b == 0).all()) for b in models[0][1::2]))
        self.say(f"up to {reached[0]:.4f} and {reached[1]:.4f} of the limit")


class Composed(Case):
    """Layers put together as students put them together: right, or refused with a sentence that helps."""

    def compare(self, model, reference, x):
        """Worst relative error of output and gradients against autograd."""
        ideal = [t.detach().clone().requires_grad_() for t in (x, *model.parameters())]
        want, out = reference(*ideal), model(x)
        out.g = torch.randn_like(out)
        want.backward(out.g)
        model.backward(out)
        mine = [t.g for t in (x, *model.parameters())]
        return max(error(out, want), *(error(a, b.grad) for a, b in zip(mine, ideal)))

    def test_course_check(self):
        """The course's own end-to-end check: the second epoch's mean loss is below the first's."""
        first, better = [], 0
        for seed in range(50):
            torch.manual_seed(seed)
            x = torch.randn(128, 1, 28, 28).to(c.DEVICE)
            y = (x.mean((1, 2, 3)) > 0).long()
            model = c.Sequential(
                *(c.Conv2D(1, 4, 3, padding=1), c.ReLU(), c.MaxPool2D(2, 2)),
                *(c.Conv2D(4, 8, 3, padding=1), c.ReLU(), c.MaxPool2D(2, 2)),
                *(c.Flatten(), c.Linear(392, 10)),
            )
            sgd, losses = c.SGD(model.parameters(), 0.01), []
            for rows in 2 * list(torch.arange(128).split(64)):
                losses.append(float(step(model, x[rows], y[rows])[0]))
                sgd.step()
            first.append(sum(losses[:2]) / 2)
            better += sum(losses[2:]) < sum(losses[:2])
        self.say(f"{better} of 50 seeds; first epoch's loss {np.mean(first):.2f}, at most {max(first):.2f}")
        self.assertEqual(better, 50)
        self.assertLess(np.mean(first), 2.4)

    def test_shared_layers(self):
        """A layer without parameters in several places, at different widths and sizes."""
        relu, halve, flatten = c.ReLU(), c.MaxPool2D(2), c.Flatten()
        convs = [conv(a, b, 3, padding=1, **kind())[0] for a, b in ((1, 3), (3, 4))]
        model = c.Sequential(
            *(convs[0], relu, halve, convs[1], relu, halve),
            *(flatten, linear(36, 5, **kind())[0], relu, flatten, linear(5, 3, **kind())[0]),
        )

        def reference(x, W1, b1, W2, b2, w3, b3, w4, b4):
            x = F.max_pool2d(F.relu(F.conv2d(x, W1, b1, padding=1)), 2)
            x = F.max_pool2d(F.relu(F.conv2d(x, W2, b2, padding=1)), 2)
            return F.relu(x.flatten(1) @ w3 + b3) @ w4 + b4

        x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
        self.within(1e-12, self.compare(model, reference, x), "ReLU three times, MaxPool2D and Flatten twice")

    def test_shared_parameters(self):
        """A layer with parameters in two places is refused, in a nested Sequential too."""
        layer, twin = c.Linear(4, 4, **kind()), c.Linear(4, 4, **kind())
        twin.w = layer.w
        x = torch.randn(2, 4, dtype=torch.float64)
        for model in (
            c.Sequential(layer, c.ReLU(), layer),
            c.Sequential(layer, c.Sequential(c.ReLU(), layer)),
            c.Sequential(layer, twin),
        ):
            with self.assertRaisesRegex(ValueError, "twice; make a layer for each place") as caught:
                model(x)
        self.say(str(caught.exception))

    def test_nested(self):
        """A Sequential in a Sequential, first, in the middle and last; input_grad reaches its first layer."""
        a, b, d = (linear(4, 4, **kind())[0] for _ in range(3))
        inner = c.Sequential(c.Sequential(a, c.ReLU()), b)
        model = c.Sequential(inner, c.Sequential(), c.Sequential(c.ReLU(), d))

        def reference(x, wa, ba, wb, bb, wd, bd):
            return F.relu(F.relu(x @ wa + ba) @ wb + bb) @ wd + bd

        x = torch.randn(3, 4, dtype=torch.float64)
        off = self.compare(model, reference, x)
        del x.g
        out = model(x)
        out.g = torch.ones_like(out)
        model.backward(out, input_grad=False)
        self.assertFalse(hasattr(x, "g"))
        self.within(1e-12, off, "three deep")

    def test_not_the_last_output(self):
        """backward() of an earlier output, of a nested one's, of a copy: refused."""
        model, x = c.Sequential(c.Linear(3, 2, **kind()), c.ReLU()), torch.randn(2, 3, dtype=torch.float64)
        first, second = model(x), model(x + 1)
        for out in (first, second.clone(), model.layers[0].out):
            out.g = torch.ones_like(out)
            with self.assertRaisesRegex(RuntimeError, "not the output of the last call"):
                model.backward(out)
        second.g = torch.ones_like(second)
        model.backward(second)
        self.say("three refused, the last one's is right")

    def test_failed_backward(self):
        """A backward() that fails leaves no layer without the gradient of its input."""
        model, x = c.Sequential(c.Linear(3, 2, **kind()), c.ReLU()), torch.randn(2, 3, dtype=torch.float64)
        out = model(x)
        out.g = torch.ones(5)
        with self.assertRaises(ValueError):
            model.backward(out, input_grad=False)
        out.g = torch.ones_like(out)
        model.layers[1].backward()
        model.layers[0].backward()
        self.assertTrue(hasattr(x, "g"))
        self.say("x.g is there again")

    def test_reordered(self):
        """Pooling before ReLU: equal to the order as written, bit for bit, out and back."""
        count = 0
        for kernel, stride, padding in (
            (2, None, 0),
            (3, 2, 1),
            (3, 1, 1),
            ((1, 3), (2, 1), (0, 1)),
            (1, 1, 0),
        ):
            for x in (
                torch.randn(2, 3, 8, 9),
                torch.randn(2, 3, 8, 9).round(),
                torch.full((2, 3, 8, 9), -math.inf),
            ):
                outcomes = []
                for reorder in (True, False):
                    model, image = (
                        c.Sequential(c.ReLU(), c.MaxPool2D(kernel, stride, padding), reorder=reorder),
                        x.clone(),
                    )
                    out = model(image)
                    torch.manual_seed(1)
                    out.g = torch.randn_like(out)
                    model.backward(out)
                    outcomes.append((out, image.g))
                self.assertTrue(all(map(torch.equal, *outcomes)), (kernel, stride, padding))
                count += 1
        ran = [type(layer).__name__ for layer in c.build_cnn().run_order()]
        self.assertEqual(ran, "Conv2D MaxPool2D ReLU Conv2D MaxPool2D ReLU Flatten Linear".split())
        written = c.Sequential(c.ReLU(), c.MaxPool2D(2), reorder=False)
        self.assertEqual(written.run_order(), written.layers)

        class Leaky(c.ReLU):
            """Not monotone enough to be moved."""

        self.assertEqual(
            [type(m) for m in c.Sequential(Leaky(), c.MaxPool2D(2)).run_order()], [Leaky, c.MaxPool2D]
        )
        self.say(f"{count} poolings the same to the bit; a subclass of ReLU stays where it is")

    def test_outputs_are_plain_tensors(self):
        """No attribute of ours hides a method of torch's."""
        methods, x = set(dir(torch.Tensor)), torch.randn(2, 1, 6, 6).to(c.DEVICE)
        for layer in (c.Conv2D(1, 2, 3), c.MaxPool2D(2), c.ReLU(), c.Flatten()):
            self.assertFalse(set(vars(layer(x))) & methods, type(layer).__name__)
        self.assertEqual(c.MaxPool2D(2)(x).argmax(1).shape, (2, 3, 3))
        self.say("MaxPool2D(2)(x).argmax(1) works")


class BadLayerInput(Case):
    """ValueError (RuntimeError for a missing step) that says what was given and what is expected."""

    def test_messages(self):
        x, image, loss = torch.randn(2, 3), torch.randn(2, 3, 8, 8), c.CrossEntropy()
        cpu = {"device": "cpu"}
        targets = [
            torch.tensor(t) for t in ([0, 3], [-1, 0], [0.0, 1.0], [0, 1, 2], [[0], [1]], [True, False])
        ]
        cases = (
            (lambda: c.Linear(4, 2, **cpu)(x), "[2, 3]", "4"),
            (lambda: c.Linear(3, 2, **cpu)(image), "[2, 3, 8, 8]", "3"),
            (lambda: c.Linear(3, 2, **cpu)(x[0]), "[3]", "3"),
            (lambda: c.Linear(3, 2, **cpu)(x.double()), "float64", "float32"),
            (lambda: c.Linear(0, 2), "in_features is 0", "at least 1"),
            (lambda: c.Linear(2, -1), "out_features is -1", "at least 1"),
            (lambda: c.Conv2D(4, 2, 3, **cpu)(image), "[2, 3, 8, 8]", "4"),
            (lambda: c.Conv2D(3, 2, 3, **cpu)(image[0]), "[3, 8, 8]", "3"),
            (lambda: c.Conv2D(3, 2, 3, **cpu)(image.double()), "float64", "float32"),
            (lambda: c.Conv2D(3, 2, 3, **cpu)(image.tolist()), "list", "3"),
            (lambda: c.Conv2D(3, 2, 9, **cpu)(image), "(9, 9)", "(8, 8)"),
            (lambda: c.Conv2D(3, 2, (3, 11), padding=1, **cpu)(image), "(3, 11)", "(10, 10)"),
            (lambda: c.Conv2D(0, 2, 3), "in_channels is 0", "at least 1"),
            (lambda: c.Conv2D(2, 0, 3), "out_channels is 0", "at least 1"),
            (lambda: c.Conv2D(1, 2, 0), "kernel_size is 0", "at least 1"),
            (lambda: c.Conv2D(1, 2, 2.5), "kernel_size is 2.5", "int"),
            (lambda: c.Conv2D(1, 2, (1, 2, 3)), "kernel_size is (1, 2, 3)", "pair"),
            (lambda: c.Conv2D(1, 2, 3, stride=0), "stride is 0", "at least 1"),
            (lambda: c.Conv2D(1, 2, 3, stride=(1, -1)), "stride is (1, -1)", "at least 1"),
            (lambda: c.Conv2D(1, 2, 3, padding=-1), "padding is -1", "at least 0"),
            (lambda: c.MaxPool2D(0), "kernel_size is 0", "at least 1"),
            (lambda: c.MaxPool2D(2, stride=0), "stride is 0", "at least 1"),
            (lambda: c.MaxPool2D(2, padding=-1), "padding is -1", "at least 0"),
            (lambda: c.MaxPool2D(3, padding=2), "padding 2", "half of the kernel 3"),
            (lambda: c.MaxPool2D((4, 2), padding=(2, 2)), "padding (2, 2)", "half of the kernel (4, 2)"),
            (lambda: c.MaxPool2D(9)(image), "(9, 9)", "(8, 8)"),
            (lambda: c.MaxPool2D(2)(image[0]), "[3, 8, 8]", "any"),
            (lambda: c.Flatten()(x[0]), "[3]", "two dimensions"),
            (lambda: loss(x[0], targets[0]), "[3]", "any"),
            (lambda: loss(image, targets[0]), "[2, 3, 8, 8]", "any"),
            (lambda: loss(x, targets[0]), "0 to 3", "0 to 2"),
            (lambda: loss(x, targets[1]), "-1 to 0", "0 to 2"),
            (lambda: loss(x, targets[2]), "float32", "integer"),
            (lambda: loss(x, targets[3]), "[3]", "[2]"),
            (lambda: loss(x, targets[4]), "[2, 1]", "[2]"),
            (lambda: loss(x, targets[5]), "bool", "integer"),
            (lambda: c.SGD([], -0.1), "lr is -0.1", "at least 0"),
            (lambda: c.SGD([], math.nan), "lr is nan", "at least 0"),
            (lambda: c.SGD([], 0.1, momentum=-1), "momentum is -1", "at least 0"),
            (lambda: c.SGD([], 0.1, weight_decay=-1), "weight_decay is -1", "at least 0"),
            (lambda: c.SGD([], 0.1, nesterov=True), "nesterov", "momentum"),
        )
        for k, (act, given, expected) in enumerate(cases):
            with self.subTest(case=k, given=given):
                with self.assertRaises(ValueError) as caught:
                    act()
                self.assertIn(given, str(caught.exception))
                self.assertIn(expected, str(caught.exception))
        self.say(f"{len(cases)} clear messages, such as {str(caught.exception)!r}")

    def test_steps_out_of_order(self):
        """backward() before a forward, without out.g, with out.g of another shape."""
        for layer, _, x in small_layers():
            with self.assertRaisesRegex(RuntimeError, type(layer).__name__):
                layer.backward()
            out = layer(x)
            with self.assertRaisesRegex(RuntimeError, r"out\.g"):
                layer.backward()
            out.g = torch.randn(1, *out.shape)
            with self.assertRaisesRegex(ValueError, re.escape(str(list(out.shape)))):
                layer.backward()
        with self.assertRaisesRegex(RuntimeError, "CrossEntropy"):
            c.CrossEntropy().backward()
        with self.assertRaisesRegex(RuntimeError, "Sequential"):
            c.build_cnn().backward(torch.randn(2, 10))
        self.say("29 clear messages")


# ---------------------------------------------------------------------------------------------- data


class Data(Case):
    def test_digits(self):
        (images, labels), (test, test_labels) = c.load_digits()
        self.assertEqual((images.shape, test.shape), ((1437, 28, 28), (360, 28, 28)))
        self.assertEqual((images.dtype, labels.dtype, test.dtype), (torch.uint8, torch.int64, torch.uint8))
        again = c.load_digits()[0][0]
        self.assertTrue(torch.equal(images, again))
        self.assertEqual(sorted(set(labels.tolist()) | set(test_labels.tolist())), list(range(10)))
        self.say(f"1,437 and 360 images, levels {int(images.min())} to {int(images.max())}")

    def test_mnist_files(self):
        """What is read is what was written."""
        raw = write_mnist(self.tmp / "data", 50, 20)
        with offline():
            (images, labels), (test, _) = c.load_mnist(self.tmp / "data")
        want = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(
            50, 28, 28
        )
        np.testing.assert_array_equal(images.numpy(), want)
        np.testing.assert_array_equal(
            labels.numpy(), np.frombuffer((raw / "train-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
        )
        self.assertEqual((len(test), labels.dtype), (20, torch.int64))
        self.say("50 and 20 images, as written")

    def test_split(self):
        both = torch.arange(1003), torch.arange(1003)
        train, val = c.split(*both, 0)
        self.assertEqual((len(train[0]), len(val[0])), (903, 100))
        self.assertEqual(len(torch.cat([train[0], val[0]]).unique()), 1003)
        self.assertTrue(torch.equal(*train) and torch.equal(*val))  # images and labels go together
        torch.manual_seed(99)  # the split has a generator of its own
        self.assertTrue(torch.equal(val[0], c.split(*both, 0)[1][0]))
        self.assertFalse(torch.equal(val[0], c.split(*both, 1)[1][0]))
        self.say("903 / 100, disjoint, by its own seed")

    def test_input(self):
        images = torch.randint(256, (7, 28, 28), dtype=torch.uint8)
        x = c.to_input(images)
        off = error(x, (images[:, None].double() / 255 - 0.1307) / 0.3081)
        self.assertEqual((x.dtype, tuple(x.shape), x.stride(0)), (torch.float32, (7, 1, 28, 28), 1))
        self.within(1e-6, off, "scaled, batch innermost")

    def test_batches(self):
        """Every sample once, with its label; moved by at most one pixel, all nine ways; zeros move in."""
        n = 450
        images = torch.zeros(n, 28, 28, dtype=torch.uint8)
        images[torch.arange(n), 3 + torch.arange(n) // 20, 4 + torch.arange(n) % 20] = (
            255  # each its own place
        )
        moves, seen = set(), []
        for shift in (0, 1):
            seen.clear()
            sizes = []
            for x, y in c.batches(images, torch.arange(n), 64, torch.Generator().manual_seed(0), shift):
                rows = (x[:, 0] > 0).nonzero()
                self.assertEqual(len(rows), len(y))
                d = rows[:, 1:] - torch.stack([3 + y // 20, 4 + y % 20], 1)
                self.assertLessEqual(int(d.abs().max()), shift)
                moves |= {tuple(m) for m in d.tolist()}
                sizes.append(len(y))
                seen.extend(y.tolist())
            self.assertEqual((sorted(seen), sizes), (list(range(n)), [64] * 7 + [2]))
            self.assertNotEqual(seen, sorted(seen))
        self.assertEqual(len(moves), 9)
        edge = torch.full((100, 28, 28), 255, dtype=torch.uint8)
        x, _ = next(c.batches(edge, torch.arange(100), 100, torch.Generator().manual_seed(0), 1))
        dark = (c.to_input(edge[:1] * 0).flatten()[0] == x[:, 0]).sum((1, 2))
        self.assertEqual({int(v) for v in dark}, {0, 28, 55})  # unmoved, one side, a corner
        self.say(f"450 samples once each, last batch of 2, {len(moves)} moves")

    def test_learning_rate(self):
        rates = [c.learning_rate(k, 100, 0.3, "onecycle") for k in range(100)]
        top = rates.index(max(rates))
        self.assertAlmostEqual(rates[top], 0.3)
        self.assertTrue(5 <= top < 50 and 0 < rates[-1] < 0.01)
        self.assertTrue(all(a < b for a, b in itertools.pairwise(rates[: top + 1])))
        self.assertTrue(all(a > b for a, b in itertools.pairwise(rates[top + 1 :])))
        for steps in (1, 2, 3):
            few = [c.learning_rate(k, steps, 0.3, "onecycle") for k in range(steps)]
            self.assertTrue(all(0 < r <= 0.3 + 1e-12 for r in few))
        self.assertEqual({c.learning_rate(k, 100, 0.3, "constant") for k in range(100)}, {0.3})
        self.say(f"up to {rates[top]} at {top + 1} of 100 steps, down to {rates[-1]:.4f}")


# ---------------------------------------------------------------------------------------------- training


class Training(Case):
    def test_overfit_one_batch(self):
        images, labels = (t[:64] for t in c.load_digits()[0])
        model, x, losses = c.build_cnn(**kind(torch.float32)), c.to_input(images), []
        sgd = c.SGD(model.parameters(), 0.05, 0.9, True)
        for _ in range(60):
            loss, _, logits = step(model, x, labels)
            sgd.step()
            losses.append(float(loss))
        accuracy = float((logits.argmax(1) == labels).double().mean())
        self.say(f"64 digits, 60 steps: loss {losses[0]:.2f} -> {losses[-1]:.4f}, accuracy {accuracy:.0%}")
        self.assertEqual(accuracy, 1)
        self.assertLess(losses[-1], 0.05)

    def test_epochs(self):
        """Three epochs of the digits through train_epoch(): the loss falls every time."""
        train, test = c.load_digits()
        model, losses = c.build_cnn(**kind(torch.float32)), []
        sgd, generator = c.SGD(model.parameters(), 0, 0.9, True, 5e-4), torch.Generator().manual_seed(0)
        for _ in range(3):
            data = c.batches(*train, 64, generator, 1)
            losses.append(c.train_epoch(model, sgd, data, [0.02] * 23)[0])
        _, accuracy, logits = c.evaluate(model, *test)
        self.assertEqual(losses, sorted(losses, reverse=True))
        self.assertGreater(accuracy, 0.85)
        self.assertEqual(tuple(logits.shape), (360, 10))
        self.say(f"train loss {' '.join(f'{v:.3f}' for v in losses)}, test accuracy {accuracy:.1%}")

    def test_same_as_torch(self):
        """An epoch in float64 against the same loop with torch.nn, autograd and torch.optim: same weights."""
        images, labels = (t[:300] for t in c.load_digits()[0])
        model = c.build_cnn(**kind())
        net = to_torch(model)
        theirs = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
        ours = c.SGD(model.parameters(), 0.05, 0.9, True, 5e-4)
        data = [
            (x.double(), y) for x, y in c.batches(images, labels, 32, torch.Generator().manual_seed(0), 1)
        ]
        loss, _ = c.train_epoch(model, ours, iter(data), [0.05] * len(data))
        total = 0.0
        for x, y in data:
            theirs.zero_grad()
            each = F.cross_entropy(net(x), y)
            each.backward()
            theirs.step()
            total += float(each.detach()) * len(y)
        weights = [p.detach() for p in net.parameters()]
        weights[4] = weights[4].t()
        off = max(error(a, b) for a, b in zip(model.parameters(), weights))
        self.assertAlmostEqual(loss, total / 300, places=10)  # the smaller last batch counts as what it is
        self.within(1e-10, off, f"weights after {len(data)} steps")

    def test_best_is_kept(self):
        """fit() ends with the weights of the best epoch, in the model and in best.pt, whatever came later."""
        args = c.parse(["--epochs", "3", "--batch-size", "64", "--device", "cpu"])
        images, labels = (t[:128] for t in c.load_digits()[0])
        model, seen = c.build_cnn("cpu"), []

        def falling(model, *_):
            seen.append([p.clone() for p in model.parameters()])
            return 1.0, (0.5, 0.9, 0.9)[len(seen) - 1], None  # of equals, the first

        with mock.patch.object(c, "evaluate", falling), contextlib.redirect_stdout(io.StringIO()):
            log = c.fit(model, (images, labels), (images, labels), args, self.tmp)
        weights = torch.load(self.tmp / "best.pt", weights_only=True)
        self.assertEqual([row["best"] for row in log], [1, 1, 0])
        self.assertTrue(all(map(torch.equal, weights.values(), seen[1])))
        self.assertTrue(all(map(torch.equal, model.parameters(), seen[1])))
        self.assertFalse(torch.equal(model.parameters()[0], seen[2][0]))
        self.say("epoch 2 of 3 kept as it was")

    def test_not_a_number(self):
        """The step is named."""
        good, y = torch.randn(2, 1, 28, 28), torch.tensor([0, 1])
        for bad in (1, 3, 10):
            data = ((good * math.nan if k == bad else good, y) for k in range(1, 11))
            model = c.build_cnn(**kind(torch.float32))
            with self.assertRaisesRegex(FloatingPointError, rf"step {bad}\b"):
                c.train_epoch(model, c.SGD(model.parameters(), 0), data, [0.0] * 10)
        self.say("named at steps 1, 3, 10")


# ---------------------------------------------------------------------------------------------- the run


class Run(Case):
    """The command line, in this process, on 400 + 100 images in MNIST's files."""

    FILES = frozenset({".lock", "args.json", "log.csv", "metrics.json", "best.pt", *c.PICTURES})

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.raw = write_mnist(cls.tmp / "data")
        cls.flags = ["--dataset", "mnist", "--data-dir", cls.tmp / "data", "--device", "cpu", "--epochs", 2]
        cls.out = cls.tmp / "made" / "run"  # its parents do not exist
        cls.status, cls.text, cls.errors = call(*cls.flags, "--lr", 0.05, "--out", cls.out)

    def quick(self, *argv):
        """call() without the pictures, which take longer than the rest."""
        with mock.patch.object(c, "save_pictures"):
            return call(*self.flags, *argv)

    def test_files(self):
        self.assertEqual((self.status, self.errors), (0, ""))
        self.assertEqual({p.name for p in self.out.iterdir()}, self.FILES)
        m = json.loads((self.out / "metrics.json").read_text())
        want = dict(dataset="mnist", seed=0, epochs=2, batch_size=64, samples_per_epoch=360)
        want |= dict(trainable_params=9098, torch=torch.__version__)
        self.assertEqual({k: m[k] for k in want}, want)
        self.assertTrue(all(0 <= m[k] <= 1 for k in ("val_accuracy", "test_accuracy")))
        self.assertTrue(0 < m["train_seconds"] < m["total_seconds"] and 0 < m["test_loss"] < 10)
        self.assertTrue(m["device"] and m["git_commit"])
        args = json.loads((self.out / "args.json").read_text())
        self.assertEqual((args["lr"], args["epochs"], args["dataset"]), (0.05, 2, "mnist"))
        rows = list(csv.DictReader(io.StringIO((self.out / "log.csv").read_text())))
        self.assertEqual([row["epoch"] for row in rows], ["1", "2"])
        self.assertEqual(max(float(row["val_accuracy"]) for row in rows), m["val_accuracy"])
        self.assertTrue(all(math.isfinite(float(v)) for row in rows for v in row.values()))
        self.assertIn(f"accuracy {m['test_accuracy']:.2%}", self.text.splitlines()[-1])
        self.say(self.text.splitlines()[-1])

    def test_printed(self):
        """One line per epoch."""
        epochs = [line for line in self.text.splitlines() if line.startswith("epoch ")]
        figures = r"loss \d\.\d{4} acc +[\d.]+% \| "
        line = rf"epoch +\d+/2 \| train {figures}val {figures}lr [\de.-]+ \| "
        self.assertEqual(len(epochs), 2)
        for text in epochs:
            self.assertRegex(text, line)
        self.say(epochs[-1])

    def test_weights(self):
        """best.pt loads with weights_only, and gives the test accuracy that the run reports."""
        weights = torch.load(self.out / "best.pt", weights_only=True)
        self.assertEqual(sum(w.numel() for w in weights.values()), 9098)
        model = c.build_cnn("cpu")
        c.load_weights(self.out / "best.pt", model)
        _, test = c.load_mnist(self.tmp / "data")
        loss, accuracy, _ = c.evaluate(model, *test)
        m = json.loads((self.out / "metrics.json").read_text())
        self.assertEqual(accuracy, m["test_accuracy"])
        self.assertAlmostEqual(loss, m["test_loss"], places=6)
        self.say(f"{', '.join(weights)}: accuracy {accuracy:.2%} again")

    def test_pictures(self):
        sizes = []
        for name in c.PICTURES:
            with Image.open(self.out / name) as picture:
                low, high = picture.convert("L").getextrema()
                self.assertEqual((picture.format, high - low > 100), ("PNG", True), name)
                self.assertTrue(all(200 <= n <= 3000 for n in picture.size), name)
                sizes.append("{}x{}".format(*picture.size))
        self.say(", ".join(sizes))

    def test_second_call(self):
        """The same command again says so, and touches nothing."""
        before, clock = contents(self.out), time.perf_counter()
        status, text, _ = call(*self.flags, "--lr", 0.05, "--out", self.out)
        seconds = time.perf_counter() - clock
        self.assertEqual((status, text.count("\n"), contents(self.out)), (0, 1, before))
        self.assertIn("finished", text)
        self.say(f"{text.split(':')[0]}; {1000 * seconds:.1f} ms")

    def test_other_arguments(self):
        before = contents(self.out)
        for flags, text in (
            (["--lr", 0.2], "--lr 0.05 there, 0.2 now"),
            (["--lr", 0.05, "--batch-size", 32], "--batch-size 64 there, 32 now"),
            (["--lr", 0.05, "--dry-run"], "--dry-run False there, True now"),
        ):
            status, _, err = call(*self.flags, *flags, "--out", self.out)
            self.assertEqual((status, err.count("\n"), contents(self.out)), (2, 1, before))
            self.assertIn(text, err)
        self.say(err.strip()[-60:])

    def test_deterministic_and_unfinished(self):
        """Two runs of a seed are the same to the bit; an unfinished one starts again and ends alike."""
        torch.rand(7)  # whatever was drawn before
        again = self.tmp / "again"
        self.assertEqual(self.quick("--lr", 0.05, "--out", again)[0], 0)
        self.assertTrue(same_run(self.out, again))
        (again / "metrics.json").unlink()
        (again / "best.pt").write_bytes(b"half")
        self.assertEqual(self.quick("--lr", 0.05, "--out", again)[0], 0)
        self.assertTrue(same_run(self.out, again))
        other = self.tmp / "other"
        self.assertEqual(self.quick("--lr", 0.05, "--seed", 1, "--out", other)[0], 0)
        self.assertFalse(same_run(self.out, other))
        self.say("best.pt, log.csv, metrics.json the same to the bit; another seed differs")

    def test_deterministic_flag(self):
        out = self.tmp / "flag"
        try:
            status, _, err = self.quick("--lr", 0.05, "--deterministic", "--out", out)
            self.assertTrue(torch.are_deterministic_algorithms_enabled())
        finally:
            torch.use_deterministic_algorithms(False)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual((out / "best.pt").read_bytes(), (self.out / "best.pt").read_bytes())
        self.say("the same weights")

    def test_course_recipe(self):
        course = ["--batch-size", 640, "--lr", 0.01, "--momentum", 0, "--schedule", "constant"]
        with (
            mock.patch.object(c, "SGD", wraps=c.SGD) as sgd,
            mock.patch.object(c, "batches", wraps=c.batches) as b,
        ):
            status, _, _ = self.quick(*course, "--out", self.tmp / "course")
        self.assertEqual(
            (status, sgd.call_args.args[1:], b.call_args.args[-1]), (0, (0.01, 0.0, False, 0), 0)
        )
        self.say("plain SGD, no shifts")

    def test_dry_run(self):
        """One batch through everything, all files written, and `dry_run` beside the figures."""
        out = self.tmp / "dry"
        status, text, _ = call(*self.flags, "--dry-run", "--out", out)
        m = json.loads((out / "metrics.json").read_text())
        self.assertEqual((status, m["samples_per_epoch"], m["dry_run"]), (0, 64, True))
        self.assertEqual({p.name for p in out.iterdir()}, self.FILES)
        self.say(text.splitlines()[0])

    def test_default_folder(self):
        """Without --out: results/cnn-<timestamp>, and nothing else beside it."""
        here = Path.cwd()
        folder = self.tmp / "cwd"
        folder.mkdir()
        os.chdir(folder)
        try:
            status, _, _ = self.quick("--dry-run")
        finally:
            os.chdir(here)
        made = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()]
        self.assertEqual((status, len(made)), (0, 2))
        self.assertRegex(made[1], r"^results.cnn-\d{8}-\d{6}$")
        self.say(made[1])


class Offline(Case):
    def test_mnist(self):
        """What was tried, where the files belong, how to go on; nothing written."""
        out, data = self.tmp / "mnist", self.tmp / "none"
        with offline():
            status, _, err = call("--dataset", "mnist", "--data-dir", data, "--out", out)
        self.assertEqual((status, err.count("\n"), out.exists()), (2, 1, False))
        for text in (
            "127.0.0.1:9",
            str(data / "MNIST" / "raw"),
            "train-images-idx3-ubyte",
            "--dataset digits",
        ):
            self.assertIn(text, err)
        self.say(err.strip().replace(str(self.tmp), "...")[:100])

    def test_auto(self):
        """The digits instead, with a warning, and `digits` wherever a result is."""
        out, titles = self.tmp / "auto", []
        with offline(), mock.patch.object(c.Figure, "suptitle", lambda self, text, **_: titles.append(text)):
            flags = ["--data-dir", self.tmp / "none", "--epochs", 1, "--out", out]
            status, text, err = call(*flags)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("WARNING", text)
        self.assertIn("127.0.0.1:9", text)
        self.assertRegex(text.splitlines()[-1], r"^digits test")
        self.assertEqual(json.loads((out / "metrics.json").read_text())["dataset"], "digits")
        self.assertTrue(titles and all("digits" in title for title in titles), titles)
        self.assertFalse((self.tmp / "none").exists() and list((self.tmp / "none").rglob("*ubyte*")))
        args = json.loads((out / "args.json").read_text())
        self.say(f"{text.splitlines()[-1]}; args.json: {args['dataset']}")


class BadInput(Case):
    """A clear line, the exit status, and no results."""

    def refused(self, argv, *texts, status=2):
        out = Path(tempfile.mkdtemp(dir=self.tmp)) / "out"
        got, _, err = call(*argv, "--out", out)
        last = err.splitlines()[-1] if err else ""
        self.assertEqual(got, status, err)
        self.assertFalse(out.exists(), argv)
        for text in texts:
            self.assertIn(text, last)
        self.assertNotIn("Traceback", err)
        return last

    def test_flags(self):
        cases = [(["--epochs", v], f"--epochs is {v}") for v in ("0", "-1")]
        cases += [(["--batch-size", v], f"--batch-size is {v}") for v in ("0", "-64")]
        cases += [(["--lr", v], "--lr is") for v in ("0", "-0.1", "nan", "inf")]
        cases += [(["--momentum", v], "--momentum is") for v in ("-0.1", "1", "nan")]
        cases += [(["--epochs", "two"], "two"), (["--schedule", "cosine"], "cosine"), (["--wat"], "--wat")]
        cases += [(["--dataset", "cifar"], "cifar"), (["--predict", "a.png"], "--checkpoint")]
        cases += [(["--checkpoint", "best.pt"], "--predict")]
        cases += [(["--seed", v], "--seed is") for v in (str(2**64), str(-(2**63) - 1), "1" * 400)]
        cases += [([f"--{flag}=--"], "error") for flag in ("batch-size", "seed", "lr")]
        cases += [(["--batch-size", "1" * 30], "--batch-size is"), (["--epochs", "9" * 5000], "epochs")]
        for argv, text in cases:
            with self.subTest(argv=argv):
                self.refused(["--dataset", "digits", *argv], "error: ", text)
        self.say(f"{len(cases)} clear lines")

    @unittest.skipIf(torch.cuda.is_available(), "there is a CUDA device here")
    def test_no_cuda(self):
        self.say(self.refused(["--dataset", "digits", "--device", "cuda"], "--device cuda"))

    @unittest.skipIf(torch.backends.mps.is_available(), "there is an MPS device here")
    def test_no_mps(self):
        self.say(self.refused(["--dataset", "digits", "--device", "mps"], "--device mps"))

    def test_not_a_number(self):
        """A huge learning rate: exit status 1, the step named, no results."""
        out = self.tmp / "huge"
        status, _, err = call("--dataset", "digits", "--lr", "1e30", "--device", "cpu", "--out", out)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertRegex(err, r"^error: the loss is (nan|inf) at step \d+ of epoch 1: ")
        self.assertLessEqual({p.name for p in out.iterdir()}, {"args.json", ".lock"})
        self.say(err.strip())

    def test_data_files(self):
        """Truncated, garbage, of other counts or sizes, empty: named, and no results."""
        images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
        cases = {
            "truncated": lambda raw: (raw / images).write_bytes((raw / images).read_bytes()[:-5]),
            "garbage": lambda raw: (raw / images).write_bytes(b"\x7fELF" * 100),
            "no bytes": lambda raw: (raw / images).write_bytes(b""),
            "fewer labels": lambda raw: write_idx(raw / labels, np.zeros(39)),
            "labels of 10": lambda raw: write_idx(raw / labels, np.full(40, 10)),
            "8x8 images": lambda raw: write_idx(raw / images, np.zeros((40, 8, 8))),
            "labels of two dimensions": lambda raw: write_idx(raw / labels, np.zeros((40, 1))),
            "no images": lambda raw: [
                write_idx(raw / images, np.zeros((0, 28, 28))),
                write_idx(raw / labels, np.zeros(0)),
            ],
            "test part": lambda raw: (raw / images.replace("train", "t10k")).write_bytes(b"\0"),
        }
        for k, (name, spoil) in enumerate(cases.items()):
            with self.subTest(name):
                raw = write_mnist(self.tmp / f"spoilt{k}", 40, 10)
                spoil(raw)
                for dataset in ("mnist", "auto"):  # auto does not hide damage behind the digits
                    which = "t10k" if name == "test part" else "train"
                    flags = ["--dataset", dataset, "--data-dir", self.tmp / f"spoilt{k}"]
                    self.refused(flags, str(raw), "damaged", which)
        self.say(f"{', '.join(cases)}: clear lines")

    def test_few_images(self):
        """Too few for a validation part: a clear line as well."""
        write_mnist(self.tmp / "few", 5, 5)
        self.say(self.refused(["--dataset", "mnist", "--data-dir", self.tmp / "few"], "error: ")[:100])

    def test_out_folder(self):
        """Other files, a damaged args.json, a file: refused and left as they are."""
        for k, (name, content) in enumerate((("thesis.tex", "mine"), ("args.json", "{"), ("best.pt", "x"))):
            out = self.tmp / f"out{k}"
            out.mkdir()
            (out / name).write_text(content)
            before = contents(out)
            status, _, err = call("--dataset", "digits", "--out", out)
            self.assertEqual((status, err.count("\n"), contents(out)), (2, 1, before))
            self.assertIn(str(out), err)
        file = self.tmp / "file"
        file.write_text("")
        for out in (file, file / "below"):
            status, _, err = call("--dataset", "digits", "--epochs", 1, "--out", out)
            self.assertEqual((status, err.count("\n"), file.read_text()), (2, 1, ""), err)
            self.assertIn(str(out), err)
        self.say(err.strip().replace(str(self.tmp), "..."))

    @unittest.skipUnless(c.fcntl, "no locks here")
    def test_out_in_use(self):
        """A second run into a folder that one is writing into is refused and changes nothing there."""
        out = self.tmp / "used"
        out.mkdir()
        with open(out / ".lock", "a") as lock:
            c.fcntl.flock(lock, c.fcntl.LOCK_EX)
            before = contents(out)
            status, _, err = call("--dataset", "digits", "--device", "cpu", "--out", out)
        self.assertEqual((status, err.count("\n"), contents(out)), (2, 1, before))
        self.assertIn("another run is writing into", err)
        self.say(err.strip()[:40])

    def test_data_folder(self):
        """A --data-dir that can't be made."""
        file = self.tmp / "plain"
        file.write_text("")
        with offline():
            self.say(self.refused(["--dataset", "mnist", "--data-dir", file / "data"], str(file))[-100:])

    def test_folder_errors(self):
        """A folder that can't take the download is an error that names it; a network that fails is not."""
        folder = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR"}
        network = {"ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "EPIPE"}
        cases = [(OSError(getattr(errno, name), "told"), name in folder) for name in sorted(folder | network)]
        cases += [(urllib.error.URLError(OSError(errno.EACCES, "a firewall's")), False)]
        cases += [
            (socket.gaierror(-3, "no name"), False),
            (RuntimeError("File not found or corrupted."), False),
        ]
        for error_, its_folder in cases:
            with mock.patch.object(torchvision.datasets, "MNIST", side_effect=error_) as made:
                made.mirrors = ["a mirror"]
                expected = c.InputError if its_folder else ConnectionError
                with self.assertRaises(expected, msg=error_) as caught:
                    c.load_mnist(self.tmp / "unwritable")
            self.assertIn(str(self.tmp / "unwritable"), str(caught.exception))
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch.object(torchvision.datasets, "MNIST", side_effect=full):
            for dataset in ("auto", "mnist"):
                flags = ["--dataset", dataset, "--data-dir", self.tmp / "unwritable"]
                line = self.refused(flags, "unwritable", "No space left")
        self.say(f"{len(cases)} errors told apart; {line[:60]}")

    def test_full_disk(self):
        """Whatever file does not fit any more: one line, status 2, no half a file; the run goes on later."""
        raw, lines = write_mnist(self.tmp / "small", 40, 10), []
        flags = ["--dataset", "mnist", "--data-dir", raw.parent.parent, "--device", "cpu", "--epochs", 1]
        out, replace = self.tmp / "full", os.replace
        for name in ("args.json", "best.pt", "log.csv", "curves.png", "metrics.json"):

            def full(source, target, name=name):
                if Path(target).name == name:
                    raise OSError(errno.ENOSPC, "No space left on device")
                replace(source, target)

            with mock.patch.object(os, "replace", full):
                status, _, err = call(*flags, "--out", out)
            lines.append(err)
            self.assertEqual((status, err.count("\n")), (2, 1), err)
            self.assertIn(f"{out / name} can't be written (No space left on device)", err)
            self.assertEqual([p.name for p in out.glob("*.tmp")], [])
        self.assertEqual(call(*flags, "--out", out)[0], 0)
        self.say(lines[-1].strip().replace(str(self.tmp), "..."))


@unittest.skipUnless(Path("/dev/full").exists() and shutil.which("bash"), "no bash or no /dev/full here")
class CommandLine(Case):
    """The script as a process of its own: streams that are closed, full or know ASCII alone; Ctrl-C."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write_mnist(cls.tmp / "data", 40, 10)
        flags = f"--dataset mnist --data-dir {cls.tmp / 'data'} --device cpu --out {cls.tmp / 'é'}"
        cls.flags, cls.script = flags, Path(c.__file__).resolve()
        with mock.patch.object(c, "save_pictures"):
            assert call(*flags.split())[0] == 0  # what starts below finds a finished run, and says so

    def start(self, command):
        command = command.replace("RUN", f"{self.script} {self.flags}").replace(
            "PYTHON ", f"{sys.executable} "
        )
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.tmp,
            stdout=pipe,
            stderr=pipe,
            text=True,
            # whoever runs these tests in the background ignores SIGINT, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def ends(self, command, status, *texts):
        out, err = self.start(command).communicate(timeout=120)
        self.assertIn(f"status {status}", out + err)
        self.assertNotIn("Traceback", err)
        for text in texts:
            self.assertIn(text, out + err)
        self.say((out + err).splitlines()[0][-90:])

    def test_broken_pipe(self):
        self.ends("PYTHON RUN | true; echo status ${PIPESTATUS[0]}", 141)

    def test_closed_streams(self):
        self.ends("PYTHON RUN <&- >&-; echo status $?", 0)

    def test_closed_errors(self):
        self.ends("PYTHON RUN 2>&-; echo status $?", 0, "finished before")

    def test_full_disk(self):
        self.ends("PYTHON RUN > /dev/full; echo status $?", 1, "No space left on device")

    def test_ascii(self):
        self.ends(
            "export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0; PYTHON RUN; echo status $?", 0, r"\udcc3"
        )

    def test_interrupt(self):
        """Ctrl-C in the imports ends the process by the signal, without a traceback."""
        for module in (" numpy", " torchvision"):
            done = self.start("exec PYTHON -X importtime RUN")
            lines = []
            while not (lines and lines[-1].endswith(module)):
                lines.append(done.stderr.readline().rstrip())
            done.send_signal(signal.SIGINT)
            _, err = done.communicate(timeout=120)
            self.assertEqual(done.returncode, -signal.SIGINT)
            self.assertNotIn("Traceback", err)
        self.say("ended by SIGINT, silently, after the import of numpy and of torchvision")

    def test_interrupt_ignored(self):
        """Where SIGINT is ignored, as a shell has it for what runs in its background, the run goes on."""
        done, out = self.start("PYTHON -X importtime RUN 2>&1 & echo pid $!; wait $!; echo status $?"), ""
        while " numpy\n" not in out:
            out += done.stdout.readline()
        os.kill(int(re.search(r"pid (\d+)", out)[1]), signal.SIGINT)
        self.assertIn("status 0", done.communicate(timeout=120)[0])
        self.say("went on to its end")


# ---------------------------------------------------------------------------------------------- photographs
# of handwriting as phones and scanners make them, from images uint8 [h, w], light on dark

PAPER, INK = (235, 232, 228), (45, 42, 48)  # colours, 0 to 255


def coverage(image, scale=10.0, move=(0, 0), turn=0.0, page=400):
    """How much ink is where, [page, page·w/h] in 0..1: the image enlarged smoothly, moved, turned."""
    ink = ndimage.rotate(ndimage.zoom(image / 255, scale, order=3), turn, order=1)
    canvas = np.zeros((page, page * image.shape[1] // image.shape[0]))
    top, left = ((n - m) // 2 + d for n, m, d in zip(canvas.shape, ink.shape, move))
    rows, columns = (slice(max(0, a), a + m) for a, m in zip((top, left), ink.shape))
    ink = ink[max(0, -top) :, max(0, -left) :].clip(0, 1)
    canvas[rows, columns] = ink[: canvas.shape[0] - rows.start, : canvas.shape[1] - columns.start]
    return canvas


def paint(cover, paper=PAPER, ink=INK):
    """Ink of one colour over paper of one colour or [H, W, 3]: [H, W, 3] in 0..255."""
    return paper + cover[..., None] * (np.array(ink) - paper)


def axes_of(shape, rng):
    """Coordinates y, x in -1..1 over the page, along random perpendicular directions."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing="ij")
    a = rng.uniform(0, 2 * np.pi)
    return (y * np.cos(a) + x * np.sin(a))[..., None], (x * np.cos(a) - y * np.sin(a))[..., None]


def ruled(shape, rng, width, every, turn=0.0):
    """Cover of parallel lines, `width` and `every` in pixels, a random shift, up to 2 degrees askew."""
    y, x = np.indices(shape)
    a = np.radians(turn + rng.uniform(-2, 2))
    t = (y * np.cos(a) + x * np.sin(a) + rng.uniform(0, every)) % every
    return (width / 2 + 0.5 - np.abs(t - every / 2)).clip(0, 1)


def disc(shape, centre, radius):
    y, x = np.indices(shape)
    return (radius + 0.5 - np.hypot(y - centre[0], x - centre[1])).clip(0, 1)


def rim(shape, width, inset=0):
    """Cover of a rectangle's outline, `inset` pixels inside the page."""
    y, x = np.indices(shape)
    t = np.minimum(np.minimum(y, shape[0] - 1 - y), np.minimum(x, shape[1] - 1 - x)) - inset
    return ((t >= 0) & (t < width)).astype(float)


def uneven(picture, rng, strength):
    """Light that falls off across the page, to 1 - strength."""
    along, _ = axes_of(picture.shape, rng)
    return picture * (1 - strength * (along - along.min()) / np.ptp(along))


def noisy(picture, rng, sigma):
    return picture + rng.normal(0, sigma, picture.shape[:2])[..., None]


def texture(shape, rng, size):
    """Smooth random field, mean 0, deviation 1."""
    field = ndimage.gaussian_filter(rng.normal(size=shape[:2]), size)
    return ((field - field.mean()) / field.std())[..., None]


def to_picture(picture, quality=None):
    picture = Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))
    if quality:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        picture = Image.open(file).convert("RGB")
    return picture


def tight(image, rng):
    cover = coverage(image)
    rows, columns = (np.flatnonzero(cover.max(d) > 0.3) for d in (1, 0))
    return paint(cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def shadow_edge(image, rng):
    along, _ = axes_of((400, 400), rng)
    edge = ndimage.gaussian_filter((along > rng.uniform(-0.5, 0.5)).astype(float), (2, 2, 0))
    return paint(coverage(image)) * (1 - 0.5 * edge)


def salt_and_pepper(image, rng):
    picture, draw = paint(coverage(image)), rng.random((400, 400))
    picture[draw < 0.02], picture[draw > 0.98] = 0, 255
    return picture


def beside_table(image, rng, wide=0.18):
    along, _ = axes_of((400, 400), rng)
    table = (along > np.quantile(along, 1 - wide)).astype(float)
    cover = coverage(image, 8, turn=0, move=(0, 0))
    y, x = (float((table[..., 0] * (c - 200)).sum() / table.sum()) for c in np.indices((400, 400)))
    cover = coverage(image, 8, move=(round(-0.35 * y), round(-0.35 * x)))  # the digit lies clear of it
    return paint(cover) * (1 - table) + table * (105, 75, 55)


def stray_dot(image, rng):
    cover = coverage(image)
    far = np.argwhere(ndimage.distance_transform_edt(cover < 0.1) > 25)
    return paint(np.maximum(cover, disc(cover.shape, far[rng.integers(len(far))], rng.uniform(3, 8))))


def vignette(image, rng):
    y, x = axes_of((400, 400), rng)
    return paint(coverage(image)) * (1 - 0.3 * (y**2 + x**2))


def phone(image, rng):
    """Small on a large page, askew, darker paper, light from one side, blurred, noisy, as JPEG."""
    cover = coverage(image, 20, rng.integers(-150, 150, 2), rng.uniform(-8, 8), page=1200)
    picture = uneven(paint(cover, (205, 200, 190), (75, 75, 95)), rng, 0.45)
    return to_picture(noisy(ndimage.gaussian_filter(picture, (3, 3, 0)), rng, 8), quality=60)


KINDS = {
    "clean": lambda image, rng: paint(coverage(image)),
    "inverted": lambda image, rng: 255 - paint(coverage(image)),
    "small": lambda image, rng: paint(coverage(image, 3)),
    "off-centre": lambda image, rng: paint(coverage(image, 6, rng.choice([-110, 110], 2))),
    "large": lambda image, rng: paint(coverage(image, 14)),
    "cropped to the ink": tight,
    "uneven light 30 %": lambda image, rng: uneven(paint(coverage(image)), rng, 0.3),
    "uneven light 60 %": lambda image, rng: uneven(paint(coverage(image)), rng, 0.6),
    "shadow's edge": shadow_edge,
    "vignette": vignette,
    "sensor noise": lambda image, rng: noisy(paint(coverage(image)), rng, 10),
    "salt and pepper": salt_and_pepper,
    "blur": lambda image, rng: ndimage.gaussian_filter(paint(coverage(image)), (6, 6, 0)),
    "JPEG quality 20": lambda image, rng: to_picture(paint(coverage(image)), 20),
    "faint pencil": lambda image, rng: noisy(paint(coverage(image), ink=(195, 195, 198)), rng, 4),
    "ruled lines": lambda image, rng: paint(
        coverage(image), paint(ruled((400, 400), rng, 3, 60), ink=(120, 140, 180))
    ),
    "squared paper": lambda image, rng: paint(
        coverage(image),
        paint(
            np.maximum(ruled((400, 400), rng, 2, 40), ruled((400, 400), rng, 2, 40, 90)), ink=(140, 160, 190)
        ),
    ),
    "frame around it": lambda image, rng: paint(
        np.maximum(coverage(image), rim((400, 400), 5, rng.integers(30, 60)))
    ),
    "thin border": lambda image, rng: paint(np.maximum(coverage(image), rim((400, 400), rng.integers(1, 5)))),
    "table beside the paper": beside_table,
    "stray dot": stray_dot,
    "coloured paper": lambda image, rng: paint(coverage(image), (150, 190, 165), (60, 40, 100)),
    "askew": lambda image, rng: paint(coverage(image, 9, turn=rng.uniform(-10, 10))),
    "phone": phone,
}


def hand_shadow(image, rng):
    """A soft blob that reaches in from the edge."""
    y, x = axes_of((400, 400), rng)
    blob = (np.hypot((y - 1) / rng.uniform(0.8, 1.1), x / rng.uniform(0.4, 0.7)) < 1).astype(float)
    return paint(coverage(image)) * (1 - 0.45 * ndimage.gaussian_filter(blob, (10, 10, 0)))


def chalk(image, rng):
    """Light on a dark board, grainy strokes, wiped smears."""
    grain = 1 - 0.5 * (rng.random((400, 400)) < 0.25)
    smear = ndimage.gaussian_filter(rng.normal(size=(400, 400)), (4, 40))[..., None]
    board = np.array((48, 66, 58)) + 9 * smear / smear.std()
    return noisy(paint(coverage(image) * grain, board, (225, 225, 215)), rng, 5)


def felt_pen(image, rng):
    """Hard edges, no shades."""
    return paint((coverage(image) > 0.5).astype(float))


def thin_pen(image, rng):
    """A ball pen: the strokes' middle, a few pixels wide, on ruled paper."""
    cover = coverage(image) > 0.5
    deep = ndimage.distance_transform_edt(cover)
    ridge = cover & (deep > 0.75 * ndimage.maximum_filter(deep, 21))
    pen = ndimage.gaussian_filter(ndimage.binary_dilation(ridge, iterations=4).astype(float), 1)
    return paint(pen, paint(ruled((400, 400), rng, 3, 80), ink=(150, 165, 200)), (40, 50, 120))


HELD_OUT = {
    "blue ink on yellow paper": lambda image, rng: paint(coverage(image), (238, 214, 110), (45, 70, 165)),
    "crumpled paper": lambda image, rng: (
        paint(coverage(image))
        * (1 - 0.08 * np.abs(texture((400, 400), rng, 25)) + 0.03 * texture((400, 400), rng, 6))
    ),
    "hand's shadow": hand_shadow,
    "chalk with smears": chalk,
    "punched hole": lambda image, rng: paint(
        np.maximum(coverage(image, 9), disc((400, 400), (rng.uniform(80, 320), rng.uniform(-5, 22)), 24))
    ),
    "red margin line": lambda image, rng: paint(
        coverage(image),
        paint(np.tile(np.abs(np.arange(400) - rng.integers(50, 150)) < 2, (400, 1)), ink=(225, 95, 95)),
    ),
    "40 pixels": lambda image, rng: to_picture(paint(coverage(image))).resize((40, 40)),
    "felt pen": felt_pen,
    "ball pen on ruled paper": thin_pen,
}


class Predict(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # as MNIST has them: 20 pixels, and four of margin
        train, cls.test = (
            (F.pad(F.interpolate(images[:, None].float(), size=20), (4,) * 4)[:, 0].byte(), labels)
            for images, labels in c.load_digits()
        )
        torch.manual_seed(0)
        cls.model, generator = c.build_cnn("cpu"), torch.Generator().manual_seed(0)
        sgd = c.SGD(cls.model.parameters(), 0, 0.9, True)
        for _ in range(8):
            data = c.batches(*train, 32, generator, 2)
            c.train_epoch(cls.model, sgd, data, [0.05] * 45)
        cls.checkpoint = cls.tmp / "best.pt"
        torch.save(c.named(cls.model), cls.checkpoint)

    def read(self, *images):
        return call("--predict", *images, "--checkpoint", self.checkpoint, "--device", "cpu")

    def stroke(self, size=280):
        """A thick 7, dark on white, off the centre."""
        a = np.full((size, size), 250, dtype=np.uint8)
        k = size // 28
        a[3 * k : 5 * k, 4 * k : 16 * k] = 10
        for row in range(5 * k, 22 * k):
            left = int(14 * k - (row - 5 * k) * 0.4)
            a[row, left : left + 2 * k] = 10
        return Image.fromarray(a)

    def test_polarity_and_size(self):
        """Dark on light, light on dark, small, large JPEG, transparent, rotated by EXIF: the same digit."""
        dark = self.stroke()
        clear = Image.new("RGBA", dark.size, (0, 0, 0, 0))
        clear.putalpha(Image.fromarray(255 - np.asarray(dark)))
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        pictures = {
            "dark.png": (dark, {}),
            "light.png": (Image.fromarray(255 - np.asarray(dark)), {}),
            "small.png": (dark.resize((56, 56)), {}),
            "large.jpg": (self.stroke(2800).convert("RGB"), {"quality": 90}),
            "clear.png": (clear, {}),
            "wide.png": (Image.new("L", (600, 300), 250), {}),
            "turned.jpg": (dark.transpose(Image.Transpose.ROTATE_90), {"exif": exif, "quality": 95}),
        }
        pictures["wide.png"][0].paste(dark, (200, 10))
        for name, (picture, flags) in pictures.items():
            picture.save(self.tmp / name, **flags)
        read = {name: c.read_digit(self.tmp / name)[0].float() for name in pictures}
        off = {name: float((image - read["dark.png"]).abs().mean()) for name, image in read.items()}
        self.assertLess(max(off.values()), 8)
        self.assertLess(off["light.png"], 0.5)
        status, text, err = self.read(*(self.tmp / name for name in pictures))
        lines = text.splitlines()
        self.assertEqual((status, err, len(lines)), (0, "", len(pictures)))
        labels = {re.search(r": (\d) \|", line)[1] for line in lines}
        self.assertEqual(len(labels), 1)
        shares = [float(v) for v in re.findall(r"([\d.]+)%", lines[0])]
        self.assertEqual(len(shares), 10)
        self.assertAlmostEqual(sum(shares), 100, delta=1)
        self.say(
            f"{len(pictures)} pictures of one digit: within {max(off.values()):.1f} levels, all {labels}"
        )

    def test_placement(self):
        """Longer side 20 pixels, centre of mass within a pixel of the middle."""
        self.stroke().save(self.tmp / "digit.png")
        image = c.read_digit(self.tmp / "digit.png")[0].double()
        rows, columns = (image > 0).any(1).nonzero(), (image > 0).any(0).nonzero()
        sides = [int(i[-1] - i[0]) + 1 for i in (rows, columns)]
        at = torch.arange(28).double() + 0.5
        centre = [float(image.sum(1 - d) @ at / image.sum()) for d in (0, 1)]
        self.assertTrue(19 <= max(sides) <= 20 and all(abs(v - 14) <= 0.75 for v in centre))
        self.assertEqual((image.shape, float(image.max())), ((28, 28), 255))
        self.say(f"{sides[0]} by {sides[1]} pixels, centre {centre[0]:.2f}, {centre[1]:.2f}")

    def test_what_is_printed(self):
        """Label and probabilities are the model's own for the picture as it was read, in the order given."""
        paths = [self.tmp / f"test{k}.png" for k in range(30)]
        for path, image in zip(paths, self.test[0]):
            Image.fromarray(np.pad(image.numpy(), 12)).resize((208, 208)).save(path)
        images = torch.stack([c.read_digit(path)[0] for path in paths])
        want = self.model(c.to_input(images)).softmax(1)
        lines = self.read(*paths)[1].splitlines()
        for path, line, p in zip(paths, lines, want):
            self.assertTrue(line.startswith(f"{path}: {int(p.argmax())} |"), line)
            shares = [float(v) for v in re.findall(r"([\d.]+)%", line)]
            self.assertLess(float((torch.tensor(shares) - 100 * p).abs().max()), 0.051)
        self.say(f"{len(lines)} pictures, such as {lines[0].split(': ', 1)[1]}")

    def accuracy(self, kinds, images, labels):
        """Per cent of right answers for every kind of photograph; how many brought a warning."""
        found, warned, path = {}, 0, self.tmp / "photograph.png"
        for kind_, make in kinds.items():
            rng, read = np.random.default_rng(0), []
            for image in images.numpy():
                picture = make(image, rng)
                (picture if isinstance(picture, Image.Image) else to_picture(picture)).save(path)
                try:
                    digit, warning = c.read_digit(path)
                except c.InputError:
                    digit, warning = torch.zeros(28, 28, dtype=torch.uint8), "unread"
                read.append(digit)
                warned += warning is not None
            right = self.model(c.to_input(torch.stack(read))).argmax(1) == labels
            found[kind_] = 100 * float(right.double().mean())
        return found, warned

    def test_photographs(self):
        """Of digits that the network knows as they are, in the kinds of photographs it was tuned with."""
        images, labels = self.test
        known = (self.model(c.to_input(images)).argmax(1) == labels).nonzero()[:8, 0]
        found, _ = self.accuracy(KINDS, images[known], labels[known])
        mean = sum(found.values()) / len(found)
        worst = sorted(found, key=found.get)[:3]
        self.say(
            f"mean of {len(found)} kinds {mean:.1f} %; " + ", ".join(f"{k} {found[k]:.0f}" for k in worst)
        )
        self.assertGreater(mean, 90)

    def test_photographs_held_out(self):
        """The same for kinds that the reading was not tuned with."""
        images, labels = self.test
        known = (self.model(c.to_input(images)).argmax(1) == labels).nonzero()[:8, 0]
        found, _ = self.accuracy(HELD_OUT, images[known], labels[known])
        mean = sum(found.values()) / len(found)
        each = ", ".join(f"{k} {v:.0f}" for k, v in found.items())
        self.say(f"mean of {len(found)} {mean:.1f} %; {each}")
        self.assertGreater(mean, 80)

    def test_false_warnings(self):
        """Clean pictures of one digit bring no warning, whatever pieces it is in."""
        _, warned = self.accuracy({"clean": KINDS["clean"]}, self.test[0][:100], self.test[1][:100])
        self.say(f"{warned} of 100")
        self.assertLessEqual(warned, 2)

    def test_not_one_digit(self):
        """Several digits bring a warning, an empty page an error, shaded, noisy or not."""
        rng, warned, refused = np.random.default_rng(0), 0, 0
        images = self.test[0].numpy()
        for k in range(20):
            pair = np.concatenate([np.pad(images[2 * k], 2), np.pad(images[2 * k + 1], 2)], 1)
            to_picture(paint(coverage(pair, 6))).save(self.tmp / "pair.png")
            warned += c.read_digit(self.tmp / "pair.png")[1] is not None
            page = paint(np.zeros((400, 400)))
            page = (page, uneven(page, rng, 0.5), noisy(page, rng, 8), noisy(uneven(page, rng, 0.4), rng, 4))[
                k % 4
            ]
            to_picture(page).save(self.tmp / "page.png")
            with contextlib.suppress(c.InputError):
                c.read_digit(self.tmp / "page.png")
                continue
            refused += 1
        self.say(f"{warned} of 20 pairs with a warning, {refused} of 20 empty pages refused")
        self.assertGreaterEqual(warned, 18)
        self.assertGreaterEqual(refused, 18)

    def test_odd_files(self):
        """16-bit grey is scaled, not clipped; a bad file does not end the call; sizes are checked first."""
        grey = np.asarray(self.stroke()).astype(np.float64)
        Image.fromarray((grey * 257).astype(np.uint16)).save(self.tmp / "deep.png")
        self.stroke().save(self.tmp / "plain.png")
        pair = [c.read_digit(self.tmp / f"{name}.png")[0].float() for name in ("deep", "plain")]
        self.assertLess(float((pair[0] - pair[1]).abs().mean()), 3)
        Image.new("1", (13_000, 13_000)).save(self.tmp / "huge.png")
        (self.tmp / "page.pdf").write_bytes(b"%PDF-1.7 nothing")
        (self.tmp / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        names = ("huge.png", "plain.png", "page.pdf", "photo.heic", "deep.png")
        status, text, err = self.read(*(self.tmp / name for name in names))
        self.assertEqual((status, text.count("\n"), err.count("\n")), (2, 2, 3))
        for word in ("64 million", "export the page as PNG", "save it as JPEG or PNG"):
            self.assertIn(word, err)
        self.say(f"{len(names)} files: 2 read, 3 lines, status 2")

    def test_bad_images(self):
        paths = {
            name: self.tmp / name for name in ("text.png", "missing.png", "blank.png", "cut.jpg", "folder")
        }
        paths["text.png"].write_text("no image")
        Image.new("L", (40, 40), 200).save(paths["blank.png"])
        self.stroke().save(self.tmp / "whole.jpg")
        paths["cut.jpg"].write_bytes((self.tmp / "whole.jpg").read_bytes()[:900])
        paths["folder"].mkdir()
        for path in paths.values():
            status, text, err = self.read(path)
            self.assertEqual((status, text, err.count("\n")), (2, "", 1), path)
            self.assertIn(str(path), err)
            self.assertNotIn("Traceback", err)
        self.say(f"{', '.join(paths)}: clear lines")

    def test_flipped_bits(self):
        """A best.pt with one bit flipped is refused, or its weights are the same."""
        whole, refused = self.checkpoint.read_bytes(), 0
        want = [p.clone() for p in self.model.parameters()]
        for _ in range(200):
            content, at = bytearray(whole), self.rng.randrange(len(whole))
            content[at] ^= 1 << self.rng.randrange(8)
            (self.tmp / "flipped.pt").write_bytes(content)
            model = c.build_cnn("cpu")
            try:
                c.load_weights(self.tmp / "flipped.pt", model)
                self.assertTrue(all(map(torch.equal, model.parameters(), want)), f"byte {at}")
            except c.InputError:
                refused += 1
        self.assertGreater(refused, 150)
        self.say(f"{refused} of 200 refused, in the others the weights are the same")

    def test_bad_checkpoints(self):
        self.stroke().save(self.tmp / "seven.png")
        weights = {k: v.clone() for k, v in c.named(self.model).items()}
        other = {**weights, "0.W": torch.zeros(8, 3, 3, 3)}
        resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(62)}
        files = {"resnet": resnet, "shapes": other, "list": [1, 2], "number": torch.zeros(3)}
        for name, content in files.items():
            torch.save(content, self.tmp / f"{name}.pt")
        (self.tmp / "bytes.pt").write_bytes(os.urandom(5000))
        (self.tmp / "empty.pt").write_bytes(b"")
        (self.tmp / "cut.pt").write_bytes(self.checkpoint.read_bytes()[:9000])
        names = [*files, "bytes", "empty", "cut", "missing"]
        for name in names:
            path = self.tmp / f"{name}.pt"
            flags = ["--predict", self.tmp / "seven.png", "--checkpoint", path, "--device", "cpu"]
            status, text, err = call(*flags)
            self.assertEqual((status, text, err.count("\n")), (2, "", 1), err)
            self.assertIn(str(path), err)
        self.say(f"{', '.join(names)}: clear lines")


class Import(Case):
    def test_no_side_effects(self):
        """Importing prints, writes, fetches and seeds nothing, and leaves pyplot and its backend alone."""
        code = (
            "import socket, sys, torch\n"
            "def refuse(*a, **k): raise OSError('network')\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
            "before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import cnn_from_scratch\n"
            "after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()\n"
            "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
            "assert not torch.are_deterministic_algorithms_enabled()\n"
            "assert 'matplotlib.pyplot' not in sys.modules and not torch.cuda.is_initialized()\n"
        )
        here, empty = str(Path(c.__file__).resolve().parent), self.tmp / "empty"
        empty.mkdir()
        argv = [sys.executable, "-B", "-W", "error::UserWarning:cnn_from_scratch", "-c", code, here]
        done = subprocess.run(argv, cwd=empty, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(list(empty.iterdir()), [])
        self.say("silent, no file, no socket, no pyplot, no seed")

    def test_reading_is_the_same(self):
        """Both scripts read photographs by the same lines: what is mended in one is mended in the other."""
        for name in ("open_picture", "ring", "above_paper", "otsu", "choose_parts", "find_ink"):
            self.assertEqual(inspect.getsource(getattr(c, name)), inspect.getsource(getattr(r, name)), name)
        self.say("six functions, the same to the letter")

    def test_exports(self):
        """The names and signatures that others call."""
        tail = "stride=1, padding=0, bias=True, device=None, dtype=None"
        want = {
            c.Linear: "(in_features, out_features, device=None, dtype=None)",
            c.Conv2D: f"(in_channels, out_channels, kernel_size, {tail})",
            c.MaxPool2D: "(kernel_size, stride=None, padding=0)",
            c.Sequential: "(*layers, reorder=True)",
            c.SGD: "(params, lr, momentum=0, nesterov=False, weight_decay=0)",
            c.build_cnn: "(device=None, dtype=None)",
        }
        for what, signature in want.items():
            self.assertEqual(str(inspect.signature(what)), signature)
        for layer in (c.ReLU, c.Flatten, c.CrossEntropy):
            layer()
        defaults = vars(c.parse([]))
        told = dict(dataset="auto", data_dir="data", epochs=5, schedule="onecycle", device="auto", out=None)
        self.assertLessEqual(told.items(), defaults.items())
        self.say(f"{len(want)} signatures, {len(defaults)} flags")


# ---------------------------------------------------------------------------------------------- resnet18.py

TIMES = {"seconds", "train_seconds", "total_seconds", "images_per_second", "peak_memory_bytes"}


def write_emnist(root, train=300, test=100, classes=62):
    """Files in EMNIST's layout: every class is a pattern of its own, with noise."""
    rng, raw = np.random.default_rng(0), Path(root) / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    patterns = rng.integers(0, 256, (classes, 7, 7)).repeat(4, 1).repeat(4, 2)
    for part, n in (("train", train), ("test", test)):
        labels = np.arange(n) % classes
        images = np.clip(patterns[labels] + rng.normal(0, 30, (n, 28, 28)), 0, 255)
        write_idx(raw / f"emnist-byclass-{part}-images-idx3-ubyte", images)
        write_idx(raw / f"emnist-byclass-{part}-labels-idx1-ubyte", labels)


def small_flags(data, *more):
    flags = ["--dataset", "emnist", "--data-dir", str(data), "--weights", "none", "--image-size", "32"]
    return [*flags, "--device", "cpu", *map(str, more)]


def call_resnet(*argv):
    return call(*argv, script=r)


def child(argv, log, env, kill, gradients):
    """A run in a process of its own, killed at the `kill[1]`-th call of a function if asked to."""
    os.environ.update(env)
    sys.argv = ["resnet18.py", *argv]
    stream = open(log, "a", buffering=1)
    sys.stdout = sys.stderr = stream
    if kill:
        kill_at(*kill)
    if gradients:
        keep_first_gradients(gradients)
    os._exit(r.main(argv))


def kill_at(point, count):
    """SIGKILL at the count-th step, or within the count-th write: half written, before or after a rename."""
    owner, name = {"step": (r.Trainer, "train_step"), "forward": (r, "prepare")}.get(
        point, (os, "fsync" if point == "half" else "replace")
    )
    plain, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and point == "half":
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        if calls[0] == count and point != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **kwargs)
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def keep_first_gradients(path):
    plain = r.Trainer.train_step

    def step(self, order):
        plain(self, order)
        if self.epoch == 0 and self.step == 1:
            torch.save([p.grad for p in self.params], f"{path}.{self.run.rank}")

    r.Trainer.train_step = step


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["resnet18"])


def start(argv, log, env=None, kill=None, gradients=None):
    process = FORKS.Process(target=child, args=([str(a) for a in argv], str(log), env or {}, kill, gradients))
    process.start()
    return process


def finish(process, timeout=120):
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def results(out):
    """What must be the same to the bit: weights, epochs and figures, without times."""
    found = {}
    for folder in sorted(p for p in Path(out).iterdir() if p.is_dir()):
        rows = csv.DictReader(io.StringIO((folder / "log.csv").read_text()))
        log = [[v for k, v in row.items() if k != "seconds"] for row in rows]
        figures = {
            k: v for k, v in json.loads((folder / "metrics.json").read_text()).items() if k not in TIMES
        }
        best = torch.load(folder / "best.pt", weights_only=True)
        last = torch.load(folder / "last.pt", weights_only=True)["weights"]
        found[folder.name] = (log, figures, best, last)
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class ResnetCase(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = cls.tmp / "data"
        write_emnist(cls.data)

    def trainer(self, regime="partial_unfreeze", *flags, out=None):
        args = r.parse_args(small_flags(self.data, "--amp", "off", *flags))
        run = r.Run(args)
        run.out = Path(out or tempfile.mkdtemp(dir=self.tmp))
        data = r.load_data(args)
        model = r.build_model(len(data.classes), None, args.seed).to(memory_format=torch.channels_last)
        stage = r.with_flags(r.REGIMES[regime][-1], args)
        progress = {"seconds": {}, "history": [], "stages": []}
        with contextlib.redirect_stdout(io.StringIO()):
            return r.Trainer(run, data, model, stage, 0, run.out, progress)


class ResnetData(ResnetCase):
    def test_orientation(self):
        """The one transpose equals torchvision's rotation by -90 degrees and mirroring."""
        raw = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        for image, ours in zip(raw, r.upright(raw), strict=True):
            rotated = transforms.functional.rotate(Image.fromarray(image.numpy()), -90)
            want = np.asarray(transforms.functional.hflip(rotated))
            np.testing.assert_array_equal(ours.numpy(), want)
        self.say("5 random images equal")

    def test_resize_and_normalise(self):
        raw = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
        for size in (32, 64, 224):
            ours = r.resize(raw, size)  # N, 1, S, S in 0..255
            to = transforms.Resize((size, size))
            pil = torch.stack([torch.tensor(np.asarray(to(Image.fromarray(i.numpy())))) for i in raw]).float()
            tensor = to(raw[:, None])[:, 0].float()
            off = [float((ours[:, 0] - other).abs().max()) for other in (pil, tensor)]
            self.assertLessEqual(off[0], 1.0)
            self.assertLessEqual(off[1], 0.5 + 1e-3)
            want = transforms.Normalize(r.MEAN, r.STD)(ours.expand(-1, 3, -1, -1) / 255)
            x = r.prepare(raw, size)
            self.assertTrue(x.is_contiguous(memory_format=torch.channels_last))
            norm = float((x - want).abs().max())
            self.assertLess(norm, 1e-5)
            self.say(
                f"{size} px: {off[0]:.3f} levels from PIL, {off[1]:.3f} from uint8, normalised {norm:.1e}"
            )

    def test_augmentation(self):
        """The identity is the plain resize; draws depend on their key only; rotations stay within 10°."""
        raw = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
        identity = torch.eye(2, 3).expand(3, 2, 3)
        off = float((r.warp(raw, identity, 64) - r.resize(raw, 64)).abs().max())
        self.assertLess(off, 0.05)
        first, again, other = (r.draw_affine(1000, r.rng(0, "augment", 0, 1, step)) for step in (2, 2, 3))
        self.assertTrue(torch.equal(first, again))
        self.assertFalse(torch.equal(first, other))
        degrees = torch.atan2(first[:, 1, 0], first[:, 0, 0]).rad2deg().abs().max()
        area = torch.linalg.det(first[:, :, :2]).sqrt()
        self.assertLess(float(degrees), 10.01)
        self.assertTrue(bool((area > 0.87).all() and (area < 1.13).all()))  # a flip would be negative
        self.say(
            f"identity within {off:.1e} levels, up to {float(degrees):.1f} degrees, scales "
            f"{float(area.min()):.2f} to {float(area.max()):.2f}"
        )

    def test_split(self):
        train, val = r.split(697_932, None, 0)
        self.assertEqual((len(train), len(val)), (628_138, 69_794))
        self.assertEqual(len(torch.cat([train, val]).unique()), 697_932)
        again, _ = r.split(697_932, None, 0)
        other, _ = r.split(697_932, None, 1)
        self.assertTrue(torch.equal(train, again))
        self.assertFalse(torch.equal(train, other))
        limited = torch.cat(r.split(697_932, 1000, 0))
        self.assertEqual(len(limited.unique()), 1000)
        self.assertGreater(int(limited.max()), 600_000)
        self.say("628,138 / 69,794, disjoint, by seed; --limit draws from everywhere")

    def test_names(self):
        data = r.load_emnist(self.data)
        self.assertEqual(data.name, "EMNIST ByClass, 300/100 re-split")
        self.assertEqual((data.classes[10], data.classes[36], len(data.classes)), ("A", "a", 62))
        digits = r.load_digits()
        self.assertEqual((len(digits.labels["train"]), len(digits.labels["test"])), (1437, 360))
        self.say(f"{data.name}; digits 1,437 / 360")

    def test_download_failure(self):
        """One clear message from `emnist`, the announced fallback from `auto`, nothing half-written."""
        empty = self.tmp / "empty"
        with mock.patch.object(torchvision.datasets.EMNIST, "url", "http://127.0.0.1:9/gzip.zip"):
            flags = ["--data-dir", empty, "--weights", "none", "--image-size", 32, "--device", "cpu"]
            status, _, err = call_resnet(*flags, "--dataset", "emnist", "--out", self.tmp / "none")
            self.assertEqual(status, 2)
            self.assertRegex(err, r"^error: EMNIST could not be downloaded .* Offline: .*\n$")
            with mock.patch.object(r, "load_weights", side_effect=no_imagenet(r.load_weights)):
                flags[3] = "imagenet"
                status, out, err = call_resnet(*flags, "--dry-run", "--out", self.tmp / "fallen")
        self.assertEqual((status, "error:" in err), (0, False))
        self.assertIn("FALLING BACK to scikit-learn's digits", out)
        row = json.loads((self.tmp / "fallen" / "linear_probe" / "metrics.json").read_text())
        self.assertEqual((row["dataset"], row["weights"]), ("digits", "random"))
        self.say("refused by `emnist`, digits and random weights from `auto`")

    def test_corrupted_download(self):
        """A wrong archive fails torchvision's checksum, is reported and leaves no data behind."""
        with served(b"no archive") as url, mock.patch.object(torchvision.datasets.EMNIST, "url", url):
            quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
            with quiet[0], quiet[1], self.assertRaisesRegex(r.DownloadFailed, "corrupted") as caught:
                r.load_emnist(self.tmp / "corrupted")
        self.assertFalse(list((self.tmp / "corrupted").glob("EMNIST/raw/*")))
        self.say(str(caught.exception)[:110])


@contextlib.contextmanager
def served(content):
    """The address of a server on this machine that answers every request with the content."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/gzip.zip"
        server.shutdown()


def no_imagenet(plain):
    def load(spec):
        if spec == "imagenet":
            raise r.DownloadFailed("no network")
        return plain(spec)

    return load


class ResnetModel(ResnetCase):
    def test_counts(self):
        model = r.build_model(62, None, 0)
        for trains, want in (("fc", 31_806), ("layer4", 8_425_534), ("all", 11_208_318)):
            r.freeze_below(model, trains)
            self.assertEqual(sum(p.numel() for p in model.parameters() if p.requires_grad), want)
        self.say("31,806 / 8,425,534 / 11,208,318")

    def test_whole_network(self):
        """Blocks, pooling in float32 and fc together are torchvision's own forward."""
        model = r.build_model(62, None, 0).eval()
        images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
        run = r.Run(r.parse_args(["--amp", "off", "--device", "cpu"]))
        ours = r.whole_network(run, model, images, 64)
        with torch.no_grad():
            off = float((ours - model(r.prepare(images, 64))).abs().max())
        self.assertLess(off, 1e-5)
        self.say(f"within {off:.1e}")

    def test_frozen(self):
        """After training, what is frozen is the same bit for bit, statistics too, and what trains is not."""
        for regime, names in (("linear_probe", ("fc.",)), ("partial_unfreeze", ("layer4.", "fc."))):
            t = self.trainer(regime, "--epochs", 1, "--lr", 0.01)
            before = {k: v.clone() for k, v in t.model.state_dict().items()}
            with contextlib.redirect_stdout(io.StringIO()):
                t.train()
            changed = {k for k, v in t.model.state_dict().items() if not torch.equal(v, before[k])}
            self.assertEqual(changed, {k for k in before if k.startswith(names)})
            self.say(f"{regime}: {len(changed)} tensors changed, {len(before) - len(changed)} did not")

    def test_weights_file(self):
        path = self.tmp / "weights.pt"
        state = torchvision.models.resnet18().state_dict()
        torch.save(state, path)
        loaded, name = r.load_weights(str(path))
        model = r.build_model(62, loaded, 0)
        self.assertTrue(torch.equal(model.layer3[1].conv2.weight, state["layer3.1.conv2.weight"]))
        self.assertEqual((name, model.fc.out_features), ("weights.pt", 62))
        del state["layer1.0.conv1.weight"]
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
        torch.save(state, path)
        with self.assertRaisesRegex(r.InputError, r"differs from ResNet-18 \(2 keys\): conv1.weight is"):
            r.load_weights(str(path))
        torch.save([1, 2], path)
        with self.assertRaisesRegex(r.InputError, "no readable state dict"):
            r.load_weights(str(path))
        self.say("loaded; missing and misshapen keys named")


class ResnetTraining(ResnetCase):
    def weights_after(self, regime, keep, *flags):
        t = self.trainer(regime, "--epochs", 2, "--batch-size", 64, *flags)
        if not keep:
            t.frozen.compute = lambda laps: None
        with contextlib.redirect_stdout(io.StringIO()):
            t.train()
        self.assertEqual(bool(t.frozen.kept), keep)
        return t

    def test_kept_against_recomputed(self):
        """Probe and partial unfreezing from kept outputs of the frozen part, and from recomputed ones."""
        for regime in ("linear_probe", "partial_unfreeze"):
            a, b = (self.weights_after(regime, keep) for keep in (True, False))
            off = max(float((v - b.best["weights"][k]).abs().max()) for k, v in a.best["weights"].items())
            self.assertLess(off, 5e-4)
            self.assertAlmostEqual(a.best["accuracy"], b.best["accuracy"], delta=0.035)  # one image of 30
            self.say(f"{regime}: weights differ by {off:.1e} at most")

    def test_cache_budget(self):
        """--cache-gb decides; a rebuilt cache is the same to the bit."""
        kept = []
        for budget in (1, 1, 0):
            t = self.trainer("partial_unfreeze", "--cache-gb", budget)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                t.frozen.compute(t.laps)
            self.assertIn("GB, budget", out.getvalue())
            kept.append(t.frozen.kept)
        self.assertTrue(same(kept[0], kept[1]))
        self.assertEqual((list(kept[0]), list(kept[2])), (["train", "val"], []))
        t = self.trainer("partial_unfreeze")
        t.frozen.in_memory, t.run.world = True, 2  # begun by one process, continued by two
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertFalse(t.frozen.fits(10))
        self.assertIn("recomputed for every batch (several processes)", out.getvalue())
        self.say("kept with 1 GB, twice the same bits; not kept with 0, nor by several processes")

    def test_memory_limits(self):
        """The tightest control group around it counts, of either version; old file pages are free."""
        total, page = 1 << 30, 1 << 20
        trees = {
            "0::/job_7/step_0\n": ("job_7", "max", "current", "inactive_file"),
            "9:cpu:/x\n4:cpu,memory:/user/job_7\n": (
                *("memory/user", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
            ),
        }
        for k, (told, (group, limit, used, cache)) in enumerate(trees.items()):
            system, limit, used = self.tmp / f"system{k}", f"memory.{limit}", f"memory.{used}"
            folder = system / "sys/fs/cgroup" / group
            folder.mkdir(parents=True)
            (system / "proc/self").mkdir(parents=True)
            (system / "proc/self/cgroup").write_text(told)
            (folder / limit).write_text(f"{total}\n")
            (folder / used).write_text(f"{300 * page}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{cache} {100 * page}\n")
            (folder.parent / limit).write_text("max\n")
            self.assertEqual(list(r.cgroups_left(system)), [total - 200 * page])
        self.assertEqual(list(r.cgroups_left(self.tmp / "none")), [])
        with mock.patch.object(r, "cgroups_left", return_value=[5 * page, 3 * page]):
            self.assertEqual(r.free_bytes(torch.device("cpu")), 3 * page)
        here = r.free_bytes(torch.device("cpu")) >> 20
        self.say(f"824 of 1,024 MiB left in either version; here {here:,} MiB")

    def test_peak_memory(self):
        """A regime's peak is its own: one that needs less, after another, is told less."""
        if not Path("/proc/self/clear_refs").exists():
            self.skipTest("no /proc/self/clear_refs here")
        device, peaks = torch.device("cpu"), []
        for size in (400, 100):  # MiB
            r.reset_peak(device)
            before = r.peak_bytes(device)
            with mmap.mmap(-1, size << 20) as held:  # pages of its own, not what earlier tests left
                for _ in range(size):
                    held.write(bytes(1 << 20))
            peaks.append((r.peak_bytes(device) - before) >> 20)
        self.assertTrue(350 <= peaks[0] <= 450 and 50 <= peaks[1] <= 150, peaks)
        self.say(f"400 and 100 MiB allocated: peaks {peaks[0]} and {peaks[1]} MiB above the start")

    def test_float32(self):
        """float32 stays float32 on a GPU: cuDNN's default, TF32, keeps 10 bits of the mantissa."""
        torch.backends.cudnn.allow_tf32 = True
        r.Run(r.parse_args(["--device", "cpu"]))
        self.assertFalse(torch.backends.cudnn.allow_tf32)
        self.assertFalse(torch.backends.cuda.matmul.allow_tf32)
        self.say("no TF32")

    def test_stopped_while_it_saves(self):
        """A stop that is asked for during a stage's last save acts before the next thing begins."""
        t = self.trainer("linear_probe", "--epochs", 1)
        t.finish_epoch = lambda: (type(t).finish_epoch(t), t.run.ask_stop())
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertRaises(r.Stopped, t.train)
        self.assertTrue(r.load_checkpoint(t.folder)["done"])
        self.say("stopped, the stage saved as done")

    def test_amp(self):
        """bf16 trains to about the same loss as float32; fp16 without CUDA is refused."""
        losses = []
        for amp in ("off", "bf16"):
            t = self.weights_after("partial_unfreeze", True, "--amp", amp)
            losses.append(t.progress["history"][-1]["train_loss"])
        self.assertAlmostEqual(losses[0], losses[1], delta=0.1 * losses[0])
        with self.assertRaisesRegex(r.InputError, "needs a CUDA device"):
            r.choose_amp("fp16", torch.device("cpu"))
        self.say(
            f"loss {losses[0]:.4f} in float32, {losses[1]:.4f} in bf16; auto here: "
            + r.choose_amp("auto", torch.device("cpu"))
        )

    def test_early_stopping(self):
        """Patience in epochs, min-delta in accuracy, and the best weights, not the last, are restored."""
        t = self.trainer("linear_probe", "--epochs", 20, "--patience", 3)
        script = iter([0.5, 0.6, 0.6 + r.MIN_DELTA / 2, 0.55, 0.59, 0.99])
        weights = []

        def validate():
            weights.append(t.model.fc.weight.detach().clone())
            return 1.0, next(script), 0.0

        t.validate = validate
        with contextlib.redirect_stdout(io.StringIO()):
            t.train()
        self.assertEqual((t.epoch, t.stale, t.best["epoch"]), (5, 3, 3))
        self.assertTrue(torch.equal(t.model.fc.weight, weights[2]))
        self.assertFalse(torch.equal(t.model.fc.weight, weights[4]))
        self.assertTrue(t.summary()["early_stopped"])
        self.say("stopped after epoch 5 of 20, epoch 3 restored")

    def test_steps(self):
        """Every image once an epoch, in steps of equal size; warm-up, then down to zero."""
        t = self.trainer("linear_probe", "--batch-size", 64, "--epochs", 3, "--warmup-epochs", 1)
        seen, rates = [], []
        t.frozen = lambda part, index, theta: seen.append(index) or torch.zeros(len(index), 512)
        for t.epoch in range(3):
            t.step = 0
            order = torch.randperm(t.n, generator=r.rng(0, "order", 0, t.epoch))
            while t.step < t.steps:
                t.train_step(order)
                rates.append(t.optimizer.param_groups[0]["lr"])
        sizes = {len(index) for index in seen}
        for epoch in range(3):
            index = torch.cat(seen[epoch * t.steps : (epoch + 1) * t.steps])
            self.assertTrue(torch.equal(index.sort().values, torch.arange(t.n)))
        self.assertLessEqual(max(sizes) - min(sizes), 1)
        self.assertEqual(rates[: t.steps], sorted(rates[: t.steps]))
        self.assertEqual(rates[t.steps :], sorted(rates[t.steps :], reverse=True))
        self.assertLess(rates[-1], 0.1 * max(rates))
        self.say(
            f"{t.n} images in {t.steps} steps of {sorted(sizes)}; rate {rates[0]:.1e} to {max(rates):.1e} "
            f"to {rates[-1]:.1e}"
        )

    def test_not_finite(self):
        """A diverged loss ends the run with its step and leaves the last good checkpoint."""
        out = self.tmp / "nan"
        plain, calls = r.Trainer.logits, [0]

        def poisoned(self, x):
            calls[0] += 1
            return plain(self, x) * (math.nan if calls[0] > 7 else 1)

        flags = small_flags(self.data, "--regimes", "linear_probe", "--batch-size", 64, "--out", out)
        with mock.patch.object(r.Trainer, "logits", poisoned):
            status, _, err = call_resnet(*flags)
        self.assertEqual(status, 1)
        self.assertRegex(err, r"^error: the loss is nan at step 2/5 of epoch 2")
        self.assertEqual(r.load_checkpoint(out / "linear_probe")["epoch"], 1)
        self.say(err.strip())

    def test_overfit(self):
        t = self.trainer("full", "--epochs", 12, "--limit", 62, "--batch-size", 32, "--warmup-epochs", 0)
        with contextlib.redirect_stdout(io.StringIO()):
            t.train()
        accuracy = t.progress["history"][-1]["train_accuracy"]
        self.assertGreater(accuracy, 0.95)
        self.say(f"{accuracy:.1%} of {t.n} images after {t.epoch} epochs")


class ResnetMetrics(ResnetCase):
    def test_against_scikit_learn(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(0, 62, (500,), generator=generator)
        logits = torch.randn(500, 62, generator=generator) + 2 * F.one_hot(y, 62)
        said, ours = logits.argmax(1), r.test_metrics(y, logits)
        self.assertEqual(ours["test_f1_macro"], metrics.f1_score(y, said, average="macro", zero_division=0))
        self.assertEqual(
            ours["test_recall_macro"], metrics.recall_score(y, said, average="macro", zero_division=0)
        )
        self.assertEqual(ours["test_accuracy"], float((y == said).double().mean()))
        top5 = float((logits.topk(5).indices == y[:, None]).any(1).double().mean())
        self.assertAlmostEqual(ours["test_top5"], top5, places=12)
        self.assertAlmostEqual(r.macro_f1(y, said, 62), ours["test_f1_macro"], places=12)
        confusion = metrics.confusion_matrix(y, said, labels=range(62))
        f1 = metrics.f1_score(y, said, average=None, labels=range(62), zero_division=0)
        table = r.per_class(confusion, r.CLASSES)
        np.testing.assert_allclose([row["f1"] for row in table], f1)
        self.say(f"macro-F1 {ours['test_f1_macro']:.4f}, top-5 {ours['test_top5']:.4f}, 62 classes: equal")

    def test_prior_correction(self):
        """On a rare class that the prior hides, the offset found on validation helps macro-F1."""
        generator = torch.Generator().manual_seed(0)
        prior = torch.tensor([0.95, 0.05]).double().log()
        y = (torch.rand(4000, generator=generator) < 0.05).long()
        evidence = torch.randn(4000, generator=generator) + 1.5 * (2 * y - 1)
        logits = torch.stack([-1.5 * evidence, 1.5 * evidence], 1) + prior
        tau = r.tune_tau(logits, y, prior)
        plain, better = (r.macro_f1(y, (logits - t * prior).argmax(1), 2) for t in (0, tau))
        self.assertGreater(better, plain)
        self.say(f"prior correction: tau {tau}, macro-F1 {plain:.4f} -> {better:.4f}")


class ResnetRuns(ResnetCase):
    FLAGS = ("--regimes", "gradual", "--epochs", 2, "--batch-size", 64, "--limit", 200)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.log = cls.tmp / "log"
        cls.argv = small_flags(cls.data, *cls.FLAGS, "--out")
        status = finish(start([*cls.argv, cls.tmp / "whole"], cls.log))
        assert status == 0, cls.log.read_text()
        cls.whole = results(cls.tmp / "whole")

    def test_files(self):
        """Everything that a run leaves, and a second call that finds all done."""
        out = self.tmp / "whole"
        names = {p.name for p in out.iterdir()}
        self.assertEqual(
            names,
            {
                ".lock",
                "args.json",
                "samples.png",
                "gradual",
                *(f"comparison.{kind}" for kind in ("json", "md", "png")),
            },
        )
        names = {p.name for p in (out / "gradual").iterdir()}
        self.assertEqual(
            names,
            {
                "metrics.json",
                "log.csv",
                "best.pt",
                "last.pt",
                "curves.png",
                "confusion.png",
                "confusions_top.png",
                "confusion.csv",
                "per_class.csv",
            },
        )
        row = self.whole["gradual"][1]
        self.assertEqual((row["trainable_params"], row["update_budget"]), (11_208_318, 6 * 180))
        self.assertEqual([s["trains"] for s in row["stages"]], ["fc", "layer4", "all"])
        clock = time.perf_counter()
        status, text, _ = call_resnet(*self.argv, out)
        lines = text.splitlines()
        self.assertEqual(status, 0)
        self.assertTrue(lines[0].startswith("continue with: ") and lines[-1] == lines[0])
        self.assertIn("all is done", lines[1])
        self.say(f"complete; the same command again: {time.perf_counter() - clock:.2f}s")

    def test_stop_in_a_library(self):
        """A signal while a file is read is not that file's error; if swallowed, it acts at the next step."""
        run = r.Run(r.parse_args(["--device", "cpu"]))
        with mock.patch.object(r.zipfile, "ZipFile", side_effect=run.ask_stop):
            self.assertRaises(r.Stopped, r.load_file, self.tmp / "file")
        saved = []
        self.assertRaises(r.Stopped, run.poll, lambda: saved.append(1))
        self.assertEqual(saved, [1])
        self.say("Stopped, then and at the next step")

    def test_other_arguments(self):
        out = self.tmp / "whole"
        status, _, err = call_resnet(*self.argv, out, "--lr", 0.1, "--seed", 3, "--checkpoint-minutes", 9)
        self.assertEqual(status, 2)
        self.assertIn("other arguments: --lr None, now 0.1; --seed 0, now 3", err)
        self.say(err.strip()[-60:])

    def test_killed(self):
        """SIGKILL at steps and within writes: the results are an undisturbed run's, bit for bit."""
        kills = [("forward", 1), ("half", 3), ("before", 4), ("after", 7), ("step", 5), ("half", 2)]
        met = killed_run(self.argv, self.tmp / "killed", self.log, kills)
        self.assertEqual(met, len(kills))
        self.assertTrue(same(results(self.tmp / "killed"), self.whole))
        self.say(f"{met} kills ({', '.join(f'{point} {count}' for point, count in kills)}): identical")

    def test_terminated(self):
        """SIGTERM: saved, exit 75, continued to the same bits."""
        out = self.tmp / "terminated"
        process = start([*self.argv, out], self.log)
        while process.is_alive() and not (out / "gradual" / "last.pt").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGTERM)
        self.assertEqual(finish(process), 75)
        held = r.load_checkpoint(out / "gradual")
        self.assertEqual(finish(start([*self.argv, out], self.log)), 0)
        self.assertTrue(same(results(out), self.whole))
        self.say(
            f"75 in stage {held['number'] + 1}, epoch {held['epoch'] + 1}, step {held['step']}; identical"
        )

    def test_torn_checkpoint(self):
        """A torn or changed last.pt is reported; the one before it is used."""
        out = self.tmp / "torn"
        process = start([*self.argv, out, "--checkpoint-minutes", 0], self.log, kill=("step", 9))
        self.assertEqual(finish(process), -signal.SIGKILL)
        last = out / "gradual" / "last.pt"
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        log = self.tmp / "torn.log"
        self.assertEqual(finish(start([*self.argv, out], log)), 0)
        self.assertIn("last.pt is torn or corrupted (wrong checksum", log.read_text())
        self.assertIn("continuing in epoch", log.read_text())
        self.assertTrue(same(results(out), self.whole))
        self.say("one bit changed: reported, continued from last.pt.prev, identical")

    def test_full_disk(self):
        """A save that fails ends the run with a clear line; the checkpoint before it is whole."""
        out = self.tmp / "full"
        plain, calls = os.fsync, [0]

        def fsync(descriptor):
            calls[0] += 1
            if calls[0] > 12:
                raise OSError(28, "No space left on device")
            plain(descriptor)

        with mock.patch.object(os, "fsync", fsync):
            status, _, err = call_resnet(*self.argv, out, "--checkpoint-minutes", 0)
        self.assertEqual(status, 1)
        self.assertRegex(err, "could not be saved .No space left on device.; the one before it stands")
        self.assertIsNotNone(r.load_checkpoint(out / "gradual"))
        self.say(err.strip()[-80:])

    def test_two_runs(self):
        out = self.tmp / "two"
        out.mkdir()
        with r.folder_lock(out):
            status, _, err = call_resnet(*self.argv, out)
        self.assertEqual(status, 2)
        self.assertIn("another run is writing into", err)
        self.say(err.strip()[:50])

    def test_compare(self):
        target = self.tmp / "compared"
        status, text, _ = call_resnet(
            "--compare", self.tmp / "whole", self.tmp / "whole" / "gradual", "--out", target
        )
        self.assertEqual(status, 0)
        self.assertEqual(len(json.loads((target / "comparison.json").read_text())["rows"]), 2)
        self.assertIn("| gradual (32 px, seed 0) |", text)
        status, _, err = call_resnet("--compare", self.tmp, "--out", target)
        self.assertEqual(status, 2)
        cnn = self.tmp / "cnn-run"
        cnn.mkdir()
        (cnn / "metrics.json").write_text('{"dataset": "mnist", "train_seconds": 8.0, "test_accuracy": 0.99}')
        status, _, other = call_resnet("--compare", cnn, "--out", target)
        self.assertEqual((status, other.count("\n")), (2, 1))
        self.assertIn("is not of this script", other)
        self.say(err.strip()[-60:])


def killed_run(argv, out, log, kills):
    """The run, killed at each of the points in turn, then to its end; returns how many of them it met."""
    met = 0
    for kill in [*kills, None]:
        status = finish(start([*argv, out, "--checkpoint-minutes", 0], log, kill=kill))
        assert status in (0, -signal.SIGKILL), f"status {status}: {Path(log).read_text()[-2000:]}"
        if status == 0:  # done, before the point came
            return met
        met += 1


class ResnetProcesses(ResnetCase):
    def two(self, argv, gradients=None):
        """The exit statuses of two processes that work together."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
        ranks = [start(argv, self.tmp / "log", env | {"RANK": str(k)}, gradients=gradients) for k in range(2)]
        return [finish(p) for p in ranks]

    def test_bad_input(self):
        """What one process finds wrong ends both, with one line."""
        foreign = self.tmp / "foreign"
        foreign.mkdir()
        (foreign / "thesis.tex").write_text("mine")
        torn = self.tmp / "torn"
        write_emnist(torn)
        path = r.emnist_files(torn)["train", "images"][0]
        path.write_bytes(path.read_bytes()[:1000])
        cases = (
            (small_flags(self.data, "--out", foreign), "holds other files"),
            (small_flags(torn, "--out", self.tmp / "new"), "no whole IDX file"),
        )
        for argv, text in cases:
            (self.tmp / "log").write_text("")
            statuses = self.two(argv)
            log = (self.tmp / "log").read_text()
            self.assertEqual((statuses, log.count("error: ")), ([2, 2], 1), log)
            self.assertIn(text, log)
            self.assertNotIn("Traceback", log)
        self.say(log.strip().splitlines()[-1][:70])

    def test_two_against_one(self):
        """The probe with two gloo processes: first gradients and result of one process."""
        base = ("--regimes", "linear_probe", "--amp", "off", "--epochs", 3, "--batch-size", 64, "--out")
        argv = small_flags(self.data, *base)
        self.assertEqual(
            finish(start([*argv, self.tmp / "one"], self.tmp / "log", gradients=self.tmp / "g1")), 0
        )
        statuses = self.two([*argv, self.tmp / "two"], gradients=self.tmp / "g2")
        self.assertEqual(statuses, [0, 0], (self.tmp / "log").read_text())
        one = torch.load(self.tmp / "g1.0")
        for k in range(2):
            two = torch.load(self.tmp / f"g2.{k}")
            off = max(float((a - b).norm() / a.norm()) for a, b in zip(one, two, strict=True))
            self.assertLess(off, 1e-5)
        rows = [self.tmp / n / "linear_probe" / "metrics.json" for n in ("one", "two")]
        rows = [json.loads(path.read_text()) for path in rows]
        self.assertAlmostEqual(
            rows[0]["test_accuracy"], rows[1]["test_accuracy"], delta=0.011
        )  # one image of 100
        self.assertEqual(rows[1]["processes"], 2)
        self.say(
            f"first gradients within {off:.1e}, accuracy {rows[0]['test_accuracy']:.2%} and "
            f"{rows[1]['test_accuracy']:.2%}"
        )


class ResnetPredict(ResnetCase):
    def test_predict(self):
        """Either polarity, any size, transparency: the same 28x28 image, centred with a margin of two."""
        dark = Image.new("L", (300, 200), 245)
        ImageDraw.Draw(dark).line((100, 30, 140, 170), fill=10, width=14)
        light = Image.fromarray(255 - np.asarray(dark))
        small, clear = dark.resize((75, 50)), Image.new("RGBA", (300, 200), (255, 255, 255, 0))
        ImageDraw.Draw(clear).line((100, 30, 140, 170), fill=(10, 10, 10, 255), width=14)
        read = []
        for i, picture in enumerate((dark, light, small, clear)):
            path = self.tmp / f"{i}.png"
            picture.save(path)
            read.append(r.read_character(path)[0].float())
        for image in read:
            rows, columns = (image > 60).any(1).nonzero(), (image > 60).any(0).nonzero()
            self.assertEqual((int(rows[0]), int(rows[-1])), (2, 25))
            self.assertAlmostEqual(float(columns.float().mean()), 13.5, delta=0.51)
        off = [float((image - read[0]).abs().mean()) for image in read[1:]]
        self.assertLess(max(off), 8)
        model = r.build_model(62, None, 0)
        state = {"model": model.state_dict(), "classes": r.CLASSES, "image_size": 32}
        torch.save(state, self.tmp / "best.pt")
        paths = [self.tmp / "0.png", self.tmp / "1.png"]
        status, text, _ = call_resnet(
            "--predict", *paths, "--checkpoint", self.tmp / "best.pt", "--device", "cpu"
        )
        self.assertEqual((status, text.count("\n"), text.count("%")), (0, 2, 10))
        self.say(f"mean difference {max(off):.2f} levels; {text.splitlines()[0].split(':', 1)[1]}")

    def test_bad_images(self):
        blank, broken = self.tmp / "blank.png", self.tmp / "broken.png"
        Image.new("L", (40, 40), 200).save(blank)
        broken.write_bytes(b"\x89PNG nothing")
        noise = np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8)
        chunk = self.tmp / "chunk.png"  # damaged behind its first block of pixels
        Image.fromarray(noise).save(chunk)
        held = bytearray(chunk.read_bytes())
        second = held.index(b"IDAT", held.index(b"IDAT") + 4)
        held[second : second + 4] = b"\x00\x01\x02\x03"
        chunk.write_bytes(held)
        state = {"model": r.build_model(62, None, 0).state_dict(), "classes": r.CLASSES, "image_size": 32}
        torch.save(state, self.tmp / "best.pt")
        (self.tmp / "none.pt").write_bytes(b"no checkpoint")
        for image, checkpoint, text in (
            (blank, "best.pt", "shows no character"),
            (broken, "best.pt", "can't be read"),
            (chunk, "best.pt", "can't be read"),
            (self.tmp / "missing.png", "best.pt", "can't be read"),
            (blank, "none.pt", "is no best.pt"),
        ):
            status, _, err = call_resnet(
                "--predict", image, "--checkpoint", self.tmp / checkpoint, "--device", "cpu"
            )
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertIn(text, err)
        status, _, err = call_resnet("--predict", blank)
        self.assertIn("needs --checkpoint", err)
        self.say("six clear lines")


class ResnetBadInput(ResnetCase):
    def test_flags(self):
        cases = (
            (["--regimes", "probe"], "probe is unknown or repeated"),
            (["--regimes", "full", "full"], "full is unknown or repeated"),
            (["--image-size", "16"], "16 is not at least 32"),
            (["--patience", "0"], "0 is not at least 1"),
            (["--epochs", "0"], "0 is not at least 1"),
            (["--batch-size", "-4"], "-4 is not at least 1"),
            (["--lr", "0"], "0 is not above 0"),
            (["--lr", "nan"], "nan is not above 0"),
            (["--limit", "3"], "3 is not at least 10"),
            (["--epochs", "two"], "invalid number value: 'two'"),
            (["--amp", "fp16"], "--amp fp16 needs a CUDA device"),
            (["--nonsense"], "unrecognized arguments"),
            (["--weights", "nowhere.pth"], "no readable state dict"),
            (["--batch-size", "1", "--regimes", "full"], "images for a process and step are too few"),
        )
        for i, (flags, text) in enumerate(cases):
            status, _, err = call_resnet(*small_flags(self.data, *flags, "--out", self.tmp / f"bad{i}"))
            self.assertEqual((status, err.count("\n"), err[:7]), (2, 1, "error: "), err)
            self.assertIn(text, err)
        if not torch.cuda.is_available():
            status, _, err = call_resnet(*small_flags(self.data, "--device", "cuda"))
            self.assertIn("there is no cuda device here", err)
        self.say(f"{len(cases)} clear lines")

    def test_folders(self):
        holding, file = self.tmp / "holding", self.tmp / "file"
        holding.mkdir()
        (holding / "thesis.tex").write_text("mine")
        file.write_text("")
        for out, text in ((holding, "holds other files (thesis.tex)"), (file / "below", "cannot be used")):
            status, _, err = call_resnet(*small_flags(self.data, "--out", out))
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertIn(text, err)
        self.assertEqual([p.name for p in holding.iterdir()], ["thesis.tex"])
        flags = small_flags(file / "data", "--out", self.tmp / "unused")
        status, _, err = call_resnet(*flags)
        self.assertIn("cannot write there", err)
        self.say("three clear lines, nothing touched")

    def test_data_files(self):
        def images(root):
            return root / "EMNIST" / "raw" / "emnist-byclass-train-images-idx3-ubyte"

        def labels(root):
            return root / "EMNIST" / "raw" / "emnist-byclass-train-labels-idx1-ubyte"

        cases = (
            (lambda d: images(d).write_bytes(images(d).read_bytes()[:-5]), "bytes, expected"),
            (lambda d: images(d).write_bytes(b"\0\0"), "is not readable"),
            (lambda d: write_idx(labels(d), np.zeros(299)), "300 images of [28, 28] pixels and 299 labels"),
            (lambda d: write_idx(labels(d), np.full(300, 62)), "train labels reach 62, expected 0 to 61"),
            (lambda d: write_idx(images(d), np.zeros((300, 8, 8))), "300 images of [8, 8] pixels"),
        )
        for i, (spoil, text) in enumerate(cases):
            root = self.tmp / f"data{i}"
            write_emnist(root)
            spoil(root)
            status, _, err = call_resnet(*small_flags(root, "--out", self.tmp / f"spoilt{i}"))
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertIn(text, err)
        self.say(f"{len(cases)} clear lines")

    def test_out_of_memory(self):
        for error in (
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("can't allocate memory: 9 bytes"),
        ):
            with mock.patch.object(r.Trainer, "train_step", side_effect=error):
                status, _, err = call_resnet(*small_flags(self.data, "--out", tempfile.mkdtemp(dir=self.tmp)))
            self.assertEqual(status, 1)
            self.assertIn("--cache-gb 0", err)
        self.say(err.strip())

    def test_import(self):
        """Importing the script prints and makes nothing."""
        code = "import sys; sys.path.insert(0, sys.argv[1]); import resnet18"
        here, empty = str(Path(r.__file__).parent), Path(tempfile.mkdtemp(dir=self.tmp))
        done = subprocess.run([sys.executable, "-c", code, here], cwd=empty, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, list(empty.iterdir())), (0, "", []))
        self.say("silent")


# ---------------------------------------------------------------------------------------------- documents


class Documents(Case):
    """README.md and the report's text against the results and the scripts."""

    def setUp(self):
        super().setUp()
        self.root = Path(__file__).resolve().parent
        if not (self.root / "README.md").exists() or not (self.root / "report").exists():
            self.skipTest(
                "no README.md and report/ beside this file"
            )  # a job runs a copy of the scripts alone
        self.readme = (self.root / "README.md").read_text()

    def tables(self):
        spec = importlib.util.spec_from_file_location("tables", self.root / "report" / "tables.py")
        tables = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tables)
        return tables

    def test_own_runs(self):
        """The report's numbers from other runs: MNIST's before the digits', five epochs, a variant alone."""
        tables, results = self.tables(), self.tmp / "results"
        for name, argument, value in (
            ("mnist", "seed", 0),
            ("digits", "dataset", "digits"),
            ("long", "epochs", 9),
        ):
            folder = results / name
            shutil.copytree(self.root / "report" / "results" / "mnist-seed0", folder)
            told, held = (json.loads((folder / f"{k}.json").read_text()) for k in ("args", "metrics"))
            (folder / "args.json").write_text(json.dumps(told | {argument: value}))
            (folder / "metrics.json").write_text(json.dumps(held | {argument: value, "test_accuracy": 0.5}))
        found = tables.numbers_of(results)
        self.assertEqual([found[f"mnist/{k}"] for k in ("dataset", "epochs", "seeds")], ["MNIST", "5", "1"])
        names = [row[0] for row in tables.mnist_table(results)[1:]]
        self.assertEqual(len(set(names)), 3, names)
        shutil.copytree(self.root / "report" / "results" / "emnist-12k-64px-augment", results / "augmented")
        alone = tables.numbers_of(results)
        self.assertGreater(len(alone), len(found))
        self.say(", ".join(names))

    def test_tables(self):
        """README's tables are those that report/tables.py makes from report/results."""
        tables = self.tables()
        results = self.root / "report" / "results"
        self.assertEqual(
            self.readme, tables.with_tables(self.readme, results), "run report/tables.py --readme"
        )
        rows = {name: len(table(results)) - 1 for name, table in tables.TABLES.items()}
        self.assertGreater(min(rows.values()), 0, rows)
        self.assertEqual(set(re.findall(r"<!-- table ([\w-]+) -->", self.readme)), set(rows))
        self.say(", ".join(f"{name} {n} rows" for name, n in rows.items()))

    def commands(self):
        """Every command of README's bash blocks and of its `inline code` that begins like one."""
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", self.readme, re.S)).splitlines()
        inline = re.findall(
            r"`((?:\w+=\S+ )*(?:python|torchrun|sbatch|\./setup_env\.sh|report/)[^`]*)`", self.readme
        )
        for line in [re.sub(r" +#.*", "", line) for line in blocks] + inline:
            words = shlex.shlex(line.replace("…", "x"), posix=True, punctuation_chars="&;")
            words.whitespace_split, words.commenters = True, ""
            for separator, part in itertools.groupby(words, lambda word: word in ("&&", ";")):
                if not separator:
                    yield list(part)

    def test_commands(self):
        """Every script, file, flag and value that README's commands name is there."""
        count = 0
        for words in self.commands():
            with self.subTest(command=" ".join(words)):
                count += self.accepts([w for w in words if not re.match(r"[A-Z_]+=", w)])
        self.assertGreater(count, 25)
        self.say(f"{count} commands")

    def accepts(self, words):
        """1 for a command of this project whose arguments are accepted, 0 for another program's."""
        if words[0] == "./setup_env.sh" and words[1:] not in ([], ["--container"], ["CMD", "x"]):
            words = words[1:]
        if words[0].endswith((".sh", "setup_env.sh")):
            self.assertTrue((self.root / words[0]).exists())
            return 1
        script = next((w for w in words if w.endswith((".py", ".sbatch"))), None)
        if script is None or "-m" in words:
            return 0
        self.assertTrue((self.root / script).exists(), script)
        given = words[words.index(script) + 1 :]
        parse = {"cnn_from_scratch.py": c.parse, "run_cnn.sbatch": c.parse}
        parse |= {"resnet18.py": r.parse_args, "run_resnet.sbatch": r.parse_args}
        if script in parse and given[:1] != ["--help"]:
            parse[script](given)
        return 1

    def test_report_numbers(self):
        r"""No number is typed into the report's text: \R{...}, formulas and names aside, none is left."""
        text = (self.root / "report" / "report.tex").read_text().split(r"\begin{document}")[1]
        text = re.sub(r"\\begin\{thebibliography\}.*?\\end\{thebibliography\}", "", text, flags=re.S)
        used = set(re.findall(r"\\R\{([^}]*)\}", text))
        for pattern in (
            r"(?m)(?<!\\)%.*$",
            r"\\R\{[^}]*\}",
            r"\\(label|ref|image|input|VerbatimInput|cite)(\[[^]]*\])?(\{[^}]*\}){1,2}",
            r"\\\[.*?\\\]|\$[^$]*\$",
            r"\\\\\[[^]]*\]",
            r"[Tt]ask \d|[A-Za-z]-?\d+",
            r"0, O and o, or 1, l and I",
        ):
            text = re.sub(pattern, " ", text, flags=re.S if r"\[" in pattern else 0)
        left = re.findall(r".{0,30}\d.{0,20}", text)
        self.assertEqual(left, [])
        self.assertGreater(len(used), 60)
        self.say(f"{len(used)} numbers, all of them from report/results")


# ---------------------------------------------------------------------------------------------- soak


def soak(n):
    """n kills at random points, over as many runs as that takes, each compared with an undisturbed one."""
    rng = random.Random(int(time.time()))
    with tempfile.TemporaryDirectory() as name:
        tmp, left, runs = Path(name), n, 0
        write_emnist(tmp / "data")
        argv = small_flags(tmp / "data", *ResnetRuns.FLAGS, "--out")
        assert finish(start([*argv, tmp / "whole"], tmp / "log")) == 0
        whole = results(tmp / "whole")
        while left > 0:
            runs += 1
            points = ("step", "forward", "half", "before", "after")
            kills = [(rng.choice(points), rng.randint(1, 9)) for _ in range(min(left, 8))]
            left -= killed_run(argv, tmp / f"run{runs}", tmp / "log", kills)
            assert same(results(tmp / f"run{runs}"), whole), kills
            print(f"soak: {n - left}/{n} kills, {runs} runs, every one identical", flush=True)


# ---------------------------------------------------------------------------------------------- the runner


def label(test):
    return test.id().replace("__main__.", "").replace(".test_", ".")


class Result(unittest.TestResult):
    """Counts whole tests, shows a failure where it happens, and keeps each test's seconds."""

    def __init__(self):
        super().__init__()
        self.passed, self.failed, self.seconds = 0, set(), {}

    def startTest(self, test):
        super().startTest(test)
        self.clock = time.perf_counter()

    def stopTest(self, test):
        super().stopTest(test)
        self.seconds[label(test)] = time.perf_counter() - self.clock

    def addSuccess(self, test):
        self.passed += 1

    def addError(self, test, err):
        self.failed.add(label(test))
        print(f"{label(test):34} FAILED\n{self._exc_info_to_string(err, test)}", flush=True)

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            print(subtest)
            self.addError(test, err)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print(f"{label(test):34} SKIPPED: {reason}", flush=True)


def select(names):
    """The tests in the order of this file; with names, those whose class or own name begins with one."""
    for case in list(globals().values()):
        if isinstance(case, type) and issubclass(case, unittest.TestCase):
            for test in (n for n in vars(case) if n.startswith("test_")):
                starts = f"{case.__name__}.{test}", f"{case.__name__}.{test[5:]}", test
                if not names or any(s.startswith(n) for s in starts for n in names):
                    yield case(test)


def main(argv):
    if argv[:1] == ["bench"]:
        script = Path(__file__).resolve().parent / "report" / "bench.py"
        if not script.exists():  # a batch job has a copy of the scripts alone
            print("bench needs report/bench.py beside this file, which is not there", file=sys.stderr)
            return 2
        return subprocess.run([sys.executable, script, *argv[1:]]).returncode
    if argv[:1] == ["soak"]:
        soak(int(argv[1]))
        return 0
    tests, clock = list(select(argv)), time.perf_counter()
    if not tests:
        print(f"no test's class or name begins with {' or '.join(argv)}", file=sys.stderr)
        return 2
    result = Result()
    unittest.TestSuite(tests).run(result)
    slow = sorted(result.seconds, key=result.seconds.get, reverse=True)[:5]
    print("\nslowest: " + ", ".join(f"{name} {result.seconds[name]:.1f}s" for name in slow))
    print(f"{time.perf_counter() - clock:.1f}s, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{result.passed} passed, {len(result.failed)} failed, {len(result.skipped)} skipped")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
