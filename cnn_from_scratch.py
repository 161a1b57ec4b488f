"""A convolutional network from scratch: every gradient by hand, on plain PyTorch tensors, without autograd.

    python cnn_from_scratch.py                   # MNIST, five epochs
    python cnn_from_scratch.py --batch-size 640 --lr 0.01 --momentum 0 --schedule constant  # the course's
    python cnn_from_scratch.py --predict digit.png --checkpoint results/cnn-.../best.pt

Last lines (2 cores of an AMD EPYC, torch 2.15, seed 0; mean of seeds 0-9: 99.15 % +- 0.05):

    training 6.5s, in all 8.3s; results in results/cnn-…
    mnist test, once, with the weights of epoch 5 (best on validation: 98.88%): accuracy 99.17%, loss 0.0264

A layer is a constructor, `forward` and `bwd`; bwd(out, x) turns the gradient out.g into x.g, W.g and b.g.
A comment behind a line gives the shape of its result: N batch, C and O channels in and out, H, W height and
width, kH, kW kernel, s stride, p padding, Ho, Wo output size, K = C·kH·kW, L = Ho·Wo·N.

A tensor [N, C, H, W] may lie in memory in any order. Conv2D leaves its output as C, H, W, N: with the batch
innermost, im2col, pooling and folding move long contiguous runs, and a convolution is one plain product.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure  # without pyplot there is no global state and no display
from PIL import Image, ImageOps
from sklearn import datasets, metrics

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHT_DECAY = 5e-4  # of the one-cycle recipe

ONEDNN = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# ---------------------------------------------------------------------------------------------- layers


class Module:
    """A layer. Calling it stores its arguments and its output; backward() hands both to bwd(out, *args).

    A gradient lives on its tensor, as its attribute `g`: set out.g, call backward(), read x.g, W.g and b.g.
    Gradients are assigned, not accumulated. Raises RuntimeError for backward() before a forward pass.
    """

    args = out = None
    input_grad = True  # False: bwd may leave out the gradient of the input (a first layer's is of no use)

    @torch.no_grad()  # also where the caller's tensors ask for torch's own gradients
    def __call__(self, *args):
        self.args, self.out = args, self.forward(*args)
        return self.out

    @torch.no_grad()
    def backward(self):
        if self.args is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward(): call the layer first, there is no output yet"
            )
        self.bwd(self.out, *self.args)

    def parameters(self):
        return []


def upstream(out):
    """The gradient that arrives at `out`; raises RuntimeError if unset, ValueError if of another shape."""
    g = getattr(out, "g", None)
    if g is None:
        raise RuntimeError("the output's gradient is not set: assign out.g before backward()")
    if g.shape != out.shape:
        raise ValueError(f"the gradient has shape {list(g.shape)}, the output {list(out.shape)}")
    return g


def pair(name, value, least):
    """An int or a pair of ints, as a pair; raises ValueError where one is below `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} is {value!r}: expected an int or a pair of ints, at least {least}")
    return values


def counts(**sizes):
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: expected an int, at least 1")


def out_size(layer, x, kernel, stride, padding):
    """Height and width of a window layer's output; raises ValueError if no window fits."""
    inside = [n + 2 * p for n, p in zip(x.shape[2:], padding)]
    if any(k > n for k, n in zip(kernel, inside)):
        raise ValueError(f"{layer}: kernel {kernel} is larger than the padded input {tuple(inside)}")
    return [(n - k) // s + 1 for n, k, s in zip(inside, kernel, stride)]


def reach(tap, outputs, inputs, stride, padding):
    """Along one dimension: the outputs whose window has its element `tap` inside x, and where in x it is."""
    first = max(0, math.ceil((padding - tap) / stride))
    count = max(0, min(outputs, (inputs - 1 + padding - tap) // stride + 1) - first)
    start = first * stride + tap - padding
    return slice(first, first + count), slice(start, start + count * stride, stride)


def expect(layer, x, shape, like=None):
    """Raises ValueError unless x is of the shape (None: any size) and of the type and device of `like`."""
    fits = isinstance(x, torch.Tensor) and x.dim() == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, x.shape)):
        got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"{layer}: the input is {got}, expected {['any' if n is None else n for n in shape]}"
        )
    if like is not None and (x.dtype, x.device) != (like.dtype, like.device):
        raise ValueError(
            f"{layer}: the input is {x.dtype} on {x.device}, the parameters are {like.dtype} on {like.device}"
        )


def kaiming(shape, fan_in, gain, device, dtype):
    """Normal, variance gain / fan_in (He et al. 2015, arXiv 1502.01852); drawn on the CPU for any device."""
    return torch.randn(shape, dtype=dtype).mul_(math.sqrt(gain / fan_in)).to(device or DEVICE)


def matmul(a, b):
    """a [M, K] @ b [K, L] -> [M, L]."""
    # on an AVX-512 CPU by AMD, oneDNN's product takes a half to a third of mm()'s time for these shapes
    # (float32, few rows, many columns); torch.compile's code calls the same operator
    if ONEDNN and a.is_cpu and a.dtype == torch.float32 and a.numel() and b.numel():
        return ONEDNN(a, b.t(), None, "none", [], "")
    return a @ b


class Linear(Module):
    """y = x w + b for x [N, in_features], w [in, out], b [out]; dx = dy wᵀ, dw = xᵀ dy, db = Σ_n dy."""

    def __init__(self, in_features, out_features, device=None, dtype=None):
        counts(in_features=in_features, out_features=out_features)
        self.w = kaiming((in_features, out_features), in_features, 1, device, dtype)
        self.b = torch.zeros(out_features, device=device or DEVICE, dtype=dtype)

    def parameters(self):
        return [self.w, self.b]

    def forward(self, x):
        expect("Linear", x, (None, self.w.shape[0]), self.w)
        return torch.addmm(self.b, x, self.w)  # N, out

    def bwd(self, out, x):
        g = upstream(out)  # N, out
        self.w.g = torch.mm(x.t(), g, out=torch.empty_like(self.w))
        self.b.g = g.sum(0)
        if self.input_grad:
            x.g = torch.mm(g, self.w.t(), out=torch.empty_like(x))


class Conv2D(Module):
    """y[n,o,h,w] = b[o] + Σ_{c,i,j} W[o,c,i,j] · x[n, c, h·s+i-p, w·s+j-p]: cross-correlation, as in torch.

    im2col writes the pixels that one weight meets as one row of a matrix; a last row of ones carries b:
    y = [W b] · cols is one product. So are the gradients: dW = dy · colsᵀ, db = Σ dy, and dcols = Wᵀ · dy,
    which is folded back: the gradient of a pixel is the sum over its copies.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, device=None, dtype=None
    ):
        counts(in_channels=in_channels, out_channels=out_channels)
        self.kernel, self.stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        self.padding = pair("padding", padding, 0)
        shape = (out_channels, in_channels, *self.kernel)
        self.W = kaiming(shape, math.prod(shape[1:]), 2, device, dtype)
        self.b = torch.zeros(out_channels, device=device or DEVICE, dtype=dtype) if bias else None
        self.kept, self.calls = {}, 0

    def parameters(self):
        return [self.W] if self.b is None else [self.W, self.b]

    def workspace(self, name, shape, fill):
        """Filled once and kept: fresh memory of this size costs more in page faults than the work on it."""
        held = self.kept.get(name)
        if held is None or held.shape != shape or (held.dtype, held.device) != (self.W.dtype, self.W.device):
            held = self.kept[name] = self.W.new_full(shape, fill)
        return held

    def im2col(self, x):
        """x [N, C, H, W] -> [K, L], and a row of ones below, whose weight is the bias."""
        (N, C, H, W), (kH, kW), (sH, sW), (pH, pW) = x.shape, self.kernel, self.stride, self.padding
        Ho, Wo = out_size("Conv2D", x, self.kernel, self.stride, self.padding)
        K = C * kH * kW
        xp = self.workspace("padded", (C, H + 2 * pH, W + 2 * pW, N), 0)  # the border stays zero
        xp[:, pH : pH + H, pW : pW + W] = x.permute(1, 2, 3, 0)
        cols = self.workspace("cols", (K + 1, Ho * Wo * N), 1)  # the last row stays one
        windows = xp.unfold(1, kH, sH).unfold(2, kW, sW)  # C, Ho, Wo, N, kH, kW
        cols[:K].view(C, kH, kW, Ho, Wo, N).copy_(windows.permute(0, 4, 5, 1, 2, 3))
        return cols if self.b is not None else cols[:K]

    def forward(self, x):
        expect("Conv2D", x, (None, self.W.shape[1], None, None), self.W)
        O, N = len(self.W), len(x)
        Ho, Wo = out_size("Conv2D", x, self.kernel, self.stride, self.padding)
        weight = self.W.reshape(O, -1)  # O, K
        if self.b is not None:
            weight = torch.cat((weight, self.b[:, None]), 1)  # O, K+1
        out = matmul(weight, self.im2col(x))  # O, L
        out = out.view(O, Ho, Wo, N).permute(3, 0, 1, 2)  # N, O, Ho, Wo
        self.calls += 1
        out.call = self.calls  # whose columns the workspace holds: a later call overwrites them
        return out

    def bwd(self, out, x):
        g = upstream(out)
        if self.b is not None:
            self.b.g = g.sum((0, 2, 3))
        (O, C, kH, kW), (N, _, Ho, Wo) = self.W.shape, g.shape
        g = g.permute(1, 2, 3, 0).reshape(O, -1).contiguous()  # O, L
        K = C * kH * kW
        if getattr(out, "call", None) == self.calls:  # the workspace still holds the columns of x
            cols = self.kept["cols"]
        else:
            self.calls += 1  # from here on they are those of no output
            cols = self.im2col(x)
        dW = matmul(cols[:K], g.t())  # K, O: dW transposed, the faster product
        self.W.g = torch.empty_like(self.W).copy_(dW.t().view(O, C, kH, kW))
        if self.input_grad:
            x.g = self.fold(g.view(O, Ho, Wo, N), x)

    def fold(self, g, x):
        """dy [O, Ho, Wo, N] -> dx [N, C, H, W]: Wᵀ · dy, and the sum over the copies of a pixel."""
        (O, C, kH, kW), (sH, sW), (pH, pW) = self.W.shape, self.stride, self.padding
        (_, Ho, Wo, N), (H, W) = g.shape, x.shape[2:]
        # dy is laid out along the input's rows first, once for each row of the kernel: the product then sums
        # over these, kW copies are left instead of kH·kW, and a step of the network takes 4 % less
        dy = self.workspace("dy", (kH, O, H, Wo, N), 0)  # rows that no output meets stay zero
        for i in range(kH):
            outputs, rows = reach(i, Ho, H, sH, pH)
            dy[i, :, rows] = g[:, outputs]
        weight = self.W.permute(1, 3, 2, 0).reshape(C * kW, kH * O)
        dcols = matmul(weight, dy.view(kH * O, H * Wo * N)).view(C, kW, H, Wo, N)
        dx = torch.zeros_like(x)
        for j in range(kW):
            outputs, columns = reach(j, Wo, W, sW, pW)
            dx.permute(1, 2, 3, 0)[:, :, columns].add_(dcols[:, j, :, outputs])
        return dx


class ReLU(Module):
    """y = max(x, 0); dx = dy where x > 0, else 0."""

    def forward(self, x):
        return x.clamp_min(0)

    def bwd(self, out, x):
        g = upstream(out)
        x.g = torch.gt(out, 0, out=torch.empty_like(x))  # 1.0 or 0.0: bool costs five times as much on a CPU
        x.g.mul_(g)


class MaxPool2D(Module):
    """The maximum of each window as in torch (padding is -inf); the gradient goes to the first maximum.

    First within the rows, then over them. Of a window's elements (taps) every one after the first has a flag:
    did it beat all before it? The last one that did is the argmax. `out.argmax` keeps the flags.
    """

    def __init__(self, kernel_size, stride=None, padding=0):
        self.kernel = pair("kernel_size", kernel_size, 1)
        self.stride = self.kernel if stride is None else pair("stride", stride, 1)
        self.padding = pair("padding", padding, 0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel)):
            raise ValueError(f"MaxPool2D: padding {padding} is more than half of the kernel {kernel_size}")

    def forward(self, x):
        expect("MaxPool2D", x, (None, None, None, None))
        size = out_size("MaxPool2D", x, self.kernel, self.stride, self.padding)
        (pH, pW), out, beaten = self.padding, x, {}
        if pH or pW:
            out = F.pad(x, (pW, pW, pH, pH), value=-math.inf)
        for dim in (3, 2):  # within the rows first: in row-major order the first maximum wins
            taps = self.taps(out, dim, size[dim - 2])
            out, beaten[dim] = taps[0], []
            for tap in taps[1:]:
                best = torch.maximum(out, tap)
                beaten[dim].append(torch.gt(tap, out, out=torch.empty_like(best)))
                out = best
        out = out.clone() if self.kernel == (1, 1) else out
        out.argmax = beaten
        return out

    def taps(self, x, dim, size):
        """The kernel's views along dim 2 or 3: tap j of every window."""
        k, s = self.kernel[dim - 2], self.stride[dim - 2]
        at = [slice(j, j + s * (size - 1) + 1, s) for j in range(k)]
        return [x[:, :, a] if dim == 2 else x[:, :, :, a] for a in at]

    def bwd(self, out, x):
        g = upstream(out)  # N, C, Ho, Wo
        N, C, H, W = x.shape
        (pH, pW), order = self.padding, sorted(range(4), key=lambda d: -x.stride(d))
        for dim, shape in ((2, (N, C, H + 2 * pH, g.shape[3])), (3, (N, C, H + 2 * pH, W + 2 * pW))):
            k, s = self.kernel[dim - 2], self.stride[dim - 2]
            dx = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
            if k != s or shape[dim] != s * g.shape[dim]:  # else the taps are all of it, each element once
                dx.zero_()
            taps = self.taps(dx, dim, g.shape[dim])
            for tap, beat in zip(taps[:0:-1], out.argmax[dim][::-1]):  # from the last tap to the second
                won = torch.mul(g, beat, out=None if s < k else tap)
                if s < k:
                    tap += won
                last = tap is taps[1] and s >= k
                g = torch.sub(g, won, out=taps[0] if last else None)  # what is left for the taps before
            if s < k:
                taps[0].add_(g)
            elif k == 1:
                taps[0].copy_(g)
            g = dx
        x.g = torch.empty_like(x).copy_(g[:, :, pH : pH + H, pW : pW + W]) if pH or pW else g


class Flatten(Module):
    """[N, C, H, W] -> [N, C·H·W]."""

    def forward(self, x):
        if x.dim() < 2:
            raise ValueError(f"Flatten: the input is {list(x.shape)}, expected at least two dimensions")
        # batch innermost as Conv2D leaves it: a view then, else a copy
        return x.detach().movedim(0, -1).reshape(math.prod(x.shape[1:]), len(x)).t()

    def bwd(self, out, x):
        x.g = torch.empty_like(x).copy_(upstream(out).reshape(x.shape))


class CrossEntropy(Module):
    """The mean over the batch of -log softmax(logits)[target]; d logits = (softmax - onehot) · loss.g / N.

    logits float [N, classes], targets of any integer type [N]; loss.g counts as 1 when it is not set.
    Raises ValueError for wrong shapes and for targets out of range.
    """

    def forward(self, logits, targets):
        expect("CrossEntropy", logits, (None, None))
        expect("CrossEntropy's targets", targets, (len(logits),))
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(
                f"CrossEntropy: targets are {targets.dtype}, expected class numbers of an integer type"
            )
        targets = targets.long()
        # on the GPU this waits for the device; while a CUDA graph is recorded it can't, and is left out
        if len(targets) and not (targets.is_cuda and torch.cuda.is_current_stream_capturing()):
            low, high = (int(v) for v in targets.aminmax())
            if low < 0 or high >= logits.shape[1]:
                raise ValueError(
                    f"CrossEntropy: targets {low} to {high}, expected 0 to {logits.shape[1] - 1}"
                )
        log_p = logits - logits.amax(1, keepdim=True)  # a shift by the row's maximum: exp can't overflow
        log_p -= log_p.exp().sum(1, keepdim=True).log_()
        loss = log_p.gather(1, targets[:, None]).mean().neg_()
        loss.log_p = log_p
        return loss

    def bwd(self, out, logits, targets):
        g = getattr(out, "g", None)
        if torch.is_tensor(g) and g.numel() != 1:
            raise ValueError(f"CrossEntropy: loss.g is {list(g.shape)}, expected one number")
        p = torch.empty_like(logits).copy_(out.log_p).exp_()
        p.scatter_add_(1, targets.long()[:, None], p.new_full((len(p), 1), -1))
        logits.g = p.mul_((1 if g is None else g) / max(len(p), 1))


@functools.cache  # once is enough
def keep_freed_memory():
    """Has glibc keep freed memory for what comes next; nothing happens with another C library.

    By default it gives large blocks back to the system and takes them anew at every step, at the price of a
    page fault for every 4 KB: a step takes up to 1.8 times as long at batch 128, 1.6 times at batch 640.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too


class Sequential:
    """Layers one after the other: y = model(x); set y.g (or let CrossEntropy do it); model.backward(y)."""

    def __init__(self, *layers):
        self.layers = list(layers)
        keep_freed_memory()

    def __call__(self, x):
        # free the last step's tensors first: memory that is still in the cache is used again
        for layer in self.layers:
            layer.args = layer.out = None
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def backward(self, last_out, input_grad=True):
        """From last_out.g, every parameter's g; input_grad=False saves the gradient of the model's input."""
        if self.layers[-1].args is None:
            raise RuntimeError("Sequential.backward(): call the model first, there is no output yet")
        self.layers[0].input_grad = input_grad
        for layer in reversed(self.layers):
            layer.bwd(last_out, *layer.args)
            last_out = layer.args[0]
        self.layers[0].input_grad = True

    def parameters(self):
        return [p for layer in self.layers for p in layer.parameters()]


class SGD:
    """As torch.optim.SGD: g += weight_decay·p, v = momentum·v + g, p -= lr·v (Nesterov: g + momentum·v).

    A parameter without a gradient is left alone. Raises ValueError for a negative setting.
    """

    def __init__(self, params, lr, momentum=0, nesterov=False, weight_decay=0):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"SGD: {name} is {value}, expected at least 0")
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        self.params, self.lr, self.momentum = list(params), lr, momentum
        self.nesterov, self.weight_decay = nesterov, weight_decay
        self.velocity = [None] * len(self.params)

    def step(self):
        for i, p in enumerate(self.params):
            g = getattr(p, "g", None)
            if g is None:
                continue
            if self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            if self.momentum:
                v = self.velocity[i]
                v = self.velocity[i] = g.clone() if v is None else v.mul_(self.momentum).add_(g)
                g = g.add(v, alpha=self.momentum) if self.nesterov else v
            p.sub_(g, alpha=self.lr)


def build_cnn(device=None, dtype=None):
    """The assignment's network for [N, 1, 28, 28]: two convolutions, one linear layer, 9,098 parameters."""
    kind = {"device": device, "dtype": dtype}
    model = Sequential(
        *(Conv2D(1, 8, 3, padding=1, **kind), ReLU(), MaxPool2D(2)),  # N, 8, 14, 14
        *(Conv2D(8, 16, 3, padding=1, **kind), ReLU(), MaxPool2D(2)),  # N, 16, 7, 7
        *(Flatten(), Linear(784, 10, **kind)),  # N, 10
    )
    assert sum(p.numel() for p in model.parameters()) == 9098
    return model


# ---------------------------------------------------------------------------------------------- data


class InputError(ValueError):
    """Bad input from the user: one line, exit status 2."""


def one_line(error, limit=200):
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def load_mnist(folder):
    """MNIST's train and test part, downloaded into `folder` by torchvision where they are missing.

    Returns [(images uint8 [60000, 28, 28], labels int64 [60000]), (the same for 10000)].
    Raises ConnectionError if it is neither there nor to be had, InputError if its files are damaged.
    """
    raw = Path(folder) / "MNIST" / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all((raw / name).exists() for name in names):
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; a silent network would hang the run
        try:
            torchvision.datasets.MNIST(folder, download=True)  # tries its mirrors, compares checksums
        except Exception as e:  # whatever network, server, archive or folder may throw
            mirrors = " or ".join(torchvision.datasets.MNIST.mirrors)
            raise ConnectionError(
                f"MNIST is not in {raw} and can't be downloaded from {mirrors} ({one_line(e)}). "
                f"To go on offline, put {', '.join(names)} there (or the same names with .gz)"
            ) from e
        finally:
            socket.setdefaulttimeout(timeout)
    parts = []
    for train, which in ((True, "train"), (False, "t10k")):
        try:
            part = torchvision.datasets.MNIST(folder, train=train)
            parts.append(checked(part.data, part.targets))
        except Exception as e:  # damage shows in many ways: assertion, reshape, end of file, labels
            raise InputError(f"{raw}: {which}-* is damaged ({one_line(e)}): delete it and start again") from e
    return parts


def checked(images, labels):
    """(images, labels); raises ValueError unless they are a usable part of a data set."""
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise ValueError(f"images {images.dtype} {list(images.shape)}, {len(labels)} labels")
    if len(images) == 0 or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{len(images)} images, labels {labels.tolist()[:9]}: expected some, labels 0 to 9")
    return images, labels.long()


def load_digits():
    """scikit-learn's 1,797 real digits, 8×8 scaled to 28×28, in the form of load_mnist: 1,437 and 360."""
    held = datasets.load_digits()
    images = torch.from_numpy(held.images)[:, None] * (255 / 16)  # n, 1, 8, 8
    images = F.interpolate(images, size=(28, 28), mode="bilinear").round_().to(torch.uint8)[:, 0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same for every seed
    return [checked(images[part], torch.from_numpy(held.target)[part]) for part in (order[360:], order[:360])]


def load_data(dataset, folder):
    """(name of the data set, [train part, test part]); auto falls back to the digits, and says so."""
    try:
        return ("digits", load_digits()) if dataset == "digits" else ("mnist", load_mnist(folder))
    except ConnectionError as e:
        if dataset == "mnist":
            raise InputError(f"{e}, or use --dataset digits") from e
        print(
            "!" * 100 + f"\nWARNING: {e}.\nThis run is on scikit-learn's 1,797 small digits instead of MNIST;"
        )
        print("nothing that it prints says anything about MNIST.\n" + "!" * 100, flush=True)
        return "digits", load_digits()


def split(part, seed):
    """90 % to train and 10 % to validate, drawn by a generator of its own; InputError for less than ten."""
    if len(part[0]) < 10:
        raise InputError(f"{len(part[0])} training images are too few to keep a tenth for validation")
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(seed))
    return [tuple(t[rows] for t in part) for rows in (order[len(order) // 10 :], order[: len(order) // 10])]


def to_input(images):
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28], MNIST's mean 0 and variance 1, batch innermost."""
    x = images.permute(1, 2, 0).contiguous().float()
    return x.div_(255).sub_(0.1307).div_(0.3081)[None].permute(3, 0, 1, 2)


def batches(images, labels, size, generator, shift):
    """One epoch of (x, y): every sample once, in random order, moved by up to `shift` pixels each way."""
    windows = F.pad(images, (shift,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)  # n, 2·shift+1, 2·shift+1, 28, 28
    order = torch.randperm(len(images), generator=generator).to(images.device)
    down, right = torch.randint(2 * shift + 1, (2, len(images)), generator=generator).to(images.device)
    for rows, d, r in zip(order.split(size), down.split(size), right.split(size)):
        yield to_input(windows[rows, d, r]), labels[rows]


# ---------------------------------------------------------------------------------------------- training


def learning_rate(step, steps, peak, schedule):
    """One-cycle (Smith 2018, arXiv 1803.09820): linearly up over the first tenth, then linearly to zero."""
    if schedule == "constant":
        return peak
    return peak * min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))


def train_epoch(model, optimizer, data, rates, report):
    """One pass over the batches of `data`, with a learning rate for each step; returns (loss, accuracy).

    Raises FloatingPointError with the step's number where the loss is no longer finite.
    """
    criterion, losses, hits, sizes = CrossEntropy(), [], [], []
    for rate, (x, y) in zip(rates, data):
        optimizer.lr = rate
        logits = model(x)
        losses.append(criterion(logits, y))
        criterion.backward()
        model.backward(logits, input_grad=False)
        optimizer.step()
        hits.append((logits.argmax(1) == y).sum())
        sizes.append(len(y))
        if len(sizes) % 100 == 0 or len(sizes) == len(rates):  # seldom: reading from the GPU waits for it
            bad = (~torch.stack(losses).isfinite()).nonzero()
            if len(bad):
                step = int(bad[0])
                raise FloatingPointError(f"the loss is {losses[step]:.3g} at step {step + 1}")
            report(len(sizes))
    total = sum(loss * n for loss, n in zip(losses, sizes))  # a smaller last batch counts as what it is
    return float(total) / sum(sizes), int(sum(hits)) / sum(sizes)


def evaluate(model, images, labels):
    """(mean loss, accuracy in 0..1, logits [n, 10]) of uint8 images [n, 28, 28]."""
    logits = torch.cat([model(to_input(part)) for part in images.split(1000)])
    hits = int((logits.argmax(1) == labels).sum())
    return float(CrossEntropy()(logits, labels)), hits / len(labels), logits


def named(model):
    """The parameters by name: number of the layer and attribute, such as 0.W."""
    return {
        f"{i}.{k}": v for i, m in enumerate(model.layers) for k, v in vars(m).items() if k in ("W", "w", "b")
    }


def fit(model, train, val, args):
    """Trains; returns (best validation accuracy, its epoch, its weights), the log, the steps' seconds."""
    plain = args.schedule == "constant"  # the course's recipe: no Nesterov, no weight decay, no shifts
    nesterov, decay, shift = not plain and args.momentum > 0, 0 if plain else WEIGHT_DECAY, 0 if plain else 1
    sgd = SGD(model.parameters(), args.lr, args.momentum, nesterov, decay)
    generator = torch.Generator().manual_seed(args.seed)
    per_epoch, epochs = math.ceil(len(train[0]) / args.batch_size), 1 if args.dry_run else args.epochs
    steps, best, log, start = epochs * per_epoch, (-1,), [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        done = (epoch - 1) * per_epoch
        rates = [learning_rate(done + k, steps, args.lr, args.schedule) for k in range(per_epoch)]

        def report(k, epoch=epoch, done=done):
            eta = (time.perf_counter() - start) * (steps / (done + k) - 1)
            live(f"epoch {epoch:2d}/{epochs} | step {k}/{per_epoch} | eta {duration(eta)}")

        began = time.perf_counter()
        data = batches(*train, args.batch_size, generator, shift)
        try:
            loss, accuracy = train_epoch(model, sgd, data, rates, report)
        except FloatingPointError as e:
            raise FloatingPointError(f"{e} of epoch {epoch}: try a smaller --lr") from None
        seconds = time.perf_counter() - began  # the returned numbers have waited for the GPU
        val_loss, val_accuracy, _ = evaluate(model, *val)
        better = val_accuracy > best[0]
        if better:
            best = val_accuracy, epoch, {name: p.clone() for name, p in named(model).items()}
        row = dict(epoch=epoch, train_loss=loss, train_accuracy=accuracy, val_loss=val_loss)
        log.append(row | dict(val_accuracy=val_accuracy, lr=rates[-1], seconds=seconds, best=int(better)))
        eta = (time.perf_counter() - start) / epoch * (epochs - epoch)
        line = (
            f"epoch {epoch:2d}/{epochs} | train loss {loss:.4f} acc {accuracy:.2%} | val loss {val_loss:.4f} "
        )
        line += f"acc {val_accuracy:.2%} | lr {rates[-1]:.1e} | {duration(seconds)} | eta {duration(eta)}"
        live(line + " | best" * better, stays=True)
    return best, log, sum(row["seconds"] for row in log)


# ---------------------------------------------------------------------------------------------- pictures


def grid(path, images, titles, heading):
    """Images uint8 [n, 28, 28] in rows of eight, a title above each."""
    rows = max(1, math.ceil(len(images) / 8))
    figure = Figure(figsize=(9.2, 1.4 * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    for k, axes in enumerate(figure.subplots(rows, 8, squeeze=False).flat):
        axes.axis("off")
        if k < len(images):
            axes.imshow(images[k], cmap="gray", vmin=0, vmax=255)
            axes.set_title(titles[k], fontsize=8)
    figure.savefig(path, dpi=110)


def pictures(out, title, train, test, logits, log):
    """The run's samples.png, curves.png, confusion.png and mistakes.png."""
    grid(out / "samples.png", train[0][:32].cpu(), train[1][:32].tolist(), f"{title}: training samples")

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part, style in (("train", "o--"), ("val", "s-")):
            axes.plot([row["epoch"] for row in log], [row[f"{part}_{key}"] for row in log], style, label=part)
        axes.set(xlabel="epoch", ylabel=key, xticks=[row["epoch"] for row in log])
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=110)

    images, labels = (t.cpu() for t in test)
    p, guess = logits.cpu().softmax(1).max(1)
    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    axes = figure.add_subplot(title=f"{title}: test part")
    metrics.ConfusionMatrixDisplay.from_predictions(
        labels, guess, labels=range(10), cmap="Blues", ax=axes, colorbar=False
    )
    figure.savefig(out / "confusion.png", dpi=110)

    wrong = (guess != labels).nonzero()[:, 0]
    worst = wrong[p[wrong].argsort(descending=True, stable=True)][:32]
    titles = [f"{int(labels[k])} → {int(guess[k])} ({float(p[k]):.0%})" for k in worst]
    grid(
        out / "mistakes.png",
        images[worst],
        titles,
        f"{title}: worst of {len(wrong)} mistakes, true → predicted",
    )


# ---------------------------------------------------------------------------------------------- the run

BEFORE = {"code", "commit", ".lock"}  # what a batch job lays into OUT before the first start, and the lock
PICTURES = ("samples.png", "curves.png", "confusion.png", "mistakes.png")


def live(text, stays=False):
    """A line that the next one overwrites: on a terminal only, never in a log file; or one that stays."""
    terminal = sys.stdout.isatty()
    if stays or terminal:
        print("\r\033[K" * terminal + text, end="\n" if stays else "", flush=True)


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.1f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


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


def choose_device(name):
    there = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available()}
    if not there.get(name, torch.backends.mps.is_available()):
        raise InputError(f"--device {name}: there is no {name} here; --device auto takes what there is")
    return DEVICE if name == "auto" else torch.device(name)


def seed_everything(seed, deterministic):
    """For the initial weights (split and order have generators of their own); deterministic: on CUDA, too."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def write_json(path, content):
    """Whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as f:
        f.write(json.dumps(content, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def finished(out, told):
    """Whether `out` holds a finished run of the same arguments; InputError if a run can't go there."""
    try:
        held = {path.name for path in out.iterdir()} - BEFORE if out.exists() else set()
        before = json.loads((out / "args.json").read_text()) if "args.json" in held else {}
    except (OSError, ValueError) as e:
        raise InputError(f"--out {out} can't be used ({one_line(e, 80)})") from e
    foreign = held - {"args.json", "args.tmp", "log.csv", "metrics.json", "metrics.tmp", "best.pt", *PICTURES}
    if foreign or (held and not before and held != {"args.tmp"}):
        raise InputError(f"--out {out} holds other files ({', '.join(sorted(foreign or held))[:80]})")
    other = [f"--{k} {before.get(k)} there, {v} now" for k, v in told.items() if before.get(k) != v]
    if before and other:
        raise InputError(
            f"--out {out} holds a run with other arguments: {'; '.join(other).replace('_', '-')}"
        )
    return "metrics.json" in held


def lock_folder(out):
    """Keeps other runs out of it, until the file that is returned is closed or the process ends."""
    lock = open(out / ".lock", "a")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"another run is writing into {out}") from e
    except OSError as e:
        print(f"warning: {out} can't be locked ({e.strerror}): let no other run use it", flush=True)
    return lock


def run(args):
    """Data, training, the test part once, and the results in args.out."""
    began = time.perf_counter()
    out = Path(args.out or f"results/cnn-{datetime.now():%Y%m%d-%H%M%S}")
    told = {k: v for k, v in vars(args).items() if k not in ("out", "data_dir", "predict", "checkpoint")}
    if finished(out, told):
        return print(f"finished before, nothing to do: {out} (delete the folder to train again)")
    device = choose_device(args.device)
    seed_everything(args.seed, args.deterministic)
    dataset, (train, test) = load_data(args.dataset, args.data_dir)
    train, val = split(train, args.seed)
    if args.dry_run:
        train, val, test = ([t[: args.batch_size] for t in part] for part in (train, val, test))
    train, val, test = ([t.to(device) for t in part] for part in (train, val, test))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
        finished(out, told)  # another run may have begun here meanwhile
        write_json(out / "args.json", told)
    except OSError as e:
        raise InputError(f"--out {out} can't be written ({e.strerror})") from e
    model = build_cnn(device)
    print(f"{dataset}: {len(train[0])} train, {len(val[0])} validation, {len(test[0])} test images")
    print(f"{device_name(device)} | torch {torch.__version__} | seed {args.seed} | {out}", flush=True)

    (val_accuracy, epoch, weights), log, seconds = fit(model, train, val, args)
    for name, p in named(model).items():
        p.copy_(weights[name])
    test_loss, test_accuracy, logits = evaluate(model, *test)
    torch.save({name: p.cpu() for name, p in weights.items()}, out / "best.pt")
    with open(out / "log.csv", "w", newline="") as f:
        table = csv.DictWriter(f, log[0], lineterminator="\n")
        table.writeheader()
        table.writerows(log)
    pictures(out, f"{dataset}, seed {args.seed}" + ", dry run" * args.dry_run, train, test, logits, log)
    results = dict(
        dataset=dataset,
        seed=args.seed,
        device=device_name(device),
        torch=torch.__version__,
        git_commit=git_commit(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        dry_run=args.dry_run,
        epochs=len(log),
        batch_size=args.batch_size,
        samples_per_epoch=len(train[0]),
        trainable_params=sum(p.numel() for p in model.parameters()),
        train_seconds=seconds,  # batches and steps
        total_seconds=time.perf_counter() - began,  # evaluation, pictures and loading the data, too
        best_epoch=epoch,
        val_accuracy=val_accuracy,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
    )
    write_json(out / "metrics.json", results)  # last: without it, a run is unfinished
    print(f"training {duration(seconds)}, in all {duration(results['total_seconds'])}; results in {out}")
    print(
        f"{dataset} test, once, with the weights of epoch {epoch} (best on validation: {val_accuracy:.2%}): "
        f"accuracy {test_accuracy:.2%}, loss {test_loss:.4f}"
    )
    lock.close()


# ---------------------------------------------------------------------------------------------- prediction


def load_weights(path, model):
    """A run's best.pt into the model; InputError if it is something else."""
    try:
        held = dict(torch.load(path, map_location="cpu", weights_only=True))
        for name, p in named(model).items():
            if held[name].shape != p.shape:
                raise ValueError(f"{name} is {list(held[name].shape)}, expected {list(p.shape)}")
            p.copy_(held[name])
    except Exception as e:  # unpickling fails in many ways
        raise InputError(f"--checkpoint {path}: not a run's best.pt ({one_line(e, 120)})") from e


def read_digit(path):
    """A picture of one digit as MNIST has them: light on dark, longer side 20 px, centre of mass central."""
    try:
        with Image.open(path) as f:
            picture = ImageOps.exif_transpose(f).convert("RGBA")
    except Exception as e:  # Pillow's readers throw whatever a damaged file leads to
        raise InputError(f"{path}: not an image ({one_line(e, 120)})") from e
    paper = Image.new("RGBA", picture.size, "white")  # behind what is transparent
    a = np.asarray(Image.alpha_composite(paper, picture).convert("L"), dtype=np.float32)
    ink = np.abs(a - np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]])))  # either polarity
    if ink.max() < 30:
        raise InputError(f"{path}: no digit, nothing stands out from the border")
    ink = np.where(ink > 0.2 * ink.max(), ink, 0)
    rows, columns = ink.max(1).nonzero()[0], ink.max(0).nonzero()[0]
    digit = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = 20 / max(digit.size)
    size = [max(1, round(scale * n)) for n in digit.size]
    digit = np.asarray(digit.resize(size, Image.Resampling.BICUBIC)).clip(0)
    centre = [float((digit.sum(1 - d) @ (np.arange(digit.shape[d]) + 0.5)) / digit.sum()) for d in (0, 1)]
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, digit.shape))
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[top : top + digit.shape[0], left : left + digit.shape[1]] = torch.from_numpy(
        255 * digit / digit.max()
    )
    return image


def predict(args):
    model = build_cnn(choose_device(args.device))
    load_weights(args.checkpoint, model)
    images = torch.stack([read_digit(path) for path in args.predict]).to(model.parameters()[0].device)
    for path, p in zip(args.predict, model(to_input(images)).softmax(1).tolist()):
        print(f"{path}: {np.argmax(p)} | " + "  ".join(f"{k} {share:.1%}" for k, share in enumerate(p)))


# ---------------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Trains the CNN with hand-written gradients on MNIST, or reads a digit with it."
    )
    add = parser.add_argument_group("data").add_argument
    names = ("auto", "mnist", "digits")
    add(
        "--dataset",
        choices=names,
        default="auto",
        help="auto (default): MNIST, or digits where it can't be had",
    )
    add("--data-dir", default="data", metavar="DIR", help="where the data sets lie (default: %(default)s)")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=int, default=5, help="passes over the training part (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="learning rate, its peak with onecycle (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="of SGD (default: %(default)s)")
    recipes = (
        "onecycle (default): with weight decay, Nesterov and one-pixel shifts; constant: with none of them"
    )
    add("--schedule", choices=("onecycle", "constant"), default="onecycle", help=recipes)
    add("--seed", type=int, default=0, help="of split, initial weights and order (default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    names = ("auto", "cpu", "cuda", "mps")
    add("--device", choices=names, default="auto", help="auto (default): cuda if there is one, else cpu")
    add("--out", metavar="DIR", help="results folder (default: results/cnn-<timestamp>)")
    add("--deterministic", action="store_true", help="the same bits again, on CUDA too")
    add("--dry-run", action="store_true", help="one batch through everything")
    add = parser.add_argument_group("prediction").add_argument
    add(
        "--predict",
        nargs="+",
        metavar="IMAGE",
        help="PNG or JPEG of one digit each, any size, either polarity",
    )
    add("--checkpoint", metavar="FILE", help="best.pt of a run, for --predict")
    args = parser.parse_args(argv)
    for name, value in (("--epochs", args.epochs), ("--batch-size", args.batch_size), ("--lr", args.lr)):
        if not 0 < value < math.inf:
            parser.error(f"{name} is {value}: expected more than 0")
    if not 0 <= args.momentum < 1:
        parser.error(f"--momentum is {args.momentum}: expected 0 or more and less than 1")
    if (args.predict is None) != (args.checkpoint is None):
        parser.error("--predict IMAGE... and --checkpoint FILE go together")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        predict(args) if args.predict else run(args)
    except (InputError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
