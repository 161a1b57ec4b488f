"""Tests of both scripts on random tensors and small made-up data: no network, nothing left behind.

    python tests.py                       # all of them; each prints what it measured
    python tests.py Layers Predict.photo  # those whose class or name begins so
    python tests.py bench                 # tables of speed, pass or fail nothing; `bench cnn` that one alone
    python tests.py soak 50               # resnet18.py killed 50 times at random points, compared bit by bit

The last line is `N passed, N failed, N skipped`; the exit status is 1 if one failed. pytest works as well.

The oracle of a gradient is torch's autograd in float64 on the CPU, with random upstream gradients.
"""

import collections
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
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

    def refused(self, *argv, says, out=None):
        """Status 2, and a last line on stderr that says all of these; the results folder stays as it was."""
        out = out or self.tmp / "refused"
        before = contents(out)
        status, text, err = call("--device", "cpu", *argv, "--out", out)
        self.assertEqual((contents(out), status, text), (before, 2, ""), err)
        *usage, line = err.splitlines()
        self.assertTrue(not usage or usage[0].startswith("usage: "), err)  # argparse's
        for part in says:
            self.assertIn(str(part), line)
        return line.replace(str(self.tmp), "...")


def error(got, want):
    """The largest difference over the largest number; infinite for other shapes and for nan or inf."""
    got, want = (t.detach().cpu().double() for t in (got, want))
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite], want[~finite]):
        return math.inf  # a pooling's -inf must be in the same places
    off, scale = (float(t[finite].abs().amax()) if finite.any() else 0 for t in (got - want, want))
    return off / max(scale, 1e-300)


DOUBLE, FLOAT = ({"device": "cpu", "dtype": dtype} for dtype in (torch.float64, torch.float32))
LAYERS = ("linear", "conv2d", "relu", "maxpool2d", "flatten", "cross entropy")


def random_layer(name, rng, device, dtype):
    """(layer, the same in torch, input, and targets for the loss), of random sizes and values."""
    N, C, O = (rng.randint(1, 5) for _ in range(3))
    kernel, stride, padding = ([rng.randint(*ends) for _ in "HW"] for ends in ((1, 4), (1, 4), (0, 2)))
    half = [min(p, k // 2) for p, k in zip(padding, kernel)]  # a pooling takes no more padding
    # height and width from just so that the kernel fits in to room to spare
    x = torch.randn(N, C, *(max(1, k - 2 * p) + rng.randint(0, 7) for k, p in zip(kernel, half)))
    if name in ("linear", "cross entropy") or (name in ("relu", "flatten") and rng.random() < 0.5):
        x = x[:, :, 0, 0]
    if rng.random() < 0.5:
        x = x.round()  # exact zeros; equal numbers, of which pooling takes the first
    if "maxpool2d" in name:
        x = x.masked_fill(torch.rand(x.shape) < rng.choice((0, 0.3, 1)), -math.inf)
    pool, where = (kernel, rng.choice((None, stride)), half), (device, dtype)
    maxpool, bias = lambda x: F.max_pool2d(x, *pool), rng.random() < 0.7
    conv = c.Conv2D(C, O, kernel, stride, padding, bias, *where)
    layer, reference = {
        "linear": (c.Linear(C, O, *where), lambda x, w, b: x @ w + b),
        "conv2d": (conv, lambda x, W, b=None: F.conv2d(x, W, b, stride, padding)),
        "relu": (c.ReLU(), F.relu),
        "maxpool2d": (c.MaxPool2D(*pool), maxpool),
        "relu, maxpool2d": (
            c.Sequential(c.ReLU(), c.MaxPool2D(*pool), reorder=True),
            lambda x: maxpool(x.relu()),
        ),
        "flatten": (c.Flatten(), lambda x: x.flatten(1)),
        "cross entropy": (c.CrossEntropy(), lambda x, y: F.cross_entropy(x, y.long())),
    }[name]
    for p in layer.parameters():
        p.normal_()  # biases not zero
    kinds = "int64 int32 int16 int8 uint8" + " uint16 uint32 uint64" * (device == "cpu")
    y = torch.randint(C, (N,)).to(getattr(torch, rng.choice(kinds.split()))).to(device)
    return layer, reference, x.to(device, dtype), *([y] if name == "cross entropy" else [])


def arrange(x, rng):
    """x with the same values in a random memory order, sometimes with gaps, or with one sample for all."""
    order, chance = rng.sample(range(x.dim()), x.dim()), rng.random()
    x = x.permute(order).contiguous().permute(np.argsort(order).tolist())
    if chance < 0.2:
        larger = x.new_full([2 * n for n in x.shape], math.nan)
        return larger[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    return x[:1].expand_as(x) if chance > 0.8 else x


def autograd(reference, g, params, x, *targets):
    """In float64 on the CPU: reference(x, *targets, *params), and its gradients for x and params."""
    leaves = [t.detach().cpu().double().contiguous().requires_grad_() for t in (x, *params)]
    out = reference(leaves[0], *(t.cpu() for t in targets), *leaves[1:])
    out.backward(g.cpu().double())
    return out, *(t.grad for t in leaves)


def compare(layer, reference, x, *targets, rng=None):
    """Worst relative error of layer(x) and its gradients against autograd's, for a random upstream gradient.

    On the way: autograd records nothing, though the input requires grad, as a checker's may; neither this
    call nor a later one modifies what a caller may keep; a late bwd() for this one gives the same again.
    """
    x, params, nested = x.detach().requires_grad_(), layer.parameters(), isinstance(layer, c.Sequential)
    before = [t.detach().clone() for t in (x, *params, *targets)]
    out = layer(x, *targets)
    g = torch.randn(out.shape, dtype=x.dtype).to(x.device)
    g = arrange(g, rng) if rng and g.dim() else g
    before += [g.clone(), out.clone()]
    out.g = g if g.dim() else float(g)  # a loss takes a plain number as well
    layer.backward(*([out] if nested else []))
    gradients = [t.g for t in (x, *params)]
    before += [t.clone() for t in gradients]
    off = max(map(error, (out, *gradients), autograd(reference, g, params, x, *targets)))
    assert not any(t.requires_grad for t in (out, *gradients))
    assert not vars(out).keys() & set(dir(torch.Tensor)), "an attribute hides a method"
    for t in (x, *params):
        assert t.g.dtype == t.dtype and t.g.device == t.device
        assert t.g.is_contiguous() or not t.is_contiguous(), "x.view(-1) works, x.g.view(-1) does not"
    if not nested:  # a Sequential's backward() takes the output of its last call alone
        other = layer(torch.randn_like(x[:1]), *(t[:1] for t in targets))
        other.g = torch.randn_like(other)
        layer.backward()
        layer.bwd(out, x, *targets)
        off = max(off, *(error(t.g, first) for t, first in zip((x, *params), gradients)))
    layer(x, *targets).fill_(7)
    kept = (x, *params, *targets, g, out, *gradients)
    assert all(map(torch.equal, kept, before)), "something was modified"
    return off


def worst(count, limit, **where):
    """The worst of `count` cases of each layer, in random memory orders, as a text; at most `limit`."""
    rng, found = random.Random(0), {}
    for name in (*LAYERS, "relu, maxpool2d"):
        for _ in range(count):
            layer, reference, x, *targets = random_layer(name, rng, **where)
            for weight in {"w", "W"} & vars(layer).keys():
                setattr(layer, weight, arrange(getattr(layer, weight), rng))
            x = arrange(x, rng)
            off = compare(layer, reference, x, *targets, rng=rng)
            assert off <= limit, f"{vars(layer)}: {off:.1e}; input {list(x.shape)}, strides {x.stride()}"
            found[name] = max(off, found.get(name, 0))
    return f"{count} cases each: " + ", ".join(f"{name} {off:.0e}" for name, off in found.items())


def cnn(x, W1, b1, W2, b2, w, b):
    """build_cnn() in torch's own functions."""
    x = F.max_pool2d(F.relu(F.conv2d(x, W1, b1, padding=1)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, W2, b2, padding=1)), 2)
    return x.flatten(1) @ w + b


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
    """The folder (or file) and what lies in it, with a hash of its bytes and the time of every file."""
    paths = [p for p in (folder, *sorted(folder.glob("*"))) if p.exists()]
    return {p.name: p.is_file() and (hash(p.read_bytes()), p.stat().st_mtime_ns) for p in paths}


def offline():
    return mock.patch.object(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def read_run(out):
    """What a run must repeat to the bit: metrics.json and the rows of log.csv but for times, best.pt."""
    rows = csv.DictReader(io.StringIO((out / "log.csv").read_text()))
    varies = {"seconds", "train_seconds", "total_seconds", "command"}
    figures = (json.loads((out / "metrics.json").read_text()), *rows)
    metrics, *log = ({k: v for k, v in each.items() if k not in varies} for each in figures)
    return metrics, log, (out / "best.pt").read_bytes()


# ---------------------------------------------------------------------------------------------- layers


class SideBySide(Case):
    """Every layer once: the same expression twice, by hand and by torch, with a random upstream gradient."""

    def same(self, *pairs):
        self.within(1e-12, max(error(mine, theirs) for mine, theirs in pairs), f"{len(pairs)} tensors")

    def test_linear(self):
        x, layer = torch.randn(4, 3, dtype=torch.float64), c.Linear(3, 2, **DOUBLE)
        tx, tw, tb = (t.clone().requires_grad_() for t in (x, layer.w, layer.b))
        mine, theirs = layer(x), tx @ tw + tb
        mine.g = torch.randn_like(mine)
        layer.backward()
        theirs.backward(mine.g)
        self.same((mine, theirs), (x.g, tx.grad), (layer.w.g, tw.grad), (layer.b.g, tb.grad))

    def test_conv2d(self):
        x, layer = torch.randn(2, 3, 7, 6, dtype=torch.float64), c.Conv2D(3, 4, (3, 2), 2, 1, **DOUBLE)
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

    def test_training_step(self):
        """A network, the loss and SGD: one step of each."""
        x, targets = torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.randint(5, (4,))
        convolution, linear = c.Conv2D(1, 3, 3, padding=1, **DOUBLE), c.Linear(27, 5, **DOUBLE)
        mine = convolution.W, convolution.b, linear.w, linear.b
        W, b, w, d = theirs = [p.clone().requires_grad_() for p in mine]
        model = c.Sequential(convolution, c.ReLU(), c.MaxPool2D(2), c.Flatten(), linear)
        criterion = c.CrossEntropy()

        logits = model(x)
        loss = criterion(logits, targets)
        criterion.backward()
        model.backward(logits)
        c.SGD(model.parameters(), lr=0.1).step()

        tlogits = F.max_pool2d(F.relu(F.conv2d(x, W, b, padding=1)), 2).flatten(1) @ w + d
        tloss = F.cross_entropy(tlogits, targets)
        tloss.backward()
        torch.optim.SGD(theirs, lr=0.1).step()
        self.same((logits, tlogits), (loss, tloss), *zip(mine, theirs))

    def test_cross_entropy(self):
        logits, targets = torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,))
        layer, tlogits = c.CrossEntropy(), logits.clone().requires_grad_()
        mine, theirs = layer(logits, targets), F.cross_entropy(tlogits, targets)
        layer.backward()
        theirs.backward()
        self.same((mine, theirs), (logits.g, tlogits.grad))


class Gradients(Case):
    """Against autograd in float64: compare() a random_layer(), in random sizes and memory orders.

    The numeric check, without autograd, is in report/gradients.py.
    """

    def test_float64(self):
        self.say(worst(250, 1e-12, **DOUBLE))

    def test_float32(self):
        self.say(worst(60, 1e-5, **FLOAT))

    def test_network_float32(self):
        """The real sizes have product kernels of their own."""
        exact, model, off = c.build_cnn(**DOUBLE), c.build_cnn(**FLOAT), 0.0
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
        for N in (64, 1, 640):
            x, y = c.to_input(torch.randint(256, (N, 28, 28), dtype=torch.uint8)), torch.randint(10, (N,))
            (_, ours, logits), (_, want, ideal) = step(model, x, y), step(exact, x.double(), y)
            off = max(off, *map(error, (logits, *ours), (ideal, *want)))
        self.within(1e-5, off, "batches of 64, 1, 640")


class Layers(Case):
    def test_same_tensors(self):
        """The same tensors with other numbers: nothing is known by identity. An empty batch, as in torch."""
        off = 0.0
        for name in 8 * LAYERS:
            layer, reference, x, *targets = random_layer(name, self.rng, **DOUBLE)
            off = max(off, 0 if targets else compare(layer, reference, x[:0]))
            for _ in range(2):
                for t in (x, *layer.parameters()):
                    t.normal_()
                off = max(off, compare(layer, reference, x, *targets))
        loss, gradients, logits = step(c.build_cnn("cpu"), torch.zeros(0, 1, 28, 28), torch.arange(0))
        self.assertEqual((logits.shape, math.isnan(loss)), ((0, 10), True))
        self.assertFalse(any(g.any() for g in gradients))
        self.within(1e-12, off, "other numbers, empty batches")

    def test_large_logits(self):
        logits, y = torch.randn(64, 10).mul(1e4), torch.randint(10, (64,))
        logits[:8] += torch.arange(8)[:, None] * 1e4  # one maximum for all rows would underflow here
        off = [compare(c.CrossEntropy(), F.cross_entropy, x, y) for x in (logits, logits.double())]
        self.within(1e-6, max(off), "logits of ±1e4")

    def test_parameters(self):
        """Glorot's uniform limits, with the kernel's area in both fans, on DEVICE, of the default dtype."""
        self.assertEqual(c.DEVICE.type, "cuda" if torch.cuda.is_available() else "cpu")
        self.addCleanup(torch.set_default_dtype, torch.float32)
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            for layer, fans in ((c.Conv2D(5, 6, 7), 11 * 49), (c.Linear(300, 200), 500)):
                weight = layer.parameters()[0] / math.sqrt(6 / fans)
                self.assertTrue(0.99 < float(weight.abs().max()) <= 1.000001)
                self.assertAlmostEqual(float(weight.std()), 1 / math.sqrt(3), delta=0.02)  # uniform
                self.assertFalse(layer.b.any())
                self.assertEqual({(p.dtype, p.device) for p in layer.parameters()}, {(dtype, c.DEVICE)})
        told = c.build_cnn("cpu", torch.float32).parameters()  # other than the default
        self.assertEqual({(p.dtype, p.device.type) for p in told}, {(torch.float32, "cpu")})
        self.say(f"uniform within the limits; {c.DEVICE} and the default dtype")


class NoAutograd(Case):
    """Nothing of torch's autograd, nor its kernels for these layers, in the script or at work."""

    def test_source(self):
        # docstrings and comments may name what the code may not
        source = re.sub(r'(?s)^ *""".*?"""$|#[^\n]*', "", Path(c.__file__).read_text(), flags=re.MULTILINE)
        words, functional = set(re.findall(r"\w+", source)), set(re.findall(r"\bF\.(\w+)", source))
        banned = re.compile(
            r"autograd|requires_grad|enable_grad|grad_fn|^grad$|functorch|^func$|vjp|jvp|_backward|backward_|"
            r"conv\d?d$|conv_|convolution|max_pool|avg_pool|cross_entropy|nll|log_softmax|^optim$"
        )
        found = sorted(filter(banned.search, words))
        self.say(f"{len(words)} words, banned: {found or 'none'}; torch.nn.functional: {sorted(functional)}")
        self.assertEqual(found, [])
        self.assertLessEqual(functional, {"pad", "interpolate"})

    def test_kernels(self):
        """Every kernel that a training step calls, by its name."""
        seen, model = set(), c.build_cnn(**FLOAT)

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
                seen.add(kernel.overloadpacket.__name__)
                return kernel(*args, **(kwargs or {}))

        with Record():
            step(model, torch.randn(4, 1, 28, 28), torch.arange(4))
            c.SGD(model.parameters(), 0.1, 0.9, True, 5e-4).step()
        banned = sorted(k for k in seen if re.search(r"conv|pool|backward|softmax|nll|entropy|threshold", k))
        self.say(f"{len(seen)} kernels in a step, banned: {banned or 'none'}")
        self.assertEqual((banned, len(seen) > 10), ([], True))


class Composed(Case):
    """Layers put together as students put them together: right, or refused with a sentence that helps."""

    def test_course_check(self):
        """The course's own end-to-end check: the second epoch's mean loss is below the first's."""
        first = []
        for seed in range(50):
            torch.manual_seed(seed)
            x = torch.randn(128, 1, 28, 28).to(c.DEVICE)
            y = (x.mean((1, 2, 3)) > 0).long()
            model = c.Sequential(
                *(c.Conv2D(1, 4, 3, padding=1), c.ReLU(), c.MaxPool2D(2, 2)),
                *(c.Conv2D(4, 8, 3, padding=1), c.ReLU(), c.MaxPool2D(2, 2)),
                *(c.Flatten(), c.Linear(392, 10)),
            )
            sgd, data = c.SGD(model.parameters(), 0.01), [*zip(x.split(64), y.split(64))]
            before, after = (c.train_epoch(model, sgd, data, [0.01, 0.01])[0] for _ in range(2))
            self.assertLess(after, before, f"seed {seed}")
            first.append(before)
        self.say(f"50 of 50 seeds; first epoch's loss {np.mean(first):.2f}, at most {max(first):.2f}")
        self.assertLess(np.mean(first), 2.4)

    def test_nested_and_shared(self):
        """Sequentials within, first, in the middle, last; layers without parameters in several places."""
        relu, halve, flat, last = c.ReLU(), c.MaxPool2D(2), c.Flatten(), c.Linear(36, 5, **DOUBLE)
        first, second = (c.Conv2D(*sizes, 3, padding=1, **DOUBLE) for sizes in ((1, 3), (3, 4)))
        inner = c.Sequential(c.Sequential(first, relu), halve)
        layers = inner, c.Sequential(), second, relu, halve, flat, c.Sequential(flat, last)
        x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
        off = max(compare(c.Sequential(*layers, reorder=reorder), cnn, x) for reorder in (False, True))
        self.within(1e-12, off, "three deep; ReLU, MaxPool2D and Flatten twice")
        # only where wanted does pooling run before ReLU; a subclass of ReLU stays where it is
        subclass = type("Leaky", (c.ReLU,), {})()
        self.assertEqual(c.Sequential(relu, halve).run_order(), [relu, halve])
        self.assertEqual(c.Sequential(relu, halve, reorder=True).run_order(), [halve, relu])
        self.assertEqual(c.Sequential(subclass, halve, reorder=True).run_order(), [subclass, halve])

    def test_layer_by_layer(self):
        """After model(x), backward() of one layer after the other gives the gradients of model.backward()."""
        model = c.Sequential(
            *(c.Conv2D(1, 3, 3, padding=1, **DOUBLE), c.ReLU(), c.MaxPool2D(2)),
            *(c.Flatten(), c.Linear(48, 5, **DOUBLE)),
        )
        x, targets, loss, gradients = torch.randn(4, 1, 8, 8, **DOUBLE), torch.arange(4), c.CrossEntropy(), []
        for by_layer in (False, True):
            loss(model(x), targets)
            loss.backward()
            if by_layer:
                for layer in reversed(model.layers):
                    layer.backward()
            else:
                model.backward()
            gradients.append([p.g for p in (x, *model.parameters())])
        self.assertTrue(all(map(torch.equal, *gradients)))
        self.say(f"{len(gradients[0])} tensors, the same bits")

    def test_input_grad(self):
        """input_grad=False leaves out the gradient of the model's input, and nothing else, for that call."""
        layer, x, gradients = c.Linear(3, 4, **DOUBLE), torch.randn(2, 3, dtype=torch.float64), []
        model = c.Sequential(c.Sequential(layer, c.ReLU()), c.Linear(4, 2, **DOUBLE))
        for wanted in (False, True):
            out = model(x)
            out.g = torch.ones_like(out)
            model.backward(out, input_grad=wanted)
            self.assertEqual(hasattr(x, "g"), wanted)
            gradients.append([p.g for p in model.parameters()])
        self.assertTrue(all(map(torch.equal, *gradients)))
        model = c.Sequential(c.Sequential(layer))
        for size in (4, 5):  # with 5, backward() fails; afterwards the layer alone gives x.g in both cases
            out = model(x)
            out.g = torch.ones(2, size)
            with contextlib.suppress(ValueError):
                model.backward(out, input_grad=False)
            del x.g
            layer(x).g = torch.ones(2, 4)
            layer.backward()
        self.say(f"x.g {list(x.g.shape)} of the layer alone, after a backward() that failed")


class BadLayerInput(Case):
    """ValueError (RuntimeError for a missing step) that says what was given and what is expected."""

    def test_messages(self):
        x, image, loss, cpu = torch.randn(2, 3), torch.randn(2, 3, 8, 8), c.CrossEntropy(), {"device": "cpu"}
        dense, twin, convolution = c.Linear(3, 2, **cpu), c.Linear(3, 2, **cpu), c.Conv2D(3, 2, 3, **cpu)
        twin.w, square, weights = dense.w, c.Conv2D(3, 2, 3, **cpu), [dense.w]
        square.W = torch.randn(2, 3, 2, 2)
        wide, narrow = c.Linear(3, 1, **cpu), c.Conv2D(3, 1, 3, **cpu)
        wide.w, narrow.W = torch.randn(3, 4), torch.randn(4, 3, 3, 3)
        cases = (
            (lambda: c.Linear(0, 2), "in_features is 0", "at least 1"),
            (lambda: c.Linear(2, -1), "out_features is -1", "at least 1"),
            (lambda: c.Conv2D(0, 2, 3), "in_channels is 0", "at least 1"),
            (lambda: c.Conv2D(2, 0, 3), "out_channels is 0", "at least 1"),
            (lambda: c.Conv2D(1, 2, 2.5), "kernel_size is 2.5", "int"),
            (lambda: c.Conv2D(1, 2, (1, 2, 3)), "kernel_size is (1, 2, 3)", "pair"),
            (lambda: c.Conv2D(1, 2, 3, stride=(1, -1)), "stride is (1, -1)", "at least 1"),
            (lambda: c.Conv2D(1, 2, 3, padding=-1), "padding is -1", "at least 0"),
            (lambda: c.MaxPool2D(0), "kernel_size is 0", "at least 1"),
            (lambda: c.MaxPool2D(2, stride=0), "stride is 0", "at least 1"),
            (lambda: c.MaxPool2D(2, padding=-1), "padding is -1", "at least 0"),
            (lambda: c.Linear(4, 2, **cpu)(x), "[2, 3]", "4"),
            (lambda: dense(image), "[2, 3, 8, 8]", "3"),
            (lambda: dense(x.double()), "float64", "float32"),
            (lambda: c.Conv2D(4, 2, 3, **cpu)(image), "[2, 3, 8, 8]", "4"),
            (lambda: convolution(image[0]), "[3, 8, 8]", "3"),
            (lambda: convolution(image.double()), "float64", "float32"),
            (lambda: convolution(image.tolist()), "Conv2D", "list", "a tensor"),
            (lambda: c.Flatten()(image.numpy()), "Flatten", "ndarray", "a tensor"),
            (lambda: square(image), "[2, 3, 2, 2]", "(3, 3)"),
            (lambda: c.Conv2D(3, 2, (3, 11), padding=1, **cpu)(image), "(3, 11)", "(10, 10)"),
            (lambda: c.MaxPool2D(3, padding=2), "padding 2", "half of the kernel 3"),
            (lambda: c.MaxPool2D(9)(image), "(9, 9)", "(8, 8)"),
            (lambda: c.MaxPool2D(2)(image[0]), "[3, 8, 8]", "any"),
            (lambda: c.Flatten()(x[0]), "[3]", "two dimensions"),
            (lambda: loss(x[0], torch.tensor([0, 1])), "[3]", "[N, classes]"),
            (lambda: loss(x, torch.tensor([0, 3])), "0 to 3", "0 to 2"),
            (lambda: loss(x, torch.tensor([-1, 0])), "-1 to 0", "0 to 2"),
            (lambda: loss(x, torch.tensor([0.0, 1.0])), "float32", "integer"),
            (lambda: loss(x, torch.tensor([True, False])), "bool", "integer"),
            (lambda: loss(x, torch.tensor([0, 1, 2])), "[3]", "[2, 3]"),
            (lambda: loss(x.long(), torch.tensor([0, 1])), "logits are torch.int64", "floats"),
            (lambda: loss(x, torch.tensor([[0], [1]])), "[2, 1]", "[2, 3]"),
            (lambda: loss(x, F.one_hot(torch.tensor([0, 1]), 3)), "[2, 3]", "not one-hot"),
            (lambda: loss(torch.tensor([0, 1]), x), "logits [2]", "targets [2, 3]"),
            (lambda: c.Sequential(dense, c.ReLU(), dense)(x), "twice", "layer for each use"),
            (lambda: c.Sequential(dense, c.Sequential(dense))(x), "twice", "layer for each use"),
            (lambda: c.Sequential(dense, twin)(x), "twice", "layer for each use"),
            (lambda: c.Sequential([dense, c.ReLU()]), "[<", "a builtins.list, expected layers"),
            (lambda: c.Sequential(dense, c.ReLU), "ReLU", "a builtins.type, expected layers"),
            (lambda: c.Sequential(torch.nn.ReLU()), "ReLU() is a torch.nn.", "expected layers"),
            (lambda: c.SGD(weights, -0.1), "lr is -0.1", "at least 0"),
            (lambda: c.SGD(weights, math.nan), "lr is nan", "at least 0"),
            (lambda: c.SGD(weights, 0.1, momentum=-1), "momentum is -1", "at least 0"),
            (lambda: c.SGD(weights, 0.1, weight_decay=-1), "weight_decay is -1", "at least 0"),
            (lambda: c.SGD(weights, 0.1, nesterov=True), "nesterov", "momentum"),
            (lambda: c.SGD([], 0.1), "no parameters"),
            (lambda: c.SGD(weights + weights, 0.1), "occurs twice"),
            *((lambda p=p: c.SGD(p, 0.1), "list of tensors") for p in (dense.w, dense, [dense], c.Module)),
            (lambda: loss(x, [0, 1]), "list", "a tensor"),
            (lambda: wide(x), "Linear: b is", "[1]", "[4]"),
            (lambda: narrow(image), "Conv2D: b is", "[1]", "[4]"),
            (lambda: c.to_input(torch.zeros(28, 28, 3, dtype=torch.uint8)), "to_input", "[N, 28, 28]"),
            (lambda: c.to_input(torch.rand(2, 28, 28)), "to_input", "uint8"),
            (lambda: c.to_input(np.zeros((2, 28, 28), np.uint8)), "to_input", "tensor"),
            (lambda: c.train_epoch(c.Sequential(), None, [(x, x)], []), "zip", "longer"),
        )
        for act, *parts in cases:
            with self.assertRaises(ValueError, msg=parts) as caught:
                act()
            for part in parts:
                self.assertIn(part, str(caught.exception))
        self.say(f"{len(cases)} clear messages, such as {str(caught.exception)!r}")

    def test_steps_out_of_order(self):
        """backward() before a forward, without out.g, with one of another shape, not of the last output."""
        for name in 8 * LAYERS:
            layer, _, *args = random_layer(name, self.rng, **DOUBLE)
            with self.assertRaisesRegex(RuntimeError, type(layer).__name__):
                layer.backward()
            out = layer(*args)
            if not isinstance(layer, c.CrossEntropy):  # whose gradient is 1 by default
                with self.assertRaisesRegex(RuntimeError, r"assign output\.g"):
                    layer.backward()
            out.g = torch.randn(2, *out.shape)
            with self.assertRaisesRegex(ValueError, "shape|not one number"):
                layer.backward()
        layer, own = c.Linear(np.int64(3), 2, **DOUBLE), type("Own", (c.ReLU,), {"bwd": lambda *_: None})()
        out = layer(torch.ones(1, 3, **DOUBLE))
        out.g = torch.ones(1, 2, **DOUBLE)
        layer.backward(out)
        self.assertRaisesRegex(RuntimeError, "not the output of the last call", layer.backward, out + 0)
        out.g = [[1.0, 1.0]]
        self.assertRaisesRegex(ValueError, "the gradient is a list", layer.backward)
        model = c.Sequential(layer, own)  # whose bwd() sets no gradient
        model(torch.ones(1, 3, **DOUBLE))
        self.assertRaisesRegex(ValueError, r"Own: bwd\(\) must set x.g", model.backward)
        relu = c.ReLU()
        relu(torch.arange(3)).g = torch.full((3,), 0.5)  # would be 0 as an integer
        with self.assertRaisesRegex(ValueError, "int64"):
            relu.backward()
        layer, x = c.Linear(4, 4, **DOUBLE), torch.randn(4, 4, **DOUBLE)
        model = c.Sequential(layer, c.ReLU())
        with self.assertRaisesRegex(RuntimeError, "Sequential.*call it first"):
            model.backward(x)
        first, second = model(x), model(x + 1)
        first.g = second.g = torch.ones(4, 4, **DOUBLE)
        for out in (first, second.clone(), layer.out):
            with self.assertRaisesRegex(RuntimeError, "not the output of the last call") as caught:
                model.backward(out)
        model.backward(second)
        model.backward()  # from the last output
        self.say(f"clear messages, such as {str(caught.exception)!r}")


# ---------------------------------------------------------------------------------------------- training


class Data(Case):
    def test_data_sets(self):
        """Sizes and types; what is read of MNIST's files is what was written."""
        (images, labels), (test, test_labels) = c.load_digits()
        self.assertEqual((images.shape, test.shape), ((1437, 28, 28), (360, 28, 28)))
        self.assertEqual((images.dtype, labels.dtype), (torch.uint8, torch.int64))
        self.assertTrue(torch.equal(images, c.load_digits()[0][0]))
        self.assertEqual(set(torch.cat((labels, test_labels)).tolist()), set(range(10)))
        write_mnist(self.tmp / "data", 50, 20)
        with offline():
            (images, labels), (test, _) = c.load_mnist(self.tmp / "data")
        want, want_labels = map(torch.cat, zip(*c.load_digits()))
        self.assertTrue(torch.equal(images, want[:50]) and torch.equal(labels, want_labels[:50]))
        self.assertTrue(torch.equal(test, want[50:70]) and labels.dtype == torch.int64)
        self.say("digits 1,437 / 360; MNIST's files as written")

    def test_packed(self):
        """MNIST's files as .gz: unpacked offline, nothing else left in the folder."""
        raw, resources = write_mnist(self.tmp / "packed", 50, 20), []
        want = c.load_mnist(self.tmp / "packed")[0][0]
        for path in sorted(raw.iterdir()):
            packed = path.with_name(path.name + ".gz")
            packed.write_bytes(gzip.compress(path.read_bytes()))
            resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
            path.unlink()
        with offline(), mock.patch.object(torchvision.datasets.MNIST, "resources", resources):
            self.assertTrue(torch.equal(c.load_mnist(self.tmp / "packed")[0][0], want))
        names = sorted(path.name for path in raw.iterdir())
        self.assertEqual(names, sorted(n[:k] for n, _ in resources for k in (-3, None)))
        self.say(", ".join(names[:2]) + ", ...")

    def test_split(self):
        both = torch.arange(1003), torch.arange(1003)
        train, val = c.split(*both, 0)
        self.assertEqual((len(train[0]), len(val[0])), (903, 100))
        self.assertEqual(len(torch.cat([train[0], val[0]]).unique()), 1003)
        self.assertTrue(torch.equal(*train) and torch.equal(*val))  # images and labels go together
        torch.manual_seed(99)  # the split has a generator of its own
        again, other = (c.split(*both, seed)[1][0] for seed in (0, 1))
        self.assertEqual((torch.equal(val[0], again), torch.equal(val[0], other)), (True, False))
        self.say("903 / 100, disjoint, by its own seed")

    def test_batches(self):
        """Every sample once, with its label, normalised; moved by a pixel at most, all nine ways."""
        n, off = torch.arange(450), 0.0
        images = (30 + n % 225).byte()[:, None, None].expand(450, 28, 28)  # of one grey each, its label
        for shift in (0, 1):
            data = list(c.batches(images, n, 64, torch.Generator().manual_seed(0), shift))
            x, y = map(torch.cat, zip(*data))
            off = max(off, error(x[:, 0, 14, 14], ((30 + y % 225) / 255 - 0.1307) / 0.3081))
            dark = x[:, 0] < -0.4  # zeros, which move in from one side or two
            self.assertEqual(len(dark.flatten(1).unique(dim=0)), 9 if shift else 1)
            self.assertFalse(dark[:, 1:-1, 1:-1].any())
            self.assertEqual(([len(y) for _, y in data], data[0][0].stride(0)), ([64] * 7 + [2], 1))
            self.assertEqual((sorted(y.tolist()), bool((y == n).all())), (n.tolist(), False))
        self.within(1e-6, off, "450 samples once each, batch innermost, last batch of 2")

    def test_learning_rate(self):
        """Straight up over the first tenth of the steps, then down; above zero for few steps, too."""
        for steps in (1, 2, 3, 100):
            rates = [c.learning_rate(k, steps, 0.3, "onecycle") for k in range(steps)]
            self.assertTrue(all(0 < rate <= 0.3 + 1e-12 for rate in rates))
        np.testing.assert_allclose(rates, [*np.linspace(0.03, 0.3, 10), *np.linspace(0.3, 0.3 / 90, 90)])
        self.assertEqual(c.learning_rate(70, 100, 0.3, "constant"), 0.3)
        self.say(f"up to {rates[9]} at 10 of 100 steps, down to {rates[-1]:.4f}")


class Training(Case):
    def test_sgd(self):
        """Ten steps against torch.optim.SGD; the third parameter has no gradient, the second only later."""
        off, settings, kept = 0.0, ((0, False), (0.9, False), (0.9, True)), []
        for (momentum, nesterov), decay in itertools.product(settings, (0, 0.05)):
            ours = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
            theirs = [p.clone().requires_grad_() for p in ours]
            keys = dict(momentum=momentum, nesterov=nesterov, weight_decay=decay)
            a, b = c.SGD(ours, 0.1, **keys), torch.optim.SGD(theirs, 0.1, **keys)
            for k in range(10):
                a.lr = b.param_groups[0]["lr"] = 0.1 / (k + 1)
                for p, q in list(zip(ours, theirs))[: 1 if k < 4 else 2]:
                    p.g = torch.randn_like(p)
                    q.grad = p.g.clone()
                    kept.append((p.g, q.grad))
                a.step()
                b.step()
            off = max(off, *map(error, ours, theirs))
            a.zero_grad()
            a.step()  # no gradient left: nothing moves
            off = max(off, *map(error, ours, theirs))
        self.assertTrue(all(torch.equal(*both) for both in kept))  # gradients stay as they are
        self.within(1e-14, off, "6 settings, 10 steps each")

    def test_same_as_torch(self):
        """An epoch in float64 against the same with autograd and torch.optim: weights, loss, accuracy."""
        images, labels = (t[:300] for t in c.load_digits()[0])
        model, total, hits = c.build_cnn(**DOUBLE), 0.0, 0
        weights = [p.clone().requires_grad_() for p in model.parameters()]
        ours = c.SGD(model.parameters(), 0, 0.9, True, 5e-4)
        theirs = torch.optim.SGD(weights, 0.05, 0.9, nesterov=True, weight_decay=5e-4)
        data = list(c.batches(images, labels, 32, torch.Generator().manual_seed(0), 1))
        data = [(x.double(), y) for x, y in data]
        loss, accuracy = c.train_epoch(model, ours, data, [0.05] * len(data))
        for x, y in data:
            theirs.zero_grad()
            logits = cnn(x, *weights)
            each = F.cross_entropy(logits, y)
            each.backward()
            theirs.step()
            total += each.item() * len(y)  # the smaller last batch counts as what it is
            hits += int((logits.argmax(1) == y).sum())
        self.assertAlmostEqual(loss, total / 300, places=10)
        self.assertEqual(accuracy, hits / 300)
        self.within(1e-10, max(map(error, model.parameters(), weights)), f"weights after {len(data)} steps")

    def test_best_is_kept(self):
        """fit() ends with the weights of the best epoch, in the model and in best.pt, whatever came later."""
        args = c.parse(["--epochs", "3", "--lr", "0.1"])
        data = [t[:128] for t in c.load_digits()[0]]
        model, seen = c.build_cnn("cpu"), []
        for p in model.parameters():
            p.requires_grad_()  # which must not matter

        def falling(model, *_):
            seen.append([p.clone() for p in model.parameters()])
            return 1.0, (0.5, 0.9, 0.9)[len(seen) - 1], None  # of equals, the first

        with mock.patch.object(c, "evaluate", falling), contextlib.redirect_stdout(io.StringIO()):
            log = c.fit(model, data, data, args, self.tmp)
        self.assertEqual([row["best"] for row in log], [1, 1, 0])
        for kept in (torch.load(self.tmp / "best.pt", weights_only=True).values(), model.parameters()):
            self.assertTrue(all(map(torch.equal, kept, seen[1])))
        c.load_weights(self.tmp / "best.pt", model)
        self.assertFalse(torch.equal(seen[1][0], seen[2][0]))
        self.say("epoch 2 of 3 kept as it was")

    def test_names(self):
        """best.pt has every parameter: of nested layers, of one's own, and no bias where there is none.

        Another network than build_cnn's has no picture of its filters.
        """
        own = c.Linear(3, 4, **DOUBLE)
        own.gamma, own.parameters = torch.ones(1), lambda: [own.w, own.gamma]
        model = c.Sequential(c.Sequential(c.Conv2D(1, 2, 3, bias=False, **DOUBLE)), c.Flatten(), own)
        self.assertEqual(list(c.named(model)), ["0.0.W", "2.w", "2.gamma"])
        block = type("Block", (c.ReLU,), {"parameters": lambda self: self.inner.parameters()})()
        block.inner = c.Linear(3, 4, **DOUBLE)
        self.assertEqual(list(c.named(c.Sequential(block))), ["0.0", "0.1"])
        c.save_filters(self.tmp / "filters.png", "", model, None, 0)
        self.assertFalse((self.tmp / "filters.png").exists())
        self.assertEqual(len(c.named(c.build_cnn("cpu"))), 6)
        self.say(", ".join(c.named(c.build_cnn("cpu"))))


# ---------------------------------------------------------------------------------------------- the run


class Run(Case):
    """The command line on 400 + 100 images in MNIST's files; in this process, but for streams and signals."""

    FILES = frozenset({".lock", "args.json", "log.csv", "metrics.json", "best.pt", *c.PICTURES})

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write_mnist(cls.tmp / "data")
        flags = f"--dataset mnist --data-dir {cls.tmp / 'data'} --device cpu --epochs 2 --lr 0.05"
        cls.flags = flags.split()
        cls.out = cls.tmp / "é" / "run"  # its parents do not exist
        cls.titles = []
        with mock.patch.object(c.Figure, "suptitle", lambda figure, text, **_: cls.titles.append(text)):
            cls.status, cls.text, cls.errors = call(*cls.flags, "--out", cls.out)

    def quick(self, *argv):
        """call() without the pictures, which take longer than the rest."""
        with mock.patch.object(c, "save_pictures") as self.pictures:
            return call(*self.flags, *argv)

    def test_files(self):
        """All are there, and say the same: arguments, log, metrics, weights, pictures, what is printed."""
        self.assertEqual((self.status, self.errors), (0, ""))
        self.assertEqual({p.name for p in self.out.iterdir()}, self.FILES)
        m, args = (json.loads((self.out / f"{name}.json").read_text()) for name in ("metrics", "args"))
        told = dict(dataset="mnist", seed=0, epochs=2, batch_size=64, samples_per_epoch=360)
        told |= dict(trainable_params=9098, torch=torch.__version__, dry_run=False)
        self.assertLessEqual(told.items(), m.items())
        self.assertLessEqual(dict(lr=0.05, epochs=2, dataset="mnist").items(), args.items())
        self.assertTrue(0 < m["train_seconds"] < m["total_seconds"] and m["device"] and m["git_commit"])
        rows = [{k: float(v) for k, v in row.items()} for row in read_run(self.out)[1]]
        self.assertTrue(all(math.isfinite(v) for row in rows for v in row.values()))
        self.assertEqual([row["epoch"] for row in rows], [1, 2])
        self.assertAlmostEqual(rows[1]["lr"], c.learning_rate(11, 12, 0.05, "onecycle"))
        best = max(rows, key=lambda row: row["val_accuracy"])  # the first of equals
        self.assertEqual((best["epoch"], best["val_accuracy"]), (m["best_epoch"], m["val_accuracy"]))
        model, ((images, labels), test) = c.build_cnn("cpu"), c.load_mnist(self.tmp / "data")
        c.load_weights(self.out / "best.pt", model)
        # chosen on a tenth of the training set, and on nothing else
        val = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40]
        loss, accuracy, _ = c.evaluate(model, images[val], labels[val])
        self.assertEqual(accuracy, m["val_accuracy"])
        self.assertAlmostEqual(loss, best["val_loss"], places=6)
        loss, accuracy, logits = c.evaluate(model, *test)
        self.assertEqual(accuracy, m["test_accuracy"])
        for value in (loss, float(F.cross_entropy(logits, test[1]))):
            self.assertAlmostEqual(value, m["test_loss"], places=6)
        for name in c.PICTURES:
            with Image.open(self.out / name) as picture:
                low, high = picture.convert("L").getextrema()
                self.assertEqual((picture.format, high - low > 100), ("PNG", True), name)
                self.assertTrue(all(200 <= n <= 3000 for n in picture.size), name)
        self.assertTrue(self.titles and all("mnist, seed 0" in title for title in self.titles))
        *epochs, _, last = self.text.splitlines()[2:]
        figures = r"loss \d\.\d{4} acc +[\d.]+% \| "
        for k, line in enumerate(epochs, 1):
            self.assertRegex(line, rf"^epoch +{k}/2 \| train {figures}val {figures}lr [\de.-]+ \| ")
        self.assertEqual((len(epochs), f"accuracy {accuracy:.2%}" in last), (2, True))
        self.say(last)

    def test_second_call(self):
        """The same command again says so, other arguments are refused; neither touches anything."""
        filters = (self.out / "filters.png").read_bytes()
        (self.out / "filters.png").unlink()  # as in folders from before there was this picture
        self.addCleanup((self.out / "filters.png").write_bytes, filters)
        before = contents(self.out)
        status, text, _ = call(*self.flags, "--out", self.out)
        self.assertEqual((status, text.count("\n"), contents(self.out)), (0, 1, before))
        self.assertIn("finished", text)
        for *flags, told in (
            ("--lr", 0.2, "--lr 0.05 there, 0.2 now"),
            ("--batch-size", 32, "--batch-size 64 there, 32 now"),
            ("--dry-run", "--dry-run False there, True now"),
        ):
            line = self.refused(*self.flags, *flags, out=self.out, says=[told])
        self.say(f"{text.split(':')[0]}; {line[-55:]}")

    def test_same_bits(self):
        """A seed's runs are the same, also with --deterministic, also where an unfinished one was."""
        torch.rand(7)  # whatever was drawn before
        self.addCleanup(torch.use_deterministic_algorithms, False)
        again, want = self.tmp / "again", read_run(self.out)
        for out, *flags in ((again,), (again,), (self.tmp / "other", "--deterministic")):
            status, _, err = self.quick(*flags, "--out", out)
            self.assertEqual((status, err, read_run(out) == want), (0, "", True))
            (out / "metrics.json").unlink()
            (out / "best.pt").write_bytes(b"half")
            (out / "best.tmp").write_bytes(b"half")
        self.assertTrue(torch.are_deterministic_algorithms_enabled())
        self.quick("--seed", 1, "--out", self.tmp / "seed")
        self.assertNotEqual(read_run(self.tmp / "seed"), want)
        self.say("best.pt, log.csv, metrics.json the same to the bit; another seed differs")

    def test_recipes(self):
        """What SGD is made with, and how far images are shifted: the course's recipe and the default one."""
        course = ["--batch-size", 640, "--lr", 0.01, "--momentum", 0, "--schedule", "constant"]
        for flags, made, shift in ((course, (0.01, 0, False, 0), 0), ([], (0.05, 0.9, True, 5e-4), 1)):
            with mock.patch.multiple(c, SGD=mock.Mock(wraps=c.SGD), batches=mock.Mock(wraps=c.batches)):
                self.quick(*flags, "--dry-run", "--out", self.tmp / f"shift {shift}")
                self.assertEqual((c.SGD.call_args.args[1:], c.batches.call_args.args[-1]), (made, shift))
        self.say("the course's is plain SGD, without shifts")

    def test_dry_run(self):
        """One batch through everything, said in the title; by default into results/cnn-<timestamp>."""
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(tempfile.mkdtemp(dir=self.tmp))
        status, text, _ = self.quick("--dry-run")
        self.assertEqual(text.count("DRY RUN, one batch: "), 2)
        results, out = sorted(path for path in Path().rglob("*") if path.is_dir())
        self.assertEqual((status, str(results)), (0, "results"))
        self.assertRegex(out.as_posix(), r"^results/cnn-\d{8}-\d{6}$")
        self.assertEqual({p.name for p in out.iterdir()}, self.FILES - {*c.PICTURES})
        m, rows, _ = read_run(out)
        self.assertEqual((m["samples_per_epoch"], m["dry_run"], len(rows)), (64, True, 1))
        self.assertIn("mnist, seed 0, dry run", self.pictures.call_args.args)
        self.say(f"{out}: {text.splitlines()[0]}")

    def test_defaults(self):
        """MNIST's and the digits' epochs and lr: those that ran are kept, and found again."""
        out, flags = self.tmp / "fewer", ["--data-dir", self.tmp / "no data", "--out", self.tmp / "fewer"]
        with (
            offline(),
            mock.patch.dict(c.DEFAULTS["digits"], epochs=2),
            mock.patch.object(c, "save_pictures"),
        ):
            texts = [call(*flags)[1], call(*flags)[1], call(*flags, "--epochs", 2, "--lr", 0.03)[1]]
        args, ran = (json.loads((out / f"{name}.json").read_text()) for name in ("args", "metrics"))
        self.assertEqual((args["epochs"], args["lr"], ran["epochs"]), (2, 0.03, 2))
        self.assertEqual(["finished" in text for text in texts], [False, True, True])
        for dataset in ("auto", "mnist", "digits"):
            changed = args | c.DEFAULTS["mnist"] | {"dataset": dataset}
            (out / "args.json").write_text(json.dumps(changed))
            if dataset != "digits":
                self.assertIn("finished", call("--dataset", dataset, *flags)[1])
        digits = ["--device", "auto", "--dataset", "digits"]
        self.refused(*digits, out=out, says=["--epochs 5 there, 30 now; --lr 0.1 there, 0.03 now"])
        self.refused(*digits, "--epochs", 9, out=out, says=["--epochs 5 there, 9 now"])
        mixed = changed | {"dataset": "auto", "lr": c.DEFAULTS["digits"]["lr"]}  # neither's
        for content, text in (
            (mixed, "--lr 0.03 there, 0.1 now"),
            ({k: v for k, v in changed.items() if k != "schedule"}, "args.json lacks schedule"),
            ({}, "args.json lacks batch_size"),
        ):
            (out / "args.json").write_text(json.dumps(content))
            dataset = content.get("dataset", "auto")
            self.refused("--device", "auto", "--dataset", dataset, out=out, says=[text])
        self.say(f"MNIST {c.DEFAULTS['mnist']}, digits {c.DEFAULTS['digits']}")

    def test_offline(self):
        """The digits instead, said wherever a result is; --dataset mnist says how to go on."""
        out, none = self.tmp / "auto", self.tmp / "none"
        with offline():
            says = ["127.0.0.1:9", none / "MNIST" / "raw", "train-images-idx3-ubyte", "--dataset digits"]
            self.refused("--dataset", "mnist", "--data-dir", none, says=says)
            flags = ["--dataset", "auto", "--data-dir", none, "--epochs", 1, "--out", out]
            status, text, err = self.quick(*flags)
        self.assertEqual((status, err, read_run(out)[0]["dataset"]), (0, "", "digits"))
        self.assertRegex(text, r"(?s)WARNING.*127\.0\.0\.1:9.*\ndigits test[^\n]*$")
        self.assertIn("digits, seed 0", self.pictures.call_args.args)
        self.assertEqual(list(none.rglob("*ubyte*")), [])
        self.say(text.splitlines()[-1])

    def start(self, command):
        """bash's process; RUN is the run that is finished already, which says so and ends."""
        if not (Path("/dev/full").exists() and shutil.which("bash")):
            self.skipTest("no bash or no /dev/full here")
        run = [sys.executable, str(Path(c.__file__).resolve()), *self.flags, "--out", str(self.out)]
        command = command.replace("RUN", shlex.join(run))
        # whoever runs these tests in the background ignores SIGINT, and children inherit that
        usual = dict(text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(["bash", "-c", command], **pipes, **usual)

    def test_streams(self):
        """Streams that are closed, full or know ASCII alone: an exit status and no traceback."""
        ascii_only = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
        for command, text in (
            (f"{ascii_only} RUN; echo status $?", r"finished before.*\\udcc3[^$]*status 0"),
            ("RUN | true; echo status ${PIPESTATUS[0]}", "status 141"),
            ("RUN <&- >&- 2>&-; echo status $?", "status 0"),
            ("RUN >/dev/full; echo status $?", "status 1\nerror: .*No space left on device"),
        ):
            with self.subTest(command), self.start(command) as process:
                said = process.stdout.read() + process.stderr.read()
                self.assertRegex(said, text)
                self.assertNotIn("Traceback", said)
        self.say("ASCII alone and closed streams 0, a broken pipe 141, a full disk 1")

    def test_interrupt(self):
        """Ctrl-C ends the process by the signal, silently; not in a shell's background, which ignores it."""
        for trap, status in (("", -signal.SIGINT), ("trap '' INT;", 0)):
            with self.start(f"export PYTHONPROFILEIMPORTTIME=1; {trap} exec RUN") as process:
                self.assertTrue(any(line.endswith(" numpy\n") for line in process.stderr))  # in the imports
                process.send_signal(signal.SIGINT)
                text, err = process.communicate()
            self.assertEqual((process.returncode, "finished before" in text), (status, status == 0))
            self.assertNotIn("Traceback", err)
        self.say("ended by SIGINT, silently; went on where it is ignored")


class BadInput(Case):
    """A clear line, the exit status, and no results."""

    def test_flags(self):
        cases = [("--epochs", v, f"--epochs is {v}") for v in ("0", "-1")]
        cases += [("--batch-size", v, f"--batch-size is {v}") for v in ("0", "-64", "1" * 30)]
        cases += [("--lr", v, "--lr is") for v in ("0", "-0.1", "nan", "inf")]
        cases += [("--momentum", v, "--momentum is") for v in ("-0.1", "1", "nan")]
        cases += [("--seed", v, "--seed is") for v in (str(2**64), str(-(2**63) - 1), "1" * 400)]
        cases += [("--epochs", "two", "two"), ("--schedule", "cosine", "cosine"), ("--wat", "--wat")]
        cases += [("--dataset", "cifar", "cifar"), ("--epochs", "9" * 5000, "epochs")]
        cases += [(f"--{flag}=--", "empty or --") for flag in ("batch-size", "seed", "lr")]
        cases += [("--data-dir=", "empty or --"), ("--predict", "", "empty or --")]
        cases += [("--predict", "a.png", "--checkpoint"), ("--checkpoint", "best.pt", "--predict")]
        for name, there in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
            if not there.is_available():
                cases += [("--device", name, f"--device {name}: {name} is not available")]
        for *argv, text in cases:
            with self.subTest(argv=argv):
                self.refused("--dataset", "digits", *argv, says=["error: ", text])
        told = dict(dataset="auto", data_dir="data", epochs=None, schedule="onecycle", device="auto")
        self.assertLessEqual(told.items(), vars(c.parse([])).items())
        self.say(f"{len(cases)} clear lines; the defaults")

    def test_not_a_number(self):
        """A huge learning rate: exit status 1, the step named, no results."""
        out = self.tmp / "huge"
        status, _, err = call("--dataset", "digits", "--lr", "1e30", "--device", "cpu", "--out", out)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertRegex(err, r"^error: the loss is (nan|inf) at step 2 of epoch 1: try a smaller --lr")
        self.assertLessEqual({p.name for p in out.iterdir()}, {"args.json", ".lock"})
        self.say(err.strip())

    def test_data_files(self):
        """Truncated, garbage, of other counts or sizes, empty: named, and not hidden behind the digits."""
        raw = write_mnist(self.tmp / "data", 40, 10)
        images, labels, test = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
        whole = (raw / images).read_bytes()
        cases = [(images, whole[:-5]), (images, b"\x7fELF" * 100), (images, b""), (test, b"\0")]
        cases += [(images, np.zeros((40, 8, 8))), (labels, np.zeros((40, 1)))]
        for name, content in [*cases, (labels, np.zeros(39)), (labels, np.full(40, 10))]:
            good = (raw / name).read_bytes()
            write = Path.write_bytes if isinstance(content, bytes) else write_idx
            write(raw / name, content)
            says = [raw, "damaged", name.split("-")[0]]
            for dataset in ("mnist", "auto"):
                self.refused("--dataset", dataset, "--data-dir", self.tmp / "data", says=says)
            (raw / name).write_bytes(good)
        for n, says in ((0, "damaged"), (5, "too few")):
            write_mnist(self.tmp / str(n), n, 5)
            line = self.refused("--dataset", "mnist", "--data-dir", self.tmp / str(n), says=["error: ", says])
        self.say(f"{len(cases) + 4} clear lines, such as {line!r}")

    def test_out_folder(self):
        """Other files, a damaged args.json, a file, a run at work: refused and left as they are."""
        (self.tmp / "file").write_text("")
        for out in (self.tmp / "file", self.tmp / "file" / "below"):
            self.refused("--dataset", "digits", out=out, says=[out])
        cases = [("thesis.tex", "other files"), ("best.pt", "other files"), ("args.json", "can't be used")]
        cases += [(".lock", "another run is writing into")] if c.fcntl else []
        for name, text in cases:
            out = Path(tempfile.mkdtemp(dir=self.tmp))
            (out / name).write_text("{")
            with open(out / name) as file:
                if name == ".lock":
                    c.fcntl.flock(file, c.fcntl.LOCK_EX)
                self.refused("--dataset", "digits", out=out, says=[out, text])
        out = Path(tempfile.mkdtemp(dir=self.tmp))  # another run ended here after this one had looked
        arguments = {"dataset": "digits", "epochs": 5, "lr": 0.1}
        for name in ("args.json", "metrics.json"):
            c.write_file(out / name, arguments)
        self.assertRaisesRegex(c.InputError, "just finished", c.claim_folder, out, arguments)
        self.say(f"a file, a folder below a file, {', '.join(name for name, _ in cases)}")

    def test_data_folder(self):
        """A folder that can't take the download is an error that names it; a network that fails is not."""
        folder, file = self.tmp / "unwritable", self.tmp / "plain"
        disk = "ENOSPC EDQUOT EROFS EACCES EPERM EIO ENOTDIR".split()
        network = "ECONNREFUSED ECONNRESET ETIMEDOUT ENETUNREACH EHOSTUNREACH EPIPE".split()
        cases = [(OSError(getattr(errno, name), "told"), name in disk) for name in disk + network]
        cases += [(urllib.error.URLError(OSError(errno.EACCES, "a firewall's")), False)]
        cases += [(ssl.SSLError(1, "a certificate's"), False), (socket.gaierror(-3, "no name"), False)]
        for problem, of_folder in [*cases, (RuntimeError("file corrupted"), False)]:
            with mock.patch.object(torchvision.datasets.MNIST, "__init__", side_effect=problem):
                for dataset in ("auto", "mnist") if of_folder else ("mnist",):
                    says = [folder, "can't be written" if of_folder else "can't be downloaded"]
                    self.refused("--dataset", dataset, "--data-dir", folder, says=says)
        tried, mnist = [], torchvision.datasets.MNIST

        def breaks_off(self, *args, **kwargs):
            tried.extend(self.mirrors)
            raise ConnectionResetError(errno.ECONNRESET, "reset")

        with (
            mock.patch.object(mnist, "mirrors", ["one", "other"]),
            mock.patch.object(mnist, "__init__", breaks_off),
        ):
            self.refused("--dataset", "mnist", "--data-dir", folder, says=["from one or other (Conn"])
        self.assertEqual(tried, ["one", "other"])
        file.write_text("")
        with offline():
            line = self.refused("--dataset", "mnist", "--data-dir", file / "data", says=[file])
        self.say(f"{len(cases) + 1} errors told apart; {line[:60]}")

    def test_full_disk(self):
        """Whatever file does not fit any more: one line, status 2, no half a file; the run goes on later."""
        write_mnist(self.tmp / "small", 40, 10)
        flags = ["--dataset", "mnist", "--data-dir", self.tmp / "small", "--device", "cpu", "--epochs", 1]
        out, fsync = self.tmp / "full", os.fsync
        self.addCleanup(mock.patch.stopall)
        # what a picture shows does not matter here, and would take longer than the rest
        mock.patch.object(c.Figure, "savefig", lambda figure, file, **_: file.write(b"a picture")).start()

        def full(descriptor):
            if (out / name).with_suffix(".tmp").exists():  # the file that is being written
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        for name in ("args.json", "best.pt", "log.csv", "samples.png", "metrics.json"):
            with mock.patch.object(os, "fsync", full):
                status, _, err = call(*flags, "--out", out)
            self.assertEqual((status, err.count("\n"), (out / name).exists()), (2, 1, False))
            self.assertIn(f"{out / name} can't be written (No space left on device)", err)
            self.assertEqual(list(out.glob("*.tmp")), [])
        self.assertEqual(call(*flags, "--out", out)[0], 0)
        self.say(err.strip().replace(str(self.tmp), "..."))


# ---------------------------------------------------------------------------------------------- photographs
# of handwriting as phones and scanners make them, from images uint8 [h, w], light on dark

PAPER, INK = (235, 232, 228), (45, 42, 48)  # colours, 0 to 255


def coverage(image, scale=10, move=(0, 0), turn=0, page=400):
    """How much ink is where, [page, page·w/h] in 0..1: the image enlarged smoothly, turned, moved."""
    ink = Image.fromarray(ndimage.zoom(image / np.float32(255), scale).clip(0, 1))
    ink = ink.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    canvas = Image.new("F", (page * image.shape[1] // image.shape[0], page))
    top, left = ((n - m) // 2 + d for n, m, d in zip(canvas.size[::-1], ink.size[::-1], move))
    canvas.paste(ink, (int(left), int(top)))
    return np.asarray(canvas)


def paint(cover, paper=PAPER, ink=INK):
    """Ink of one colour over paper of one colour or [H, W, 3]: [H, W, 3] in 0..255."""
    return paper + cover[..., None] * np.subtract(ink, paper)


def to_picture(picture, quality=None):
    picture, file = Image.fromarray(picture.clip(0, 255).round().astype(np.uint8)), io.BytesIO()
    picture.save(file, "JPEG" if quality else "PNG", quality=quality)
    return Image.open(file)


def texture(rng, size):
    """Smooth random field of deviation 1."""
    field = ndimage.gaussian_filter(rng.normal(size=(400, 400)), size)
    return field / field.std()


def stray_dot(p):
    top, left = p.rng.choice(np.argwhere(ndimage.distance_transform_edt(p.cover < 0.1) > 25))
    return np.hypot(p.rows - top, p.columns - left) < p.rng.uniform(3, 8)


def hand(p):
    """Its shadow, a blob that reaches in from the edge."""
    far, wide = p.rng.uniform(0.8, 1.1), p.rng.uniform(0.4, 0.7)
    return 0.45 * (np.hypot((p.along - 1) / far, p.across / wide) < 1)


def note(p):
    """A sheet that covers a fifth of the picture, askew on a wooden table."""
    sheet = to_picture(p.picture).resize((180, 180)).convert("RGBA")
    sheet = sheet.rotate(p.rng.uniform(-10, 10), expand=True)
    wood = paint(0.1 * texture(p.rng, (3, 40)), (120, 85, 60), (255, 255, 255))
    table = to_picture(ndimage.gaussian_filter(wood, (1, 1, 0))).convert("RGBA")
    table.alpha_composite(sheet, tuple(p.rng.integers(5, 170, 2).tolist()))
    return np.asarray(table.convert("RGB"))


def ball_pen(p):
    """The strokes' middle, a few pixels wide."""
    deep = ndimage.distance_transform_edt(p.cover > 0.5)
    ridge = (deep > 0) & (deep > 0.75 * ndimage.maximum_filter(deep, 21))
    return ndimage.gaussian_filter(1.0 * ndimage.binary_dilation(ridge, iterations=4), 1)


# What a kind changes of a clean page. Functions get the page p: its rng; where each pixel is, as rows,
# columns, y and x (-1 to 1), edge (how far away the nearest is), along and across a random direction, fall
# (0 to 1 along it); cover, how much ink is there; at the end the picture.
CLEAN = dict(size=400, scale=10, turn=0, paper=PAPER, ink=INK, marks_ink=INK, lines=(), soft=0, blur=0)
CLEAN |= dict(move=lambda p: (0, 0), pen=lambda p: p.cover, marks=lambda p: 0 * p.x, shade=lambda p: 0 * p.x)
CLEAN |= dict(noise=0, finish=lambda p: p.picture)
KINDS = {  # the reading was tuned with these
    "clean": {},
    "inverted": dict(finish=lambda p: 255 - p.picture),
    "small": dict(scale=3),
    "off-centre": dict(scale=6, move=lambda p: p.rng.choice([-110, 110], 2)),
    "large": dict(scale=14),
    "cropped to the ink": dict(finish=lambda p: p.picture[p.cover.max(1) > 0.3][:, p.cover.max(0) > 0.3]),
    "uneven light 30 %": dict(shade=lambda p: 0.3 * p.fall),
    "uneven light 60 %": dict(shade=lambda p: 0.6 * p.fall),
    "shadow's edge": dict(shade=lambda p: 0.5 * (p.along > p.rng.uniform(-0.5, 0.5)), soft=2),
    "vignette": dict(shade=lambda p: 0.3 * (p.y**2 + p.x**2)),
    "sensor noise": dict(noise=10),
    "salt and pepper": dict(
        finish=lambda p: p.picture + p.rng.choice([-255, 0, 255], (400, 400, 1), p=[0.02, 0.96, 0.02])
    ),
    "blur": dict(blur=6),
    "JPEG quality 20": dict(finish=lambda p: to_picture(p.picture, 20)),
    "faint pencil": dict(ink=(195, 195, 198), noise=4),
    "ruled lines": dict(lines=[(3, 60, (120, 140, 180), 0)]),
    "squared paper": dict(lines=[(2, 40, (140, 160, 190), degrees) for degrees in (0, 90)]),
    "frame around it": dict(marks=lambda p: abs(p.edge - p.rng.integers(30, 60)) < 3),
    "thin border": dict(marks=lambda p: p.edge < p.rng.integers(1, 5)),
    "table beside the paper": dict(
        scale=8,
        move=lambda p: -58 * p.direction,  # away from it
        finish=lambda p: np.where(p.fall[..., None] > np.quantile(p.fall, 0.82), (105, 75, 55), p.picture),
    ),
    "sheet on a dark table": dict(
        scale=7, finish=lambda p: np.where(p.edge[..., None] < 45, (105, 75, 55), p.picture)
    ),
    "note on a table": dict(scale=9, finish=note),
    "printed boxes": dict(
        scale=3,
        marks=lambda p: (abs(p.rows - 200) < 64) & ((abs(p.rows - 200) > 60) | ((p.columns + 5) % 130 < 3)),
    ),
    "small on a large page": dict(size=1600, scale=4),
    "stray dot": dict(marks=stray_dot),
    "coloured paper": dict(paper=(150, 190, 165), ink=(60, 40, 100)),
    "askew": dict(scale=9, turn=10),
    "phone": dict(
        **dict(size=1200, scale=20, move=lambda p: p.rng.integers(-150, 150, 2), turn=8),
        **dict(paper=(205, 200, 190), ink=(75, 75, 95), shade=lambda p: 0.45 * p.fall),
        **dict(blur=3, noise=8, finish=lambda p: to_picture(p.picture, 60)),
    ),
}
HELD_OUT = {  # and not with these
    "blue ink on yellow paper": dict(paper=(238, 214, 110), ink=(45, 70, 165)),
    "crumpled paper": dict(shade=lambda p: 0.08 * abs(texture(p.rng, 25)) - 0.03 * texture(p.rng, 6)),
    "hand's shadow": dict(shade=hand, soft=10),
    "chalk with smears": dict(
        **dict(paper=(48, 66, 58), ink=(225, 225, 215), marks_ink=(225, 225, 215), noise=5),
        marks=lambda p: 0.05 * texture(p.rng, (4, 40)),
        pen=lambda p: p.cover * p.rng.choice([0.5, 1], p.cover.shape, p=[0.25, 0.75]),  # grainy
    ),
    "punched hole": dict(
        scale=9,
        marks=lambda p: np.hypot(p.rows - p.rng.uniform(80, 320), p.columns - p.rng.uniform(-5, 22)) < 24,
    ),
    "red margin line": dict(
        marks=lambda p: abs(p.columns - p.rng.integers(50, 150)) < 2, marks_ink=(225, 95, 95)
    ),
    "40 pixels": dict(finish=lambda p: to_picture(p.picture).resize((40, 40))),
    "felt pen": dict(pen=lambda p: p.cover > 0.5),  # hard edges, no shades
    "ball pen on ruled paper": dict(pen=ball_pen, ink=(40, 50, 120), lines=[(3, 80, (150, 165, 200), 0)]),
}


def photograph(kind, image, rng):
    """The image on a page of this kind, a dict: [H, W, 3] in 0..255, or Pillow's."""
    p = types.SimpleNamespace(**{**CLEAN, **kind}, rng=rng)
    p.rows, p.columns = np.indices((p.size, p.size))
    p.edge = np.minimum.reduce([p.rows, p.rows[::-1], p.columns, p.columns[:, ::-1]])
    p.y, p.x = (2 * n / (p.size - 1) - 1 for n in (p.rows, p.columns))
    a = rng.uniform(0, 2 * np.pi)
    p.direction = np.array([np.sin(a), np.cos(a)])
    p.along, p.across = p.y * np.sin(a) + p.x * np.cos(a), p.y * np.cos(a) - p.x * np.sin(a)
    p.fall = (p.along - p.along.min()) / np.ptp(p.along)

    p.cover = coverage(image, p.scale, p.move(p), rng.uniform(-p.turn, p.turn), p.size)
    paper = p.paper
    for width, every, colour, degrees in p.lines:
        a = np.radians(degrees + rng.uniform(-2, 2))  # a little askew
        t = (p.rows * np.cos(a) + p.columns * np.sin(a) + rng.uniform(0, every)) % every
        paper = paint((width / 2 + 0.5 - abs(t - every / 2)).clip(0, 1), paper, colour)
    paper = paint(p.marks(p), paper, p.marks_ink)
    light = 1 - ndimage.gaussian_filter(p.shade(p), p.soft)
    p.picture = ndimage.gaussian_filter(paint(p.pen(p), paper, p.ink) * light[..., None], (p.blur, p.blur, 0))
    p.picture += rng.normal(0, p.noise, (p.size, p.size, 1))
    return p.finish(p)


class Predict(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        train, (cls.images, cls.labels) = c.load_digits()
        torch.manual_seed(0)
        cls.model, generator = c.build_cnn("cpu"), torch.Generator().manual_seed(0)
        sgd = c.SGD(cls.model.parameters(), 0, 0.9, True)
        for _ in range(8):
            c.train_epoch(cls.model, sgd, c.batches(*train, 32, generator, 2), [0.05] * 45)
        cls.checkpoint = cls.tmp / "best.pt"
        torch.save(c.named(cls.model), cls.checkpoint)
        cls.seven = Image.new("L", (280, 280), 250)  # dark on light, off the centre
        cls.seven.paste(10, (40, 30, 160, 50))
        cls.seven.paste(10, (100, 50, 120, 220))
        cls.seven.save(cls.tmp / "seven.png")

    def saved(self, picture):
        """What read_digit() makes of it: the digit and a warning or None."""
        to_picture(np.asarray(picture)).save(self.tmp / "page.png")
        return c.read_digit(self.tmp / "page.png")

    def test_pictures(self):
        """One digit however it is stored: read alike, 20 pixels long, centred."""
        dark, light, exif, at = self.seven, ImageOps.invert(self.seven), Image.Exif(), torch.arange(28) + 0.5
        wide, clear = Image.new("L", (600, 300), 250), Image.new("RGBA", dark.size, (0, 0, 0, 0))
        wide.paste(dark, (200, 10))
        chalk, sticker = (Image.new("RGBA", dark.size, (255, 255, 255, 0)) for _ in range(2))
        for picture in (clear, chalk):  # black ink, and white, on nothing
            picture.putalpha(light)
        ImageDraw.Draw(sticker).ellipse((-20, -5, 220, 255), (255, 255, 255, 255))
        sticker.paste("black", mask=light.point(lambda grey: 255 * (grey > 128)))
        exif[0x0112] = 6  # turned by a quarter
        pictures = {  # and how many levels they may differ by
            "dark.png": (dark, 0),
            "light.png": (light, 0.5),
            "deep.png": (Image.fromarray(np.asarray(dark).astype(np.uint16) * 257), 3),
            "wide.png": (wide, 8),
            "clear.png": (clear, 8),
            "chalk.png": (chalk, 8),
            "sticker.png": (sticker, 8),
            "small.png": (dark.resize((56, 56)), 8),
            "large.jpg": (dark.resize((2800, 2800)), 8),
            "turned.jpg": (dark.transpose(Image.Transpose.ROTATE_90), 8),
        }
        want, _ = c.read_digit(self.tmp / "seven.png")
        for name, (picture, limit) in pictures.items():
            picture.save(self.tmp / name, exif=exif if name == "turned.jpg" else b"")
            image = c.read_digit(self.tmp / name)[0].float()
            self.assertLessEqual(float((image - want).abs().mean()), limit, name)
            sides = [int(t[-1] - t[0]) + 1 for t in ((image > 0).any(d).nonzero() for d in (1, 0))]
            centre = [float(image.sum(1 - d) @ at / image.sum()) for d in (0, 1)]
            self.assertTrue(19 <= max(sides) <= 20 and all(abs(v - 14) <= 0.75 for v in centre), name)
            self.assertTrue(image.shape == (28, 28) and image.max() >= 254, name)
        self.say(f"{', '.join(pictures)}: {sides[0]} by {sides[1]} pixels")

    def test_photographs(self):
        """Of digits that the network knows as they are, in kinds the reading was tuned with and in others."""
        right = self.model(c.to_input(self.images)).argmax(1) == self.labels
        self.assertGreater(float(right.double().mean()), 0.9)
        for kinds, count, least in ((KINDS, 5, 95), (HELD_OUT, 10, 90)):
            found, known = dict.fromkeys(kinds, 0), right.nonzero()[:count, 0]
            for name, kind in kinds.items():
                rng = np.random.default_rng(0)
                for image, label in zip(self.images[known].numpy(), self.labels[known]):
                    picture = photograph(kind, image, rng)
                    with contextlib.suppress(c.InputError):
                        digit, _ = self.saved(picture)
                        guess = self.model(c.to_input(digit[None])).argmax()
                        found[name] += 100 * int(guess == label) / count
            mean, hardest = sum(found.values()) / len(found), sorted(found, key=found.get)[:4]
            hardest = ", ".join(f"{name} {found[name]:.0f}" for name in hardest)
            self.say(f"mean of {len(found)} kinds {mean:.1f} %; {hardest}")
            self.assertGreater(mean, least)

    def test_warnings(self):
        """None for one digit, whatever pieces it is in; one for two of them; an empty page is an error."""
        one, two, rng = 0, 0, np.random.default_rng(0)
        for image, other in zip(self.images[:40].numpy(), self.images[1:].numpy()):
            pair = np.concatenate([np.pad(image, 2), np.pad(other, 2)], two % 2)  # one above or beside other
            one += self.saved(paint(coverage(image)))[1] is not None
            two += self.saved(paint(coverage(pair, 6)))[1] is not None
        for kind in ("clean", "uneven light 30 %", "sensor noise", "phone"):
            with self.assertRaisesRegex(c.InputError, "page.png shows no character"):
                self.saved(photograph(KINDS[kind], np.zeros((28, 28), np.uint8), rng))
        self.say(f"{one} of 40 digits and {two} of 40 pairs with a warning, 4 empty pages refused")
        self.assertTrue(one <= 1 and two >= 36)

    def test_light_letter(self):
        """A light B on a dark board is not taken for a sheet of paper."""
        board = np.full((200, 200), 40, np.uint8)
        board[40:160, 60:140] = 230
        board[52:94, 72:128] = board[106:148, 72:128] = 40
        board = Image.fromarray(board)
        self.assertIs(c.crop_to_sheet(board), board)
        sheet = Image.new("L", (200, 200), 60)
        sheet.paste(230, (40, 40, 160, 160))
        ImageDraw.Draw(sheet).ellipse((70, 60, 130, 140), outline=30, width=7)  # a large 0: a hole, few marks
        self.assertLess(max(c.crop_to_sheet(sheet).size), 130)

    def test_bad_images(self):
        """A line for each; for a good one its digit and the model's shares. Huge ones are not decoded."""
        whole = io.BytesIO()
        self.seven.save(whole, "JPEG")
        Image.new("1", (13_000, 13_000)).save(self.tmp / "huge.png")
        Image.new("L", (40, 40), 200).save(self.tmp / "blank.png")
        (self.tmp / "folder").mkdir()
        for name, content in (
            ("text.png", b"no image"),
            ("cut.jpg", whole.getvalue()[:900]),
            ("page.pdf", b"%PDF-1.7 nothing"),
            ("photo.heic", b"\0\0\0\x18ftypheic" + bytes(100)),
        ):
            (self.tmp / name).write_bytes(content)
        says = {"huge.png": "64 million", "blank.png": "no character", "page.pdf": "export the page as PNG"}
        says |= {"photo.heic": "JPEG or PNG", "missing.png": "", "folder": "", "text.png": "", "cut.jpg": ""}
        good = [self.tmp / f"{k}.png" for k in range(20)]
        for path, image in zip(good, self.images.numpy()):
            Image.fromarray(np.pad(image, 12)).save(path)
        paths = [*(self.tmp / name for name in says), *good]
        argv = ("--predict", *paths, "--checkpoint", self.checkpoint, "--device", "cpu")
        (self.tmp / "metrics.json").write_text(json.dumps({"dataset": "digits"}))
        self.assertTrue(call(*argv)[1].startswith("warning: trained on scikit-learn's small digits"))
        (self.tmp / "metrics.json").unlink()
        status, text, err = call(*argv)
        self.assertEqual(status, 2)
        for (name, hint), line in zip(says.items(), err.splitlines(), strict=True):
            self.assertTrue(line.startswith(f"error: {self.tmp / name} ") and hint in line, line)
        shares = self.model(c.to_input(torch.stack([c.read_digit(path)[0] for path in good]))).softmax(1)
        for path, line, p in zip(good, text.splitlines(), shares, strict=True):
            self.assertTrue(line.startswith(f"{path}: {int(p.argmax())} |"), line)
            printed = torch.tensor([float(v) for v in re.findall(r"([\d.]+)%", line)])
            self.assertLess(float((printed - 100 * p).abs().max()), 0.051)
        self.say(f"{', '.join(says)}: clear lines, status 2")

    def test_bad_checkpoints(self):
        """Something else, or damaged: refused, also where one bit is flipped that the weights depend on."""
        good, weights = self.checkpoint.read_bytes(), c.named(self.model)
        contents = {"empty": b"", "cut": good[:9000], "bytes": os.urandom(5000), "list": [1, 2]}
        contents |= {"resnet": {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "number": torch.zeros(3)}
        contents |= {"shapes": {**weights, "0.W": torch.zeros(8, 3, 3, 3)}, "missing": None}
        contents["other task"] = {"model": weights, "classes": "0123456789"}
        for name, content in contents.items():
            path = self.tmp / f"{name}.pt"
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                torch.save(content, path)
            why = "it is resnet18.py's" if name == "other task" else "("
            says = [f"--checkpoint: {path} can't be used", why]
            self.refused("--predict", self.tmp / "seven.png", "--checkpoint", path, says=says)
        model, path, refused = c.build_cnn("cpu"), self.tmp / "flipped.pt", 0
        for _ in range(100):
            content = bytearray(good)
            content[self.rng.randrange(len(good))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(content)
            try:
                c.load_weights(path, model)
                self.assertTrue(all(map(torch.equal, model.parameters(), weights.values())))
            except c.InputError:
                refused += 1
        self.say(f"{', '.join(contents)}: clear lines; one bit flipped: {refused} of 100 refused")
        self.assertGreater(refused, 75)


class Import(Case):
    def test_no_side_effects(self):
        """Importing a script prints, writes, fetches and seeds nothing, and sets neither a signal handler nor
        pyplot's backend; neither script needs fcntl or resource, which Windows lacks."""
        code = (
            "import signal, socket, sys, torch, torchvision\n"
            "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = None\n"
            "def state():\n"
            "    flags = torch.is_grad_enabled(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)\n"
            "    return *torch.get_rng_state(), *flags\n"
            "before = state()\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "script = __import__(sys.argv[2])\n"
            "assert state() == before and script.fcntl is None\n"
            "assert not torch.are_deterministic_algorithms_enabled() and not torch.cuda.is_initialized()\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        empty = self.tmp / "empty"
        empty.mkdir()
        for script in (c, r):
            here, name = str(Path(script.__file__).resolve().parent), script.__name__
            argv = [sys.executable, "-B", "-W", f"error::UserWarning:{name}", "-c", code, here, name]
            done = subprocess.run(argv, cwd=empty, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout, done.stderr, [*empty.iterdir()]), (0, "", "", []))
        self.say("silent, no file, no socket, no pyplot, no seed")

    def test_reading_is_the_same(self):
        """What stands in both scripts is the same: what is mended in one is mended in the other."""
        reading = ("open_picture", "above_paper", "otsu", "crop_to_sheet", "choose_parts", "find_ink")
        names = (*reading, "device_name", "git_commit", "duration")
        for name in names:
            self.assertEqual(inspect.getsource(getattr(c, name)), inspect.getsource(getattr(r, name)), name)
        self.say(f"{len(names)} functions, the same to the letter")


# ---------------------------------------------------------------------------------------------- resnet18.py

STOPS = (signal.SIGTERM, signal.SIGINT)
REGIMES = {"fc": "linear_probe", "layer4": "partial_unfreeze", "all": "full"}  # by what trains
TEST_FILES = {"metrics.json", "per_class.csv", "confusion.csv", "confusion.png", "confusions_top.png"}


def write_emnist(root, seed=0):
    """Files in EMNIST's layout, 300 and 100 images: every class is a pattern of its own, with noise."""
    rng, raw = np.random.default_rng(seed), Path(root) / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    patterns = rng.integers(0, 256, (62, 7, 7)).repeat(4, 1).repeat(4, 2)
    for part, n in (("train", 300), ("test", 100)):
        labels = np.arange(n) % 62
        images = np.clip(patterns[labels] + rng.normal(0, 30, (n, 28, 28)), 0, 255)
        write_idx(raw / f"emnist-byclass-{part}-images-idx3-ubyte", images)
        write_idx(raw / f"emnist-byclass-{part}-labels-idx1-ubyte", labels)


def small_flags(data, *more):
    flags = ["--dataset", "emnist", "--data-dir", data, "--weights", "none", "--image-size", 32]
    return [str(word) for word in (*flags, "--device", "cpu", *more)]


class Slim(torchvision.models.resnet.BasicBlock):
    """A block of ResNet-18 with 8 channels inside, where the network itself is not what is tested."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, 8, *args, **kwargs)
        self.conv2 = torch.nn.Conv2d(8, planes, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(planes)


def slim_resnet():
    return torchvision.models.ResNet(Slim, [1, 1, 1, 1])


@contextlib.contextmanager
def slim():
    """Within: a network of 0.3 million parameters, and empty pictures, which take longer than a small run."""
    parts, sizes = {}, {k: p.numel() for k, p in slim_resnet().named_parameters() if k[:3] != "fc."}
    for name, part in r.PARTS.items():
        count = sum(n for k, n in sizes.items() if k.startswith(part.prefixes))
        parts[name] = part._replace(parameters=count)
    drawing = [name for name in vars(r) if name.startswith("draw_") and name != "draw_affine"]
    with mock.patch.multiple(r, PARTS=parts, **dict.fromkeys(drawing, empty_picture)):
        with mock.patch.object(torchvision.models, "resnet18", slim_resnet):
            yield


def empty_picture(path, *_):
    r.write_bytes(path, b"")


def call_resnet(*argv):
    """call() of resnet18.py; signals go where they went before."""
    handlers = [signal.getsignal(number) for number in STOPS]
    with mock.patch.object(sys, "argv", ["resnet18.py", *map(str, argv)]):
        try:
            return call(*argv, script=r)
        finally:
            for number, handler in zip(STOPS, handlers):
                signal.signal(number, handler)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["resnet18"])


def child(argv, log, env, patch):
    """A slim run in a process of its own; patch() changes something in it first."""
    os.environ.update(env)
    sys.argv = ["resnet18.py", *argv]
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    plain = time.sleep
    time.sleep = lambda seconds: plain(seconds / 20)  # the other ranks' seconds of waiting for rank 0
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)  # as the script does under __main__
    with slim():
        patch()
        status = r.main(argv)
        r.ignore_signals()
        os._exit(status)


def start(argv, log, patch=tuple, world=1):
    """The processes of one run, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env, ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}, []
    for rank in range(world):
        own = env | {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} if world > 1 else {}
        ranks.append(FORKS.Process(target=child, args=([str(a) for a in argv], str(log), own, patch)))
        ranks[-1].start()
    return ranks


def finish(ranks, timeout=120):
    """Their exit statuses, negative for a signal; as under torchrun, one that is killed ends the others."""
    end = time.monotonic() + timeout
    while any(p.is_alive() for p in ranks) and time.monotonic() < end:
        if any((p.exitcode or 0) < 0 for p in ranks):
            end = min(end, time.monotonic() + 10)
        ranks[-1].join(0.05)
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def run_through(argv, log, patch=tuple, world=1):
    """A run from start to end; the seconds from args.json to comparison.json. `argv` ends with the folder."""
    statuses = finish(start(argv, log, patch, world))
    assert set(statuses) == {0}, f"{statuses}: {log.read_text()[-2000:]}"
    began, ended = (Path(argv[-1], f"{name}.json").stat().st_mtime for name in ("args", "comparison"))
    return ended - began


def killed(argv, log, *kill):
    """Whether the run was killed where kill_at() does it."""
    return finish(start(argv, log, functools.partial(kill_at, *kill))) == [-signal.SIGKILL]


def send(process, number):
    with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
        os.kill(process.pid, number)


def said(log, text, ranks):
    """Waits until the log holds the text, or the processes have ended; says which."""
    while not (there := log.exists() and text in log.read_text()) and any(p.is_alive() for p in ranks):
        time.sleep(0.005)
    return there


def row_of(out, regime="linear_probe"):
    return json.loads((Path(out) / regime / "metrics.json").read_text())


def results(out):
    """What must be the same to the bit: weights, epochs and figures, without times."""
    # a commit may come while the tests run
    found, varies = {}, {"images_per_second", "peak_memory_bytes", "checksum", "git_commit"}
    for folder in sorted(p for p in Path(out).iterdir() if p.is_dir()):
        rows = csv.DictReader(io.StringIO((folder / "log.csv").read_text()))
        log = [[v for k, v in row.items() if k != "seconds"] for row in rows]
        row = {k: v for k, v in row_of(out, folder.name).items() if "seconds" not in k and k not in varies}
        best, last = (r.read_tensors(folder / f"{name}.pt") for name in ("best", "last"))
        found[folder.name] = log, row, best, last["weights"]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def quiet(work, *args):
    """What work(*args) prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        work(*args)
    return out.getvalue()


class ResnetCase(Case):
    WHOLE = False  # the network of 11 million parameters and real pictures

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data = cls.tmp / "data"
        write_emnist(cls.data)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        stack.enter_context(contextlib.nullcontext() if cls.WHOLE else slim())

    def trainer(self, regime="partial_unfreeze", *flags):
        """A regime's trainer, before its first step."""
        run = r.Run(r.parse_args(small_flags(self.data, "--amp", "off", *flags)))
        run.out = Path(tempfile.mkdtemp(dir=self.tmp))
        data, weights, _ = r.load_inputs(run, None)
        data.to(run.device)
        model = r.build_model(len(data.classes), weights, 0)
        model.to(run.device, memory_format=r.layout(run.device))
        return r.Trainer(run, data, model, r.stages_of(regime, run.settings), run.out)

    def first_steps(self, worlds, patch, *flags):
        """How far several processes are from one in the first steps of probe and partial unfreezing, with 65
        images: the largest error, by what trains."""
        flags = ("--epochs", 1, "--batch-size", 65, "--limit", 73, *flags, "--amp", "off", "--out")
        for world in worlds:
            argv, log = small_flags(self.data, *flags, self.tmp / f"out{world}"), self.tmp / f"log{world}"
            ranks = start(argv, log, functools.partial(patch, self.tmp), world)
            self.assertEqual(finish(ranks), [0] * world, log.read_text())
        off, ranks = {}, [f"{world}.{rank}" for world in worlds for rank in range(world)]
        for part in ("fc", "layer4"):
            one, *others = (torch.load(self.tmp / f"{rank}.{part}") for rank in ranks)
            off[part] = max(error(a, b) for other in others for a, b in zip(other, one, strict=True))
        return off

    def runs(self, *argv):
        """What the call prints, which has to end well."""
        status, text, err = call_resnet(*argv)
        self.assertEqual((status, err), (0, ""))
        return text

    def refused(self, text, *argv, status=2):
        """The call ends with this status and one line, which has the text in it."""
        got, _, err = call_resnet(*argv)
        self.assertEqual((got, err[:7], err.count("\n")), (status, "error: ", 1), f"{argv}: {err}")
        self.assertIn(text, err)
        return err.strip()


class ResnetData(ResnetCase):
    def test_orientation_and_size(self):
        """The transpose is torchvision's rotation by -90 degrees, mirrored; sizes and values are its own."""
        raw = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
        turned = transforms.functional.hflip(transforms.functional.rotate(raw, -90))
        self.assertTrue(torch.equal(r.upright(raw), turned))
        for size in (32, 64, 224):
            ours, to = r.resize(raw, size), transforms.Resize((size, size))
            pil = [transforms.functional.pil_to_tensor(to(Image.fromarray(image.numpy()))) for image in raw]
            off = [float((ours - other).abs().max()) for other in (torch.stack(pil), to(raw)[:, None])]
            want = transforms.Normalize(r.MEAN, r.STD)(ours.expand(-1, 3, -1, -1) / 255)
            norm = error(r.prepare(raw, size), want)
            self.assertTrue(off[0] <= 1 and off[1] <= 0.501 and norm < 1e-5, (off, norm))
            self.say(f"{size} px: {off[0]:.2f} levels from PIL, {off[1]:.2f} from uint8, normal {norm:.0e}")

    def test_augmentation(self):
        """The identity is the plain resize; draws depend on their key only; rotations stay within 10°."""
        raw = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
        off = float((r.warp(raw, torch.eye(2, 3).expand(3, 2, 3), 64) - r.resize(raw, 64)).abs().max())
        self.assertLess(off, 0.05)
        first, again, other = (r.draw_affine(1000, r.rng(0, "augment", 0, 1, step)) for step in (2, 2, 3))
        self.assertTrue(torch.equal(first, again))
        self.assertFalse(torch.equal(first, other))
        degrees = float(torch.atan2(first[:, 1, 0], first[:, 0, 0]).rad2deg().abs().max())
        least, most = (float(end) for end in torch.linalg.det(first[:, :, :2]).sqrt().aminmax())
        self.assertLess(degrees, 10.01)
        self.assertTrue(0.87 < least and most < 1.13, (least, most))  # of a flip there is no root
        self.say(f"identity within {off:.1e}, up to {degrees:.1f} degrees, scales {least:.2f} to {most:.2f}")

    def test_split(self):
        train, val = r.split(697_932, 0, 0)
        self.assertEqual((len(train), len(val)), (628_138, 69_794))
        self.assertEqual(len(torch.cat([train, val]).unique()), 697_932)
        self.assertTrue(torch.equal(train, r.split(697_932, 0, 0)[0]))
        self.assertFalse(torch.equal(train, r.split(697_932, 0, 1)[0]))
        limited = torch.cat(r.split(697_932, 1000, 0)).unique()
        self.assertTrue(len(limited) == 1000 and limited[-1] > 600_000)
        self.assertEqual(r.load_emnist(self.data).name, "EMNIST ByClass, 300/100 re-split")
        self.assertEqual([len(rows) for rows in r.load_digits().labels.values()], [1437, 360])
        self.say("628,138 / 69,794, disjoint, by seed; --limit draws from everywhere")

    def test_defaults(self):
        """Without a GPU EMNIST takes 12,000 images at 64 px, each where no flag says otherwise."""
        cases = (
            ("cpu", "", (12_000, 64)),
            ("cpu", "--limit 50", (50, 64)),
            ("cpu", "--image-size 32", (12_000, 32)),
            ("cpu", "--limit 0 --image-size 224", (0, 224)),
            ("cpu", "--dataset digits", (0, 224)),
            ("cpu", "--dataset digits --limit 50 --image-size 32", (50, 32)),
            ("cuda", "", (0, 224)),
            ("mps", "--limit 50", (50, 224)),
        )
        for device, flags, want in cases:
            argv = ["--data-dir", str(self.data), "--weights", "none", "--amp", "off", "--device", "cpu"]
            run = r.Run(r.parse_args([*argv, *flags.split()]))
            run.device = torch.device(device)
            r.load_inputs(run, None)
            self.assertEqual((run.settings.limit, run.settings.image_size), want, f"{device} {flags}")
        self.say(f"{len(cases)} commands, such as none on a CPU: 12,000 images at 64 px")


class ResnetModel(ResnetCase):
    WHOLE = True

    def test_forward(self):
        """head(inputs), from kept inputs as from recomputed ones, is torchvision's own forward pass."""
        for (trains, regime), count in zip(REGIMES.items(), (31_806, 8_425_534, 11_208_318)):
            t, off = self.trainer(regime, "--limit", 60), []
            self.assertEqual(sum(p.numel() for p in t.model.parameters() if p.requires_grad), count)
            t.model.eval()
            for computed in (False, True):
                if computed:
                    quiet(t.inputs.compute, t.timer)
                self.assertEqual(list(t.inputs.kept), ["train", "val"] * (computed and trains != "all"))
                for name, index in (("train", torch.randperm(54)[:40]), ("val", torch.arange(6))):
                    with torch.no_grad():
                        want = t.model(r.prepare(t.data.images[name][index], 32))
                        off.append(error(t.head(t.inputs(name, index)), want))
            self.within(1e-5, max(off), f"{trains} trains, {count:,} parameters")

    def test_dry_run(self):
        """Through everything, with pictures; it says what it was, everywhere, and --compare refuses it."""
        out, argv = self.tmp / "dry", ["--dataset", "digits", "--weights", "none", "--image-size", 32]
        text = self.runs(*argv, "--device", "cpu", "--regimes", "linear_probe", "--dry-run", "--out", out)
        row = row_of(out)
        self.assertEqual((row["dry_run"], row["limit"], row["epochs_run"]), (True, None, 1))
        written = [(out / f"comparison.{kind}").read_text() for kind in ("md", "json")]
        for told in (text.split("training, ")[0], *written):
            self.assertIn("DRY RUN", told)
        sizes = [side for path in out.rglob("*.png") for side in Image.open(path).size]
        self.assertTrue(len(sizes) == 10 and 200 < min(sizes) and max(sizes) < 2500, sizes)
        dark = (np.asarray(Image.open(out / "samples.png").convert("L")) < 64).mean()
        self.assertGreater(dark, 0.1)  # images, light on dark, and not only their labels
        self.say(self.refused("comes from a dry run", "--compare", out, "--out", self.tmp / "none")[-50:])


class ResnetTraining(ResnetCase):
    def test_frozen(self):
        """After training, what is frozen is the same bit for bit, statistics too, and what trains is not."""
        for trains in ("fc", "layer4"):
            t = self.trainer(REGIMES[trains], "--epochs", 1, "--lr", 0.01)
            before = {k: v.clone() for k, v in t.model.state_dict().items()}
            quiet(t.train)
            changed = {k for k, v in t.model.state_dict().items() if not torch.equal(v, before[k])}
            self.assertEqual(changed, {k for k in before if k.startswith(r.PARTS[trains].prefixes)})
            self.say(f"{trains}: {len(changed)} tensors changed, {len(before) - len(changed)} did not")

    def test_step(self):
        """One step is a plain loop's: gradient of the mean loss, AdamW, statistics of what trains."""
        for trains, regime in REGIMES.items():
            t = self.trainer(regime, "--batch-size", 64, "--warmup-epochs", 0)
            model, names = r.build_model(62, None, 0).eval(), r.PARTS[trains].prefixes
            for name, module in model.named_modules():
                module.train(f"{name}.".startswith(names))
            theirs = [p for k, p in model.named_parameters() if k.startswith(names)]
            order = torch.randperm(t.n)
            index = order[: t.n // t.steps]
            images, labels = t.data.images["train"][index], t.data.labels["train"][index]
            loss = F.cross_entropy(model(r.prepare(images, 32)), labels)
            loss.backward()
            t.head.train()
            t.train_step(order)
            off = [error(t.state.sums[0], loss), *(error(p.grad, q.grad) for p, q in zip(t.params, theirs))]
            for p, q in zip(t.params, theirs, strict=True):
                q.grad = p.grad.clone()  # AdamW's first step has the gradient's sign: noise would count
            torch.optim.AdamW(theirs, lr=t.stage.lr, weight_decay=0.01).step()
            ours = t.model.state_dict()
            self.assertLess(max(error(ours[k], v) for k, v in model.state_dict().items()), 1e-5)
            self.within(1e-3, max(off), f"{trains}: loss {loss.item():.4f}, gradients")

    def test_steps(self):
        """Every image once an epoch, in steps of equal size, each augmented anew; warm-up, then to zero."""
        t = self.trainer("linear_probe", "--augment", "--batch-size", 64, "--epochs", 3, "--warmup-epochs", 1)
        seen, maps, rates = [], set(), []

        def inputs(part, index, theta):
            seen.append(index)
            maps.add(tuple(theta[0].flatten().tolist()))
            return torch.zeros(len(index), 512)

        t.inputs = inputs
        for t.state.epoch in range(3):
            t.state.step = 0
            order = torch.randperm(t.n)
            while t.state.step < t.steps:
                t.train_step(order)
                rates.append(t.optimizer.param_groups[0]["lr"])
            self.assertEqual(torch.cat(seen[-t.steps :]).sort().values.tolist(), list(range(t.n)))
        sizes = {len(index) for index in seen}
        self.assertLessEqual(max(sizes) - min(sizes), 1)
        self.assertEqual((len(seen), len(maps)), (3 * t.steps,) * 2)
        want = [0.01 * k / (t.steps + 1) for k in range(1, t.steps + 1)]
        want += [0.005 * (1 + math.cos(math.pi * k / (2 * t.steps))) for k in range(2 * t.steps)]
        np.testing.assert_allclose(rates, want)
        ends = f"{rates[0]:.1e} to {max(rates):.1e} to {rates[-1]:.1e}"
        self.say(f"{t.n} images in {t.steps} steps of {sizes}; rate {ends}")

    def test_amp(self):
        """In float32 and, with about the same loss, in bf16 images are learnt by heart; no fp16, no TF32."""
        torch.backends.cudnn.allow_tf32, losses = True, []
        for amp in ("off", "bf16"):
            flags = ("--epochs", 12, "--limit", 62, "--batch-size", 32, "--warmup-epochs", 0, "--amp", amp)
            t = self.trainer("full", *flags)
            quiet(t.train)
            self.assertGreater(t.state.history[-1]["train_accuracy"], 0.95)
            losses.append(t.state.history[1]["train_loss"])
        self.assertFalse(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        self.assertAlmostEqual(*losses, delta=0.1 * losses[0])
        self.assertNotEqual(*losses)
        here = r.choose_amp("auto", torch.device("cpu"))
        self.say("loss {:.4f} in float32, {:.4f} in bf16; auto here: {}".format(*losses, here))

    def test_early_stopping(self):
        """Patience in epochs, min-delta in accuracy; the best weights, not the last, are restored, also where
        a later stage never gets better or diverges."""
        t, weights = self.trainer("gradual", "--epochs", 9, "--patience", 3), []
        script = iter([0.5, 0.6, 0.6 + r.MIN_DELTA / 2, 0.55, 0.59] + [0.5] * 4)

        def accuracy(logits, labels):
            weights.append({k: v.clone() for k, v in t.model.state_dict().items()})
            return next(script)

        with mock.patch.object(r, "accuracy_of", accuracy):
            text = quiet(t.train)
            self.assertEqual((t.state.epoch, t.state.stale, t.state.best["epoch"]), (5, 3, 3))
            self.assertTrue(t.summary()["early_stopped"] and same(dict(t.model.state_dict()), weights[2]))
            for number, epochs, end in ((1, 4, "epoch 3 of stage fc"), (2, 0, "ending this stage")):
                t.begin(number)
                if number == 2:
                    t.model.fc.register_forward_hook(lambda module, x, logits: logits * math.nan)
                self.assertIn(end, quiet(t.train))
                self.assertEqual((t.state.epoch, t.state.best["number"], t.state.done), (epochs, 0, True))
                self.assertTrue(same(dict(t.model.state_dict()), weights[2]))
        self.assertTrue(same(r.read_tensors(t.folder / "best.pt")["model"], weights[2]))
        self.assertFalse(same(weights[2], weights[4]))
        self.say(f"{text.splitlines()[-1]}; kept over a worse stage and one that diverged")

    def test_not_finite(self):
        """A loss that is not finite ends the training and leaves the last good checkpoint."""
        t = self.trainer("linear_probe")

        def finish_epoch():
            type(t).finish_epoch(t)
            t.model.fc.register_forward_hook(lambda module, x, logits: logits * math.nan)

        t.finish_epoch = finish_epoch
        with self.assertRaisesRegex(r.Diverged, "the loss is nan in epoch 2") as caught:
            quiet(t.train)
        self.assertEqual(r.read_tensors(t.folder / "last.pt")["epoch"], 1)
        t = self.trainer("linear_probe")
        t.model.fc.bias.data.fill_(math.nan)  # as an epoch's last step may: its loss was still finite
        self.assertRaisesRegex(r.Diverged, "a weight is no longer finite", t.save)
        self.say(str(caught.exception))

    def test_stopped_while_it_saves(self):
        """A stop that is asked for during a stage's last save acts before the next thing begins."""
        t = self.trainer("linear_probe", "--epochs", 1)
        t.finish_epoch = lambda: (type(t).finish_epoch(t), t.run.ask_stop())
        self.assertRaises(r.Stopped, quiet, t.train)
        self.assertTrue(r.read_tensors(t.folder / "last.pt")["done"])
        self.say("stopped, the stage saved as done")

    def test_accounting(self):
        """Every step's time is training time, also before a checkpoint that comes with an epoch's last step;
        a stage that diverged is marked, and leaves its time to no other epoch."""
        t = self.trainer("gradual", "--epochs", 2, "--checkpoint-minutes", 0, "--batch-size", 500)
        step = t.train_step
        t.train_step = lambda order: (time.sleep(0.2), step(order))
        quiet(t.train)
        steps, validation = (float(t.state.spent[phase][0]) for phase in ("steps", "validation"))
        self.assertEqual((t.steps, t.summary()["diverged"]), (1, False))
        self.assertGreater(steps, 0.4)
        self.assertLess(validation, 0.3)
        t.begin(1)
        t.train_epoch = mock.Mock(side_effect=r.Diverged("made up"))
        t.state.spent["steps"] += 100
        quiet(t.train)
        self.assertTrue(t.summary()["diverged"] and t.summary()["best_stage"] == "fc")
        t.begin(2)
        del t.train_epoch
        quiet(t.train)
        self.assertLess(max(row["seconds"] for row in t.state.history), 50)
        self.say(f"{steps:.2f} s of steps, {validation:.2f} s of validation")

    def test_cache_budget(self):
        """--cache-gb decides; a rebuilt cache is the same to the bit; several processes keep none."""
        kept = []
        for budget in (1, 1, 0):
            t = self.trainer("partial_unfreeze", "--cache-gb", budget)
            self.assertIn("GB, budget", quiet(t.inputs.compute, t.timer))
            kept.append(t.inputs.kept)
        self.assertTrue(same(kept[0], kept[1]))
        self.assertEqual((list(kept[0]), list(kept[2])), (["train", "val"], []))
        t = self.trainer("partial_unfreeze")
        t.inputs.in_memory, t.run.world = True, 2  # begun by one process, continued by two
        self.assertIn("recomputed for every batch (several processes)", quiet(t.inputs.decide_cache, 10))
        self.assertFalse(t.inputs.in_memory)
        self.say("kept with 1 GB, twice the same bits; not kept with 0, nor by several processes")

    def test_memory_limits(self):
        """The tightest control group around it counts, of either version; old file pages are free."""
        mb, v1 = 1 << 20, ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        for told, group, (limit, used, cache) in (
            ("0::/job_7/step_0\n", "job_7", ("max", "current", "inactive_file")),
            ("9:cpu:/x\n4:cpu,memory:/user/job_7\n", "memory/user", v1),
        ):
            system, group = Path(tempfile.mkdtemp(dir=self.tmp)), Path("sys/fs/cgroup", group)
            files = {group / f"memory.{limit}": 1024 * mb, group / f"memory.{used}": 300 * mb}
            files |= {group / "memory.stat": f"anon 5\n{cache} {100 * mb}\n"}
            files |= {group.parent / f"memory.{limit}": "max\n", Path("proc/self/cgroup"): told}
            for path, content in files.items():
                (system / path.parent).mkdir(parents=True, exist_ok=True)
                (system / path).write_text(str(content))
            self.assertEqual(list(r.cgroups_left(system)), [824 * mb])
        self.assertEqual(list(r.cgroups_left(self.tmp / "none")), [])
        with mock.patch.object(r, "cgroups_left", return_value=[5 * mb, 3 * mb]):
            self.assertEqual(r.free_bytes(torch.device("cpu")), 3 * mb)
        self.say("824 of 1,024 MiB left in either version")

    def test_peak_memory(self):
        """A regime's peak is its own: one that needs less, after another, is told less."""
        if not Path("/proc/self/clear_refs").exists():
            self.skipTest("no /proc/self/clear_refs here")
        device, peaks = torch.device("cpu"), []
        for size in (400, 100):  # MiB
            r.reset_peak(device)
            before = r.peak_bytes(device)
            with mmap.mmap(-1, size << 20) as pages:  # of its own, not what earlier tests left
                for _ in range(size):
                    pages.write(bytes(1 << 20))
            peaks.append((r.peak_bytes(device) - before) >> 20)
        self.assertTrue(350 <= peaks[0] <= 450 and 50 <= peaks[1] <= 150, peaks)
        self.say(f"400 and 100 MiB allocated: peaks {peaks[0]} and {peaks[1]} MiB above the start")


class ResnetMetrics(ResnetCase):
    def test_against_scikit_learn(self):
        y = torch.randint(0, 62, (500,))
        logits = torch.randn(500, 62) + 2 * F.one_hot(y, 62)
        read, ours = logits.argmax(1), r.test_metrics(y, logits, r.CLASSES)
        for name in ("f1", "recall", "precision"):
            want = getattr(metrics, f"{name}_score")(y, read, average="macro", zero_division=0)
            self.assertEqual(ours[f"test_{name}_macro"], want)
        self.assertAlmostEqual(r.macro_f1(y, read, 62), ours["test_f1_macro"], places=12)
        either = torch.tensor([r.CLASSES[a].lower() == r.CLASSES[b].lower() for a, b in zip(y, read)])
        top5 = (logits.topk(5).indices == y[:, None]).any(1)
        for name, right in (("accuracy", y == read), ("top5", top5), ("accuracy_case_insensitive", either)):
            self.assertAlmostEqual(ours[f"test_{name}"], float(right.double().mean()), places=12)
        self.assertGreater(int(either.sum()), int((y == read).sum()))
        confusion = metrics.confusion_matrix(y, read, labels=range(62))
        for k, row in enumerate(r.per_class(y, read, confusion, r.CLASSES)):
            errors = read[(y == k) & (read != k)].bincount(minlength=62)
            self.assertEqual((row["images"], row["errors"]), (int((y == k).sum()), int(errors.sum())))
            worst = [r.CLASSES[j] for j in range(62) if errors[j] == errors.max()]
            self.assertIn(row["most_confused_with"], worst)
        self.say(f"macro-F1 {ours['test_f1_macro']:.4f}, top-5 {ours['test_top5']:.4f}, 62 classes: equal")

    def test_prior_correction(self):
        """On a rare class that the prior hides, the offset found on validation helps macro-F1."""
        prior = torch.tensor([0.95, 0.05]).double().log()
        y = (torch.rand(4000) < 0.05).long()
        evidence = torch.randn(4000) + 1.5 * (2 * y - 1)
        logits = torch.stack([-1.5 * evidence, 1.5 * evidence], 1) + prior
        tau = r.tune_tau(logits, y, prior)
        guesses = [(logits - t * prior).argmax(1) for t in (0, tau)]
        plain, better = (metrics.f1_score(y, guess, average="macro") for guess in guesses)
        self.assertGreater(better, plain)
        self.say(f"tau {tau}, macro-F1 {plain:.4f} -> {better:.4f}")

    def test_labels(self):
        """In a comparison, runs of one regime are told apart by what differs; one alone is no winner."""
        row = dict(regime="full", dataset="EMNIST", weights="w", image_size=64, samples_per_epoch=900)
        row |= dict(augment=False, learning_rate=1e-3, epochs_run=3, seed=0, test_accuracy=0.8)
        row |= dict(train_seconds=9.0, test_f1_macro=0.7, update_budget=9, trainable_params=5)
        row |= dict(amp="off", processes=1, device="cpu", dry_run=False)
        cases = ("image_size", 224, "224 px"), ("augment", True, "augmented: True")
        cases += ("samples_per_epoch", 12_000, "12,000 training images"), ("learning_rate", 0.05, "lr 0.05")
        for key, value, words in cases:
            rows = [dict(row), row | {key: value}]
            r.label_rows(rows)
            self.assertEqual(rows[1]["label"], f"full ({words})")
        twins = [dict(row), dict(row)]
        r.label_rows(twins)
        self.assertEqual([t["label"] for t in twins], ["full (run 1)", "full (run 2)"])
        rows = [dict(row), dict(row), row | {"seed": 1}]
        r.label_rows(rows)
        labels = ["full (seed 0) (run 1)", "full (seed 0) (run 2)", "full (seed 1)"]
        self.assertEqual([t["label"] for t in rows], labels)
        self.assertIn("both the cheapest and the most accurate", r.trade_off(twins))
        self.assertIn("different test sets", r.trade_off([twins[0], twins[1] | {"dataset": "digits"}]))
        rows = [dict(row), row | {"regime": "gradual", "dataset": "digits"}]
        r.label_rows(rows)
        self.assertEqual([t["label"] for t in rows], ["full (EMNIST)", "gradual (digits)"])
        slower = row | {"label": "slower", "train_seconds": 10.0}  # as accurate, but not as cheap
        self.assertIn("both the cheapest and the most accurate", r.trade_off([slower, twins[0]]))
        self.assertNotIn("cheapest", r.trade_off(twins[:1]))
        self.say(labels[1])


class ResnetPlan(ResnetCase):
    """What is said before the work and while it lasts."""

    def test_plan(self):
        """A line from a few batches that change no weight, statistic, gradient, optimizer or generator."""
        t = self.trainer("gradual", "--limit", 0)

        def state():
            model = {k: v.clone() for k, v in t.model.state_dict().items()}
            grads = [(p.requires_grad, p.grad) for p in t.model.parameters()]
            return model, grads, t.optimizer.state_dict(), torch.get_rng_state(), t.model.training

        before = state()
        with mock.patch.object(r, "prepare", wraps=r.prepare) as prepare:
            text = quiet(r.plan, t.run, t.data, t, ["gradual"])
        self.assertTrue(same(before, state()))
        self.assertRegex(text, r"^plan: gradual about [\d.]+[smh] on .*\n$")
        self.assertLessEqual(prepare.call_count, 9)  # three for each part of the network
        self.assertGreater(t.state.spent["plan"][0], 0)  # not charged to the training
        for flags, passes in (((), 1), (("--cache-gb", 0), 8)):
            t = self.trainer("gradual", "--limit", 0, *flags)
            with mock.patch.object(
                r, "time_per_image", return_value=(2, 1)
            ):  # seconds: frozen layers, a step
                plan = quiet(r.plan, t.run, t.data, t, ["linear_probe", "gradual"])
            probe, test = 15 * (270 + 30 / 3), (2 + 1 / 3) * 100
            layers = 2 * 300 * (passes + 8) + 2 * 8 * (
                270 + 30 / 3
            )  # layer4, then all; the features are there
            want = r.duration(2 * 300 + probe + test), r.duration(probe + layers + test)
            self.assertIn("linear_probe about {}, gradual about {} on".format(*want), plan)
        self.say(f"{prepare.call_count} batches: {text.strip()[:60]}")

    def test_lines(self):
        """A line after every batch, or a plan, changes no bit; every pass gives its lines."""
        argv = small_flags(self.data, "--epochs", 1, "--limit", 100, "--seed", 2**64 - 1, "--out")
        silent = property(lambda run: -math.inf, lambda run, now: None)  # as if for hours
        with mock.patch.object(r.Run, "printed_at", silent, create=True):
            text = self.runs(*argv, self.tmp / "lines")
        for what in ("features, train: 90/90", "features, val: 10/10", "cache, train: 90/90"):
            self.assertIn(what, text)
        self.assertRegex(text, r"(?s)plan: linear.*\| step 1/1 .*\bval: 10/10.*\btest: 100/100")
        with mock.patch.object(r, "plan"):
            self.runs(*argv, self.tmp / "neither")
        self.assertTrue(same(results(self.tmp / "lines"), results(self.tmp / "neither")))
        self.say(re.search("test: .*", text)[0])

    def test_pulse(self):
        """A line in a log file after twenty seconds of silence, not before, and from rank 0 alone."""
        run, lines = r.Run(r.parse_args(["--device", "cpu"])), []
        for silent, run.main in ((15, True), (25, False), (25, True)):
            run.printed_at = time.monotonic() - silent
            lines.append(quiet(run.pulse, r.pace_line, "test", 300, 1000, time.monotonic() - 3))
        self.assertEqual([line.count("\n") for line in lines], [0, 0, 1])
        self.say(lines[-1].strip())

    def test_banner(self):
        """On a CPU it says that not all was taken, and the flags for everything."""
        argv = small_flags(self.data, "--regimes", "linear_probe", "--epochs", 1, "--out", self.tmp / "few")
        with mock.patch.dict(r.CPU_RUN, limit=100):
            text = self.runs(*argv)
        self.assertIn("!" * 100 + "\nNO GPU: ", text)
        line = re.search("add (.*) and a new --out: at least .*[smh] here", text)
        full = r.parse_args(line[1].split())
        self.assertEqual((full.limit, full.image_size), (0, 224))
        for kept in (json.loads((self.tmp / "few" / "args.json").read_text()), row_of(self.tmp / "few")):
            self.assertEqual((kept["limit"], kept["image_size"]), (100, 32))
        self.assertNotIn("NO GPU", self.runs(*argv[:-1], self.tmp / "all", "--limit", 0))
        self.say(line[0])


class ResnetRuns(ResnetCase):
    """Whole runs: what they leave, and what a later call makes of it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        flags = ("--regimes", "gradual", "--epochs", 1, "--batch-size", 64, "--limit", 200, "--amp", "off")
        flags += ("--out",)
        cls.argv, cls.out = small_flags(cls.data, *flags), cls.tmp / "whole"

        def draw(path, *_):  # a signal so near the end changes nothing
            for number in STOPS:
                os.kill(os.getpid(), number)
            empty_picture(path)

        with mock.patch.object(r, "draw_comparison", draw):
            cls.status, cls.text, cls.errors = call_resnet(*cls.argv, cls.out)
        cls.row = row_of(cls.out, "gradual")

    def test_files(self):
        """Everything that a run leaves, and a second call that finds all done."""
        self.assertEqual((self.status, self.errors, self.text.count("continue with: ")), (0, "", 1))
        names = {".lock", "args.json", "samples.png", "gradual"}
        names |= {f"comparison.{kind}" for kind in ("json", "md", "png")}
        self.assertEqual({p.name for p in self.out.iterdir()}, names)
        names = {"log.csv", "best.pt", "last.pt", "curves.png"} | TEST_FILES
        self.assertEqual({p.name for p in (self.out / "gradual").iterdir()}, names)
        want = dict(update_budget=3 * 180, samples_per_epoch=180, max_epochs=3, augment=False, limit=200)
        want |= dict(dry_run=False, learning_rate=1e-3, image_size=32, weights="random", seed=0, processes=1)
        self.assertLessEqual(want.items(), self.row.items())
        self.assertEqual([stage["trains"] for stage in self.row["stages"]], ["fc", "layer4", "all"])
        self.assertGreater(self.row["train_cpu_seconds"], 0)
        m, seconds = self.row, self.row["seconds"]
        training = sum(seconds[phase] for phase in ("features", "cache", "steps"))
        self.assertAlmostEqual(m["train_seconds"], training)
        self.assertAlmostEqual(m["total_seconds"], sum(seconds.values()))
        log = list(csv.DictReader((self.out / "gradual" / "log.csv").open()))
        self.assertEqual((m["epochs_run"], m["update_budget"]), (len(log), len(log) * 180))
        # the best epoch was chosen on a tenth of the training set, and on nothing else
        best, data = [row for row in log if row["best"] == "1"][-1], r.load_emnist(self.data)
        self.assertEqual(m["stages"][-1]["best_stage"], best["stage"])
        (model, *_), (_, val) = r.load_model(self.out / "gradual" / "best.pt"), r.split(300, 200, 0)
        with torch.no_grad():
            logits = model(r.prepare(data.images["train"][val], 32))
        right = (logits.argmax(1) == data.labels["train"][val]).double().mean()
        loss = F.cross_entropy(logits, data.labels["train"][val])
        self.assertAlmostEqual(float(right), m["val_accuracy"])
        self.assertAlmostEqual(float(loss), float(best["val_loss"]), places=4)
        text = self.runs(*self.argv, self.out)
        self.assertEqual((text[:11], text.count("\n")), ("all is done", 1))
        self.say(text.strip())

    def test_best_is_back(self):
        """best.pt is written again from last.pt if it is missing or damaged."""
        out = self.tmp / "copy"
        shutil.copytree(self.out, out)
        best = out / "gradual" / "best.pt"
        want, texts = r.read_tensors(best), []
        for damage in (best.unlink, lambda: best.write_bytes(best.read_bytes()[:-99])):
            damage()
            texts.append(self.runs(*self.argv, out))
            self.assertTrue(same(r.read_tensors(best), want))
        self.assertIn("torn or damaged", texts[1])
        self.assertTrue(all("training has ended" in text for text in texts))
        self.assertTrue(same(results(out), results(self.out)))
        self.say(re.search(".*torn or damaged", texts[1])[0])

    def test_end(self):
        """The features go before the comparison is written, with which a run counts as done."""
        out = self.tmp / "ended"
        argv = small_flags(self.data, "--regimes", "linear_probe", "--dry-run", "--out", out)
        with mock.patch.object(r, "draw_comparison", side_effect=r.RunFailed("ended here")):
            self.refused("ended here", *argv, status=1)
        names = sorted(path.name for path in out.iterdir() if path.name[0] != ".")
        self.assertEqual(names, ["args.json", "linear_probe", "samples.png"])
        self.runs(*argv)
        self.assertTrue((out / "comparison.json").exists())
        shutil.rmtree(out / "linear_probe")  # to train it again
        with mock.patch.object(r, "run_regime", side_effect=r.RunFailed("ended here")):
            self.refused("ended here", *argv, status=1)
        self.assertFalse((out / "comparison.json").exists())
        self.say(", ".join(names))

    def test_evaluate(self):
        """--evaluate best.pt has the run's own test figures; load_model() gives its model."""
        best, to = self.out / "gradual" / "best.pt", self.tmp / "evaluated"
        argv = ["--evaluate", best, "--data-dir", self.data, "--device", "cpu", "--out", to]
        text, row = self.runs(*argv), json.loads((to / "metrics.json").read_text())
        for k in ("test_accuracy", "test_f1_macro", "test_top5", "dataset", "image_size"):
            self.assertEqual(row[k], self.row[k])
        self.assertEqual({p.name for p in to.iterdir()}, TEST_FILES)
        self.refused("comes from a run on emnist, not digits", *argv, "--dataset", "digits")
        other = self.tmp / "other data"
        write_emnist(other, seed=1)
        words = [other if word == self.data else word for word in argv]
        self.refused(f"not these files in {other}", *words)
        words = [other if word == str(self.data) else word for word in (*self.argv, self.out)]
        (self.out / "gradual" / "metrics.json").rename(self.tmp / "aside")  # so that it goes on
        self.refused("data_checksum was", *words)
        (self.tmp / "aside").rename(self.out / "gradual" / "metrics.json")
        text = self.runs("--compare", self.out, to, "--out", self.tmp / "compared")
        self.assertIn("the result of --evaluate, not of a run; skipped", text)
        self.assertEqual((to / "confusion.csv").read_bytes(), (best.parent / "confusion.csv").read_bytes())
        (model, classes, size), data = r.load_model(best), r.load_emnist(self.data)
        self.assertEqual((model.training, classes, size), (False, r.CLASSES, 32))
        with torch.no_grad():
            right = model(r.prepare(data.images["test"], size)).argmax(1) == data.labels["test"]
        self.assertAlmostEqual(float(right.double().mean()), row["test_accuracy"], delta=0.011)
        self.say(text.strip()[:80])

    def test_other_arguments(self):
        """Of a run that is there they are refused, and so is a second run at the same time."""
        more = ("--lr", 0.1, "--seed", 3, "--checkpoint-minutes", 9)
        text = "arguments: --lr was not given, now 0.1; --seed was 0, now 3"
        text = self.refused(text, *self.argv, self.out, *more)
        with r.folder_lock(self.out):
            self.refused("another run is writing into", *self.argv, self.out)
        weights, argv = self.tmp / "weights.pt", small_flags(self.data, "--dry-run", "--regimes", "full")
        for seed in range(2):
            torch.manual_seed(seed)
            torch.save(slim_resnet().state_dict(keep_vars=True), weights)
            with mock.patch.object(r, "run_regime", side_effect=r.Stopped):
                status, _, err = call_resnet(*argv, "--weights", weights, "--out", self.tmp / "other weights")
            self.assertEqual(
                (status, "weights_checksum was" in err), (75, False) if seed == 0 else (2, True), err
            )
        self.say(text[-60:])

    def test_compare(self):
        """Several folders in one table; a file that was changed, or is not of a run, is refused."""
        target, path = self.tmp / "compared", self.tmp / "changed" / "metrics.json"
        text = self.runs("--compare", self.out, self.out / "gradual", "--out", target)
        self.assertEqual(len(json.loads((target / "comparison.json").read_text())["rows"]), 2)
        self.assertIn("| gradual (run 2) |", text)
        path.parent.mkdir()
        for content in (self.row | {"test_accuracy": 0.99}, {"dataset": "mnist"}):
            path.write_text(json.dumps(content))
            self.refused("not as the run wrote it", "--compare", path.parent, "--out", target)
        older = {k: v for k, v in self.row.items() if k not in ("processes", "dry_run")}
        path.write_text(json.dumps(older | {"checksum": r.checksum(older)}))
        text = "is another version's: it lacks 'processes'"
        self.refused(text, "--compare", path.parent, "--out", target)
        for folder in (self.out, self.out / "gradual"):
            (folder / "last.pt").unlink(missing_ok=True)
            self.refused("is a run's own folder", "--compare", self.out, "--out", folder)
        text = self.runs("--compare", self.out, self.data, "--out", target)  # one that has finished
        self.assertIn(f"{self.data}: no finished regime", text)
        self.say(self.refused("no regime has finished there", "--compare", self.data, "--out", target)[-60:])


POINTS = ("step", "batch", "half", "before", "after")


def kill_at(point, count):
    """SIGKILL at the count-th step, batch or write: with half of it written, before or after its rename."""
    places = {"step": (r.Trainer, "train_step"), "batch": (r, "prepare"), "half": (os, "fsync")}
    owner, name = places.get(point, (os, "replace"))
    plain, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args, **kwargs):
        if next(calls) != count:
            return plain(*args, **kwargs)
        if point == "half":
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        if point == "after":
            plain(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


EVENTS = ("SIGTERM", "SIGINT", "two signals", "SIGKILL", "kill point")


def disturb(argv, log, rng, kind, seconds, world=1):
    """One start of a run, which something of EVENTS befalls within `seconds`; the signals come from outside,
    to one of its processes, SIGKILL to all. Returns how it ended: done, stopped or killed."""
    log.write_text("")
    patch = functools.partial(kill_at, rng.choice(POINTS), rng.randint(1, 9))
    ranks = start(argv, log, patch if kind == "kill point" else tuple, world)
    number = getattr(signal, kind, rng.choice(STOPS))
    if kind != "kill point" and said(log, "\n", ranks):
        time.sleep(rng.uniform(0, seconds))
        victims = ranks if kind == "SIGKILL" else [rng.choice(ranks)]
        for process in victims * (1 + (kind == "two signals")):
            send(process, number)
            time.sleep(rng.choice((0, rng.uniform(0, 0.3))))
    statuses, text = finish(ranks), log.read_text()
    assert "Traceback" not in text, text
    if set(statuses) in ({0}, {75}):
        return "stopped" if 75 in statuses else "done"
    if kind not in ("kill point", "SIGKILL"):
        # until data and weights are loaded there is nothing to save: signals have their default effect
        loaded = "test images" if world == 1 else "gradual, "
        assert -number in statuses and loaded not in text, (kind, statuses, text)
    # after the last results the processes end one by one: one may be done when another is killed
    ends = {0} if "test accuracy" in text else set()
    assert set(statuses) <= ends | {1, -number, -signal.SIGKILL}, (kind, statuses, text)
    return "killed"


def storm(n, argv, out, log, rng, seconds, whole, world=1):
    """Disturbs runs n times or more; each ends with the bits of `whole`. How often which disturbance came."""
    counts = collections.Counter()
    while sum(counts.values()) < n:
        end = ""
        while end != "done":
            kind = rng.choice(EVENTS)
            end = disturb([*argv, out], log, rng, kind, seconds, world)
            counts[kind] += end != "done"
        assert same(results(out), whole), f"other bits, {world} processes"
        shutil.rmtree(out)
    return counts


class ResnetStops(ResnetCase):
    """Kills and signals: the finished run has the bits of one that nothing befell."""

    FLAGS = ("--regimes", "gradual", "--epochs", 2, "--batch-size", 90, "--limit", 200)
    FLAGS += ("--checkpoint-minutes", 0, "--out")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.log, cls.argv = cls.tmp / "log", small_flags(cls.data, *cls.FLAGS)
        cls.seconds = run_through([*cls.argv, cls.tmp / "whole"], cls.log)
        cls.whole = results(cls.tmp / "whole")

    def test_killed(self):
        """SIGKILL in the features, within writes and at steps; at last a bit of last.pt changes, too."""
        out, log = self.tmp / "killed", self.tmp / "killed.log"
        kills = (("batch", 1), ("half", 3), ("after", 7), ("step", 9))
        for kill in kills:
            self.assertTrue(killed([*self.argv, out], log, *kill), kill)
        last = out / "gradual" / "last.pt"
        last.write_bytes(flip(self.rng, last.read_bytes(), last.stat().st_size // 2))
        log.write_text("")
        run_through([*self.argv, out], log)
        text = log.read_text()
        self.assertEqual(text.count("last.pt is torn or damaged"), 1)
        self.assertTrue(same(results(out), self.whole))
        self.say(f"killed at {kills}; {re.search('continuing in.*', text)[0]}; identical")

    def test_random_moments(self):
        """SIGTERM, SIGINT, two in a row: status 75 and no traceback; or SIGKILL."""
        out, log = self.tmp / "random", self.tmp / "random.log"
        counts = storm(4, self.argv, out, log, self.rng, self.seconds, self.whole)
        self.say(", ".join(f"{kind} {count}" for kind, count in sorted((+counts).items())) + ": identical")

    def test_before_data(self):
        """While data are loaded a signal ends the process at once, silently; the folder can be used."""
        out, log = self.tmp / "early", self.tmp / "early.log"
        for number in STOPS:
            ranks = start([*self.argv, out], log, loads_for_long)
            self.assertTrue(said(log, "loading\n", ranks))
            send(ranks[0], number)
            self.assertEqual(finish(ranks), [-number])
            self.assertRegex(log.read_text(), r"\Acontinue with:.*\nloading\n\Z")
            log.unlink()
        self.runs(*self.argv, out, "--dry-run")
        self.say("ended by SIGTERM and by SIGINT, silently; then another command in the same folder")


def loads_for_long():
    r.load_data = lambda *_: (print("loading"), time.sleep(2000))


def keep_first_gradients(folder, frozen_statistics=True):
    """Loss, gradients and statistics of the first step of the probe and of partial unfreezing."""
    plain = r.Trainer.train_step

    def step(self, order):
        self.head.train(not frozen_statistics)
        plain(self, order)
        if self.state.epoch == 0 and self.state.step == 1:
            grads = [self.state.sums[0], *(p.grad for p in self.params), *self.head.buffers()]
            torch.save(grads, folder / f"{self.run.world}.{self.run.rank}.{self.stage.trains}")
            if self.stage.trains == "layer4":
                os._exit(0)

    r.Trainer.train_step = step


def keep_statistics(folder):
    """Each rank's BatchNorm statistics, and weights, after its last epoch."""
    plain = r.Trainer.train_epoch

    def train_epoch(self):
        plain(self)
        torch.save(self.head.state_dict(), folder / f"{self.run.rank}.head")

    r.Trainer.train_epoch = train_epoch


def asks_late():
    if os.environ["RANK"] == "1":
        quick = time.sleep
        time.sleep = lambda seconds: quick(40 * seconds)


def fails_on_rank_1(name, error):
    if os.environ["RANK"] == "1":
        setattr(r, name, mock.Mock(side_effect=error))


class ResnetProcesses(ResnetCase):
    def test_against_one(self):
        """Two and three processes, shares unequal: first gradients and probe of one process."""
        found = self.first_steps((1, 2, 3), keep_first_gradients)
        rows = [row_of(self.tmp / f"out{world}") for world in (1, 2, 3)]
        self.assertEqual([row["processes"] for row in rows], [1, 2, 3])
        for row in rows[1:]:
            self.assertAlmostEqual(rows[0]["test_accuracy"], row["test_accuracy"], delta=0.011)
        for part, off in found.items():
            self.within(1e-5, off, f"{part} trains: loss and gradients")

    def test_gradual(self):
        """Two processes, always of the same weights and statistics, through all stages; a signal to one ends
        both, 75; continued, the same bits."""
        flags = ("--regimes", "gradual", "--epochs", 2, "--batch-size", 63, "--limit", 140, "--out")
        argv, log = small_flags(self.data, *flags), self.tmp / "gradual.log"
        run_through([*argv, self.tmp / "whole"], log, functools.partial(keep_statistics, self.tmp), 2)
        self.assertTrue(same(*(dict(torch.load(self.tmp / f"{rank}.head")) for rank in (0, 1))))
        whole, argv = results(self.tmp / "whole"), [*argv, self.tmp / "stopped"]
        self.assertEqual([s["trains"] for s in whole["gradual"][1]["stages"]], ["fc", "layer4", "all"])
        for rank, number in enumerate(STOPS):
            log.write_text("")
            ranks = start(argv, log, world=2)
            self.assertTrue(said(log, "gradual, ", ranks))
            time.sleep(self.rng.uniform(0, 0.15))
            send(ranks[rank], number)
            self.assertEqual(finish(ranks), [75, 75], log.read_text())
            text = log.read_text()
            self.assertNotIn("Traceback", text)
        run_through(argv, log, world=2)
        self.assertTrue(same(results(self.tmp / "stopped"), whole))
        run_through(argv, log, asks_late, 2)  # all is done, which rank 1 learns two seconds later
        self.say(f"75 and 75, twice, then identical: {text.strip().splitlines()[-2]}")

    def test_errors(self):
        """What one process finds wrong ends both; its line is there, and no traceback."""
        memory, data = RuntimeError("can't allocate memory: 9 bytes"), r.InputError("this node has no data")
        cases = (
            (self.data, ("evaluate", None), [2, 2], "holds other files"),
            (self.tmp / "a", ("tune_tau", memory), [1, 1], "out of memory: continue"),
            (self.tmp / "b", ("load_data", data), [1, 2], "this node has no data"),
        )
        for out, fault, statuses, text in cases:
            argv, log = small_flags(self.data, "--regimes", "linear_probe", "--out", out), self.tmp / "log"
            log.write_text("")
            ranks = start(argv, log, functools.partial(fails_on_rank_1, *fault), 2)
            self.assertEqual(finish(ranks), statuses, log.read_text())
            told = log.read_text()
            self.assertEqual((told.count(text), told.count("error: ")), (1, 1 + (1 in statuses)), told)
            self.assertNotIn("Traceback", told)
        self.say(" / ".join(line for line in told.splitlines() if "error: " in line)[:120])

    def test_waiting(self):
        """For what rank 0 loads, the others ask the store every second: a collective answers no signal."""
        run, slept = r.Run(r.parse_args(["--device", "cpu"])), []
        run.world, run.main, run.store = 2, False, mock.Mock()
        run.store.check.side_effect = lambda keys: len(slept) == 3
        run.store.get.return_value = pickle.dumps(["data"])
        with mock.patch.object(r.time, "sleep", slept.append), mock.patch.object(r, "dist", None):
            self.assertEqual(run.from_rank0("inputs", None), "data")
            run.store.get.return_value = pickle.dumps([])  # rank 0 has said why
            self.assertRaises(SystemExit, run.from_rank0, "inputs", None)
        self.assertEqual(slept, [1, 1, 1])
        self.say("asked four times, a second apart")


GPU = os.environ.get("DEVICE", "cuda")  # DEVICE=cpu: a rehearsal without a GPU of what needs one
needs_gpu = unittest.skipUnless(GPU == "cpu" or torch.cuda.is_available(), "no CUDA device here")


def share_one_gpu(folder):
    """Both processes on one device, over gloo, as NCCL refuses that; BatchNorm trains."""
    os.environ["LOCAL_RANK"] = "0"
    init = r.dist.init_process_group
    r.dist.init_process_group = lambda backend, **settings: init("gloo", **settings)
    keep_first_gradients(folder, frozen_statistics=False)


class Devices(ResnetCase):
    """What needs a GPU, of both scripts."""

    @needs_gpu
    def test_layers(self):
        self.say(worst(60, 1e-12, device=GPU, dtype=torch.float64))
        self.say(worst(60, 1e-5, device=GPU, dtype=torch.float32))

    @unittest.skipUnless(torch.backends.mps.is_available(), "no MPS device here")
    def test_mps(self):
        self.say(worst(60, 1e-5, device="mps", dtype=torch.float32))

    @needs_gpu
    def test_cnn(self):
        """Ten steps of the network in float32 end with the weights that a CPU has in float64."""
        ours, exact = c.build_cnn(GPU), c.build_cnn(**DOUBLE)
        images, labels = torch.randint(256, (640, 28, 28), dtype=torch.uint8), torch.randint(10, (640,))
        for p, q in zip(exact.parameters(), ours.parameters()):
            p.copy_(q)
        for model in (ours, exact):
            sgd, p = c.SGD(model.parameters(), 0.05, 0.9, True, 5e-4), model.parameters()[0]
            for x, y in zip(c.to_input(images).split(64), labels.split(64)):
                step(model, x.to(p.device, p.dtype), y.to(p.device))
                sgd.step()
        off = max(map(error, ours.parameters(), exact.parameters()))
        self.within(1e-4, off, "weights after ten steps")

    @needs_gpu
    def test_first_steps(self):
        """Loss and gradients of every regime's first step are a CPU's."""
        for trains, regime in REGIMES.items():
            found = []
            for device in ("cpu", GPU):
                t = self.trainer(regime, "--device", device, "--batch-size", 64)
                t.head.train()
                t.train_step(torch.arange(t.n, device=device))
                found.append([t.state.sums[0], *(p.grad for p in t.params)])
            self.within(1e-3, max(map(error, *found[::-1])), f"{trains} trains, loss and gradients")

    @needs_gpu
    def test_half_precision(self):
        """fp16 with a scaler (bf16 on a CPU) trains; the scaler's state is continued."""
        flags = ("--epochs", 3, "--device", GPU, "--amp", "bf16" if GPU == "cpu" else "fp16")
        t = self.trainer("full", *flags)
        quiet(t.train)
        first, *_, last = (row["train_loss"] for row in t.state.history)
        self.assertLess(last, first)
        again = self.trainer("full", *flags)
        again.load(r.read_tensors(t.folder / "last.pt"))
        self.assertEqual(again.scaler.state_dict(), t.scaler.state_dict())
        self.say(f"loss {first:.3f} to {last:.3f}, {t.scaler.state_dict() or 'no scaler'}")

    @needs_gpu
    def test_killed(self):
        """A --deterministic run, killed at three places, ends with the bits of one that was not."""
        flags = ("--regimes", "partial_unfreeze", "--epochs", 4, "--batch-size", 90, "--limit", 200)
        flags += ("--augment", "--checkpoint-minutes", 0, "--deterministic", "--device", GPU, "--out")
        argv, log = small_flags(self.data, *flags), self.tmp / "log"
        run_through([*argv, self.tmp / "whole"], log)
        for kill in (("step", 2), ("half", 3), ("step", 3)):
            self.assertTrue(killed([*argv, self.tmp / "killed"], log, *kill), kill)
        run_through([*argv, self.tmp / "killed"], log)
        self.assertTrue(same(results(self.tmp / "killed"), results(self.tmp / "whole")))
        self.say(f"killed three times on {GPU}: identical")

    @needs_gpu
    def test_two_processes(self):
        """SyncBatchNorm in two processes has one process's gradients and statistics; a CPU has none."""
        off = self.first_steps((1, 2), share_one_gpu, "--device", GPU)["layer4"]
        self.within(1e-4 if GPU == "cuda" else math.inf, off, "loss, gradients and statistics")


def flip(rng, content, at=None):
    """The bytes with one bit changed, of this byte or of any."""
    at = rng.randrange(len(content)) if at is None else at
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(7)]) + content[at + 1 :]


def alter(rng, content):
    """JSON, truncated, with a bit flipped, without a line, or with another value."""
    lines, kind = content.splitlines(True), rng.randrange(4)
    k = rng.randrange(len(lines))
    if kind < 2:
        return flip(rng, content) if kind else content[: rng.randrange(len(content))]
    value = rng.choice((b"null", b"-1", b'"x"', b"[]", b"{}", b"1e999", b"NaN", b"true"))
    lines[k] = b"" if kind == 2 else re.sub(rb"(: ?)[^,\[{\n]+", rb"\g<1>" + value, lines[k])
    return b"".join(lines)


class ResnetDamage(ResnetCase):
    """Files that are read again, torn or altered: refused with a line, not used, or the same content."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        flags = ("--regimes", "linear_probe", "--epochs", 1, "--limit", 100, "--amp", "off", "--out")
        cls.argv, cls.out = small_flags(cls.data, *flags), cls.tmp / "out"
        assert call_resnet(*cls.argv, cls.out)[0] == 0
        cls.row = row_of(cls.out)

    def ends_clearly(self, *argv):
        """Exit status 0 in silence, or 2 with one line."""
        status, _, err = call_resnet(*argv)
        self.assertIn((status, err.count("\n")), ((0, 0), (2, 1)), err)
        return status

    def test_args_json(self):
        """Refused, or the run goes on as it was."""
        out, refused = self.tmp / "args", 0
        shutil.copytree(self.out, out)
        (out / "linear_probe" / "metrics.json").unlink()  # there is something left to do
        whole = (out / "args.json").read_bytes()
        for _ in range(60):
            (out / "args.json").write_bytes(alter(self.rng, whole))
            with mock.patch.object(r, "train_all") as train:
                status = self.ends_clearly(*self.argv, out)
            refused += status == 2
            if status == 0:
                s = train.call_args[0][0].settings
                known = (s.limit, s.image_size, s.amp, s.dataset, s.seed, s.weights)
                self.assertEqual(known, (100, 32, "off", "emnist", 0, "none"))
        self.say(f"{refused} of 60 refused, the others continued as they were")

    def test_metrics_json(self):
        """A run that is continued does the test again; a comparison of several refuses."""
        out, tested, refused = self.tmp / "altered", 0, 0
        shutil.copytree(self.out, out)
        path = out / "linear_probe" / "metrics.json"
        whole, figures = path.read_bytes(), ("test_accuracy", "train_seconds", "trainable_params")
        for _ in range(40):
            altered = alter(self.rng, whole)
            path.write_bytes(altered)
            with mock.patch.object(r, "run_regime", return_value=dict(self.row)) as again:
                text = self.runs(*self.argv, out)
            self.assertEqual(text.count("is damaged"), again.call_count, altered)
            self.assertEqual(path.exists(), not again.call_count)
            path.write_bytes(altered)
            row = json.loads((out / "comparison.json").read_text())["rows"][0]
            self.assertEqual([row[k] for k in figures], [self.row[k] for k in figures])
            status = self.ends_clearly("--compare", out, "--out", self.tmp / "compared")
            if status == 0 and b'"checksum"' in path.read_bytes():
                self.assertEqual(json.loads(path.read_text()), self.row)
            tested, refused = tested + again.call_count, refused + (status == 2)
        path.write_bytes(whole[:700])
        self.assertEqual(self.runs(*self.argv, out).count("is damaged"), 1)
        self.assertTrue(same(results(out), results(self.out)))
        self.say(f"{tested} of 40 done again; --compare refused {refused}; the same numbers")

    def test_last_pt(self):
        """Other keys, types and shapes, and flipped bits: not used, said in one line."""
        t, ends = self.trainer("linear_probe", "--epochs", 2), []
        quiet(t.train)
        path = t.folder / "last.pt"
        content, last = path.read_bytes(), r.read_tensors(path)
        cases = [{**last, k: v} for k in last for v in (None, "x", [], {}, 99)]
        cases += [{name: v for name, v in last.items() if name != k} for k in last]
        cases += [last | {"weights": {"fc.bias": torch.zeros(62)}}, last | {"sums": torch.zeros(77)}]
        for case in [last, *self.rng.sample(cases, 40), *(flip(self.rng, content) for _ in range(10))]:
            (t.folder / "last.pt.prev").unlink(missing_ok=True)
            torch.save(case, path) if isinstance(case, dict) else path.write_bytes(case)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                trainer, resumed = r.resume(t.run, t.data, lambda: t.model, t.recipes, t.folder)
            self.assertEqual(out.getvalue().count("not used"), not resumed, out.getvalue())
            quiet(trainer.train) if resumed else None
            ends.append(resumed)
        self.assertTrue(ends[0] and ends.count(False) > 40, ends)
        self.say(f"{ends.count(False)} of {len(ends) - 1} not used, the others trained on")

    def test_full_while_resuming(self):
        """A full disk or memory ends a resumed run; its checkpoint is not taken for a damaged one."""
        t = self.trainer("linear_probe", "--epochs", 2)
        quiet(t.train)
        kept = (t.folder / "last.pt").read_bytes()
        args = t.run, t.data, lambda: t.model, t.recipes, t.folder
        cases = (os, "fsync", OSError(errno.ENOSPC, "No space left on device"), r.RunFailed)
        cases = cases, (r, "read_tensors", MemoryError(), MemoryError)
        cases += ((r.Trainer, "load", RuntimeError("MPS backend out of memory"), RuntimeError),)
        cases += ((torch, "load", RuntimeError("can't allocate memory: you tried"), RuntimeError),)
        for owner, name, fault, error in cases:
            with mock.patch.object(owner, name, side_effect=fault):
                self.assertRaises(error, quiet, r.resume, *args)
            self.assertEqual((t.folder / "last.pt").read_bytes(), kept)
        self.assertTrue(r.resume(*args)[1])
        self.say(f"{len(cases)} faults, then resumed")

    def test_features(self):
        """Of the files of features, a torn one is computed again, to the same bits."""
        t = self.trainer("linear_probe")
        quiet(t.inputs.compute, t.timer)
        want, path = t.inputs.kept["train"].clone(), t.run.out / "features" / "train-00000.pt"
        whole, few = path.read_bytes(), io.BytesIO()
        torch.save({"rows": want[:5], "spent": torch.ones(2)}, few)
        for bad, told in ((whole[:5000], 1), (b"", 1), (flip(self.rng, whole, 3000), 1), (few.getvalue(), 0)):
            path.write_bytes(bad)
            self.assertEqual(quiet(t.inputs.compute, t.timer).count("torn or damaged"), told)
            self.assertTrue(torch.equal(t.inputs.kept["train"], want))
        self.say("cut, empty, a byte changed, other rows: the same features")

    def flipped(self, path, read):
        """Of copies of a file with a bit flipped, read() refuses most and gives the same of the others."""
        whole, want, refused = path.read_bytes(), read(path), 0
        for k in range(60):
            at = self.rng.randrange(len(whole)) if k % 2 else -1 - self.rng.randrange(9000)  # its directory
            (self.tmp / "flipped.pt").write_bytes(flip(self.rng, whole, at))
            try:
                self.assertTrue(same(read(self.tmp / "flipped.pt"), want), f"a bit of byte {at}")
            except r.InputError:
                refused += 1
        self.assertGreater(refused, 40)
        self.say(f"{refused} of 60 flipped bits refused, of the others the content is the same")

    def test_weights(self):
        """Of --weights, of torch's cache, and of an old .pth, no archive; what is wrong in one is named."""
        path, state = self.tmp / "weights.pt", dict(slim_resnet().state_dict())

        def read(path):
            return dict(r.load_weights(str(path))[0])

        torch.save(state, path, _use_new_zipfile_serialization=False)
        self.assertTrue(same(read(path), {k: v for k, v in state.items() if not k.startswith("fc.")}))
        torch.save(state, path)
        self.flipped(path, read)
        model = r.build_model(62, read(path), 0)
        self.assertTrue(torch.equal(model.layer3[0].conv2.weight, state["layer3.0.conv2.weight"]))
        other = {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}
        cases = (
            (other | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "size mismatch for conv1.weight"),
            (other, "missing, unknown or not finite: layer1.0.conv1.weight"),
            (state | {"bn1.weight": torch.full((64,), math.nan)}, "not finite: bn1.weight"),
            ([1, 2], "expected a state dict"),
        )
        for content, text in cases:
            torch.save(content, path)
            self.assertRaisesRegex(r.InputError, text, read, path)
        path = self.tmp / "hub/checkpoints/resnet18-f37072fd.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PK" + bytes(9000))
        with mock.patch.dict(os.environ, TORCH_HOME=str(self.tmp)):
            text = f"{path} .* delete it to download it again"
            self.assertRaisesRegex(r.InputError, text, r.load_weights, "imagenet")

    def test_best_pt(self):
        def read(path):
            model, *rest = r.load_model(path)
            return [dict(model.state_dict()), *rest]

        best = self.out / "linear_probe" / "best.pt"
        self.flipped(best, read)
        nan = r.read_tensors(best)
        nan["model"]["fc.bias"][3] = math.nan
        torch.save(nan, self.tmp / "nan.pt")
        torch.save([1, 2], self.tmp / "list.pt")
        for name in ("nan", "list", "missing"):
            path, flags = self.tmp / f"{name}.pt", ("--data-dir", self.data, "--out", self.tmp / "unused")
            text = (
                "a weight is not finite"
                if name == "nan"
                else f"{path} is damaged or not this script's best.pt"
            )
            self.refused(text, "--predict", "a.png", "--checkpoint", path)
            self.refused(text, "--evaluate", path, *flags)


class ResnetDisk(ResnetCase):
    """No network, or a disk that is full or can't be written."""

    def test_no_network(self):
        """A clear message from `emnist`, also of a wrong archive; `auto` falls back; nothing half-written."""
        archive, download = self.tmp / "gzip.zip", "torchvision.datasets.utils._urlretrieve"
        archive.write_bytes(b"no archive")
        flags = ["--data-dir", self.tmp / "empty", "--image-size", 32, "--device", "cpu"]
        fetch, emnist = "torchvision.models._api.load_state_dict_from_url", torchvision.datasets.EMNIST
        with (
            mock.patch.object(emnist, "url", "http://127.0.0.1:9/gzip.zip"),
            mock.patch(fetch, side_effect=OSError("down")),
            mock.patch.dict(os.environ, TORCH_HOME=str(self.tmp / "torch")),
        ):
            line = self.refused("Offline: ", *flags, "--dataset", "emnist", "--out", self.tmp / "none")
            self.assertEqual([p.name for p in (self.tmp / "none").iterdir()], [".lock"])
            both = self.tmp / "both"  # the run's lock does not keep the download waiting
            self.refused("Offline: ", "--dataset", "emnist", "--data-dir", both, "--out", both)
            text = self.runs(*flags, "--dry-run", "--out", self.tmp / "fallen")
        with (
            mock.patch.object(emnist, "url", archive.as_uri()),
            mock.patch(download, lambda url, to: shutil.copy(archive, to)),
            self.assertRaisesRegex(r.DownloadError, "File not found or corrupted"),
        ):
            quiet(r.load_emnist, self.tmp / "empty")
        self.assertFalse(list(self.tmp.glob("empty/EMNIST/raw/emnist*")))
        self.assertIn("FALLING BACK to scikit-learn's digits", text)
        self.assertIn("CONTINUING WITH random weights", text)
        row = row_of(self.tmp / "fallen")
        self.assertEqual((row["dataset"], row["weights"]), ("digits", "random"))
        self.say(line[:100])

    def test_folder_or_network(self):
        """A full, read-only or forbidden disk is the folder's error; all else the network's."""
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
        network = [urllib.error.URLError(OSError(errno.EACCES, "firewall")), TimeoutError("timed out")]
        network += [ConnectionResetError(errno.ECONNRESET, "reset"), RuntimeError("corrupted")]
        none, fetch = self.tmp / "none", "torchvision.models._api.load_state_dict_from_url"
        for fault in [*(OSError(code, os.strerror(code)) for code in codes), *network]:
            with (
                mock.patch.object(torchvision.datasets, "EMNIST", side_effect=fault),
                mock.patch(fetch, side_effect=fault),
                mock.patch.dict(os.environ, TORCH_HOME=str(self.tmp / "home")),
            ):
                data = "emnist" if fault in network else "auto"  # which falls back, but not from these
                for load in ((r.load_data, data, none), (r.load_weights, "imagenet")):
                    with self.assertRaises(r.InputError) as caught:
                        quiet(*load)
                    self.assertEqual(type(caught.exception) is r.DownloadError, fault in network, fault)
        self.say(f"{len(codes)} of the folder, {len(network)} of the network")

    def test_full_while_saving(self):
        """No temporary file is left, and what was there before stands, which is said only then."""
        folder, fault = Path(tempfile.mkdtemp(dir=self.tmp)), OSError(errno.ENOSPC, "No space left on device")
        for before, keep in itertools.product((False, True), repeat=2):
            path = folder / "file"
            path.write_bytes(b"old") if before else None
            with mock.patch.object(os, "fsync", side_effect=fault):
                with self.assertRaisesRegex(r.RunFailed, "No space left on device") as caught:
                    r.write_bytes(path, b"new", keep)
            self.assertEqual("the previous version is intact" in str(caught.exception), before)
            self.assertEqual([p.read_bytes() for p in folder.iterdir()], [b"old"] * before)
            path.unlink(missing_ok=True)
        argv = small_flags(self.data, "--regimes", "linear_probe", "--epochs", 3, "--limit", 100, "--out")
        with mock.patch.object(os, "fsync", side_effect=[None] * 8 + [fault] * 9):
            text = self.refused("No space left on device", *argv, self.tmp / "full", status=1)
        self.assertFalse(list((self.tmp / "full").rglob("*.tmp")))
        for out in ("full", "whole"):
            self.runs(*argv, self.tmp / out)
        self.assertTrue(same(results(self.tmp / "full"), results(self.tmp / "whole")))
        self.say(text[-90:] + "; then continued, identical")


class ResnetPredict(ResnetCase):
    """What --predict adds to the reading of photographs, which is the CNN's and tested in class Predict."""

    def test_pictures(self):
        """28x28, centred, a margin of two; five guesses a line; a bad picture brings an error's, status 2."""
        state = {"model": r.build_model(62, None, 0).state_dict(), "classes": r.CLASSES, "image_size": 32}
        state["dataset"] = "digits"
        torch.save(state, self.tmp / "best.pt")
        names = ("one.png", "two.png", "blank.png", "chunk.png", "missing.png")
        one, two, blank, chunk, missing = (self.tmp / name for name in names)
        page = Image.new("L", (400, 200), 245)
        page.save(blank)
        for x, path in ((100, one), (300, two)):
            ImageDraw.Draw(page).line((x, 30, x + 40, 170), fill=10, width=14)
            page.save(path)
        noise = np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8)
        Image.fromarray(noise).save(chunk)  # damaged behind its first block of pixels
        head, first, rest = chunk.read_bytes().split(b"IDAT", 2)
        chunk.write_bytes(head + b"IDAT" + first + b"\0\1\2\3" + rest)
        rows, columns = ((r.read_character(one)[0] > 60).any(d).nonzero() for d in (1, 0))
        self.assertEqual((int(rows[0]), int(rows[-1])), (2, 25))
        self.assertAlmostEqual(float(columns.float().mean()), 13.5, delta=0.51)
        argv = ("--predict", blank, one, chunk, missing, two, "--checkpoint", self.tmp / "best.pt")
        status, text, err = call_resnet(*argv, "--device", "cpu")
        low = r"( +. \d+\.\d%){5}  \| warning: (several characters.*; )?low confidence\n"
        small = "warning: trained on scikit-learn's small digits, .*\n"
        self.assertRegex(text, rf"\A{small}{one}:{low}{two}:{low}\Z")  # the network has random weights
        self.assertEqual((status, text.count("several")), (2, 1))
        says = {blank: "shows no character", chunk: "can't be read", missing: "can't be read"}
        for line, (path, what) in zip(err.splitlines(), says.items(), strict=True):
            self.assertIn(f"error: {path} {what}", line)
        self.say(text.splitlines()[-1].split(": ", 1)[1])


class ResnetBadInput(ResnetCase):
    def test_flags(self):
        """What is refused leaves a folder that accepts the corrected command."""
        cases = [
            ("--regimes probe", "probe is unknown or repeated"),
            ("--regimes full full", "full is unknown or repeated"),
            ("--image-size 16", "16 is not at least 32"),
            ("--patience 0", "0 is not at least 1"),
            ("--epochs 0", "0 is not at least 1"),
            ("--batch-size -4", "-4 is not at least 1"),
            ("--lr 0", "0 is not above 0"),
            ("--lr nan", "nan is not above 0"),
            ("--limit 3", "3 is not at least 10"),
            ("--limit -1", "-1 is not at least 0"),
            ("--epochs two", "invalid number value: 'two'"),
            (f"--seed {2**64}", "is not below"),
            ("--cache-gb=--", "empty or --"),
            ("--cache-gb inf", "inf is not finite"),
            *((f"--{flag}=", "empty or --") for flag in ("evaluate", "compare", "data-dir")),
            ("--weights=", "empty or --"),
            ("--amp fp16", "--amp fp16 needs a CUDA device"),
            ("--nonsense", "unrecognized arguments"),
            ("--weights nowhere.pth", "nowhere.pth can't be used"),
            ("--predict a.png", "--checkpoint FILE go together"),
            ("--compare a --evaluate b", "exclude each other"),
            ("--regimes full --batch-size 1", "images per process and step, too few"),
        ]
        missing = [name for name in ("cuda", "mps") if not getattr(torch, name).is_available()]
        cases += [(f"--device {name}", f"there is no {name} device here") for name in missing]
        for flags, text in cases:
            self.refused(text, *small_flags(self.data, *flags.split(), "--out", self.tmp / "bad"))
        self.assertEqual([p.name for p in (self.tmp / "bad").iterdir()], [".lock"])
        self.runs(*small_flags(self.data, "--regimes", "full", "--dry-run", "--out", self.tmp / "bad"))
        self.say(f"{len(cases)} clear lines, then a good command in the same folder")

    def test_continue_line(self):
        """What it prints is accepted again, whatever the folder is called; batch files do it themselves."""

        def line(script, words, out, **env):
            run = r.Run(r.parse_args(words))
            run.out, run.world = Path(out), int(env.get("WORLD_SIZE", 1))
            with mock.patch.object(sys, "argv", [script, *words]), mock.patch.dict(os.environ, env):
                return quiet(r.say_how_to_continue, run)

        for words, out in (
            ("--out=-x --seed 3", "-x"),
            ("--seed 3 --out 'a b'", "a b"),
            ("--seed 3 --ou a", "a"),
            ("--seed=3", "results/resnet18 of 'today'"),
        ):
            printed = line("resnet18.py", shlex.split(words), out)
            again = r.parse_args(shlex.split(printed.removeprefix("continue with: "))[2:])
            self.assertEqual((again.out, again.seed), (out, 3), printed)
        self.assertEqual(line("/a/out/code/resnet18.py", ["--out", "/a/out"], "/a/out"), "")
        two = line("resnet18.py", ["--out=a"], "a", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        self.assertIn("with: torchrun --nproc-per-node=2 resnet18.py --out=a\n", two)
        four = line("resnet18.py", [], "a", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
        self.assertIn("with: the same command on every machine --out=a\n", four)
        self.say(printed.strip())

    def test_folders(self):
        file, unused = self.tmp / "file", self.tmp / "unused"
        file.write_text("")
        self.refused("holds other files (EMNIST)", *small_flags(self.data, "--out", self.data))
        self.refused("can't be used", *small_flags(self.data, "--out", file / "below"))
        self.say(self.refused("can't be written", *small_flags(file / "data", "--out", unused)))
        kept = [[p.name for p in folder.iterdir()] for folder in (self.data, unused)]
        self.assertEqual(kept, [["EMNIST"], [".lock"]])

    def test_data_files(self):
        """Damaged files of EMNIST are named, with what to do."""
        cases = (
            ("images-idx3", lambda path: path.write_bytes(path.read_bytes()[:-5])),
            ("images-idx3", lambda path: path.write_bytes(b"\0\0")),
            ("labels-idx1", lambda path: write_idx(path, np.zeros(299))),
            ("labels-idx1", lambda path: write_idx(path, np.full(300, 62))),
            ("images-idx3", lambda path: write_idx(path, np.zeros((300, 8, 8)))),
        )
        for k, (kind, spoil) in enumerate(cases):
            write_emnist(self.tmp / f"{k}")
            raw = self.tmp / f"{k}" / "EMNIST" / "raw"
            spoil(raw / f"emnist-byclass-train-{kind}-ubyte")
            argv = small_flags(self.tmp / f"{k}", "--out", self.tmp / "spoilt")
            self.assertIn(f"{raw}/emnist-byclass-train-", self.refused("delete it and start again", *argv))
        self.say(f"{len(cases)} clear lines")

    def test_failures(self):
        """A training that can't go on ends with status 1 and advice."""
        memory, argv = "--cache-gb 0", small_flags(self.data, "--out")
        for fault, text in (
            (torch.OutOfMemoryError("CUDA out of memory"), memory),
            (RuntimeError("can't allocate memory: 9"), memory),
            (r.Diverged("the loss is nan"), "the loss is nan: try a smaller --lr"),
        ):
            with mock.patch.object(r.Trainer, "train_step", side_effect=fault):
                text = self.refused(text, *argv, tempfile.mkdtemp(dir=self.tmp), status=1)
        self.say(text)


def with_stream(kind):
    """What a run's process is given: no stdout, one of ASCII, a full one; no locks."""
    if kind == "no locks":
        r.fcntl = r.resource = None
    elif kind == "closed":
        sys.stdout = sys.stderr = None
    else:
        sys.stdout = open("/dev/full", "w") if kind == "full" else open(os.devnull, "w", encoding="ascii")


class ResnetStreams(ResnetCase):
    """Streams that are closed, full or know ASCII alone, a system without locks; the script as a process."""

    def test_streams(self):
        argv = small_flags(self.data, "--dry-run", "--regimes", "linear_probe", "--out")
        kinds = {"closed": 0, "ascii": 0, "full": 1, "no locks": 0}
        for kind, status in kinds.items():
            log, out = self.tmp / f"{kind}.log", self.tmp / f"é {kind}"
            ranks = start([*argv, out], log, functools.partial(with_stream, kind))
            self.assertEqual(finish(ranks), [status], log.read_text())
            self.assertNotIn("Traceback", log.read_text())
        self.assertIn("no locks on this system", log.read_text())
        self.assertIn("No space left", (self.tmp / "full.log").read_text())
        self.say(", ".join(f"{kind} {status}" for kind, status in kinds.items()))

    def test_script(self):
        """As a process, into a pipe that nobody reads: 141. SIGINT in its imports: ended by it, silently."""
        argv = small_flags(self.data, "--dry-run", "--regimes", "linear_probe", "--out", self.tmp / "done")
        self.runs(*argv)  # so that nothing is left to do but to say so
        command = [sys.executable, "-B", str(Path(r.__file__).resolve())]
        piped = shlex.join([*command, *argv]) + " | true; echo ${PIPESTATUS[0]}"
        done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
        self.assertEqual((done.stdout, done.stderr), ("141\n", ""))
        command[2:2] = ["-X", "importtime"]
        default = functools.partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # else ignored in background
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
        while not process.stderr.readline().endswith(" numpy\n"):
            pass
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, "Traceback" in err), (-signal.SIGINT, False))
        self.say("141; ended by SIGINT after the import of numpy")


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

    def module(self, name):
        spec = importlib.util.spec_from_file_location(name, self.root / "report" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_own_runs(self):
        """The report's numbers from other runs: MNIST's before the digits', five epochs, a variant alone."""
        tables, results = self.module("tables"), self.tmp / "results"
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
        tables = self.module("tables")
        results = self.root / "report" / "results"
        self.assertEqual(
            self.readme, tables.with_tables(self.readme, results), "run report/tables.py --readme"
        )
        rows = {name: len(table(results)) - 1 for name, table in tables.TABLES.items()}
        self.assertGreater(min(rows.values()), 0, rows)
        shown = re.findall(r"<!-- table ([\w-]+) -->", self.readme)
        self.assertEqual(shown, ["mnist", "emnist-short"])
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

    def test_help(self):
        """--help of both scripts: a text for every flag, and real defaults."""
        for parse in (c.parse, r.parse_args):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertRaises(SystemExit, parse, ["--help"])
            flags = re.findall(r"(?m)^  (--[a-z-]+)(?: .*|\n {20}.*)$", out.getvalue())
            self.assertGreater(len(flags), 10)
            self.assertNotIn("None", out.getvalue())
        self.say(f"{len(flags)} flags of resnet18.py")

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
        r"""No number is typed into the report's text: \R{...}, formulas and names aside, none is left.

        Every \R{...} has a value, and the gradients of the report's figure are the numeric ones.
        """
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
        tables, gradients = self.module("tables"), self.module("gradients")
        pairs = gradients.gradient_check()
        known = tables.numbers_of(self.root / "report" / "results") | gradients.numbers_of(pairs)
        self.assertEqual(used - set(known), set())
        self.assertGreater(len(used), 60)
        worst = max(float((written - numeric).abs().max()) for written, numeric in pairs.values())
        self.assertLess(worst, 1e-8)
        self.say(f"{len(used)} numbers, none typed; numeric gradients within {worst:.0e}")


# ---------------------------------------------------------------------------------------------- soak


def soak(n):
    """n kills and signals at random moments, over as many runs as that takes, every fourth one with two
    processes; each finished run is compared with an undisturbed one."""
    rng, clock, counts, runs = random.Random(int(time.time())), time.perf_counter(), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        tmp, wholes = Path(name), {}
        write_emnist(tmp / "data")
        argv, log = small_flags(tmp / "data", *ResnetStops.FLAGS), tmp / "log"
        for world in (1, 2):
            seconds = run_through([*argv, tmp / "whole"], log, world=world)
            wholes[world] = seconds, results(tmp / "whole")
            shutil.rmtree(tmp / "whole")
        while sum(counts.values()) < n:
            runs += 1
            world = 2 if runs % 4 == 0 else 1
            counts += storm(1, argv, tmp / "run", log, rng, *wholes[world], world)
            told = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
            took = f"{time.perf_counter() - clock:.0f}s"
            print(f"soak: {sum(counts.values())}/{n} ({told}), {runs} runs, identical, {took}", flush=True)


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
