"""A convolutional network from scratch: every gradient by hand, on plain PyTorch tensors, without autograd.

    python cnn_from_scratch.py                   # MNIST, five epochs
    python cnn_from_scratch.py --batch-size 640 --lr 0.01 --momentum 0 --schedule constant  # the course's
    python cnn_from_scratch.py --predict digit.png --checkpoint results/cnn-.../best.pt

The last lines of a run (one thread of an AMD EPYC without AVX-512, torch 2.14, seed 0):

    training 35.2s, in all 41.1s; results in results/cnn-…
    mnist test, once, with the weights of epoch 5 (best on validation: 98.92%): accuracy 99.12%, loss 0.0253

A layer is a constructor, `forward` and `bwd`; bwd(out, x) turns the gradient out.g into x.g, W.g and b.g.
(Linear calls its weight w.) The comment at the end of a line gives the shape of its result: N batch, C and O
channels in and out, H, W height and width, kH, kW kernel, s stride, p padding, Ho, Wo output size.

A tensor [N, C, H, W] may have any memory layout. Conv2D leaves its output with the batch innermost, as
C, H, W, N: a convolution is then one plain matrix product, and every copy moves long contiguous runs. So
use y.reshape(...), not y.view(...).
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a run silently, during the imports too

import argparse
import contextlib
import csv
import ctypes
import errno
import functools
import io
import json
import math
import os
import platform
import shlex
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import warnings
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure  # pyplot would set up a display and global state on import
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn import datasets, metrics

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHT_DECAY = 5e-4  # of the one-cycle recipe
# the defaults of --epochs and --lr; an epoch is 844 steps on MNIST, 21 on the digits
DEFAULTS = {"mnist": {"epochs": 5, "lr": 0.1}, "digits": {"epochs": 30, "lr": 0.03}}

# ---------------------------------------------------------------------------------------------- layers


class Module:
    """A layer. Calling it stores its arguments and its output; backward() hands both to bwd(out, *args).

    A gradient lives on its tensor, as its attribute `g`: set out.g, call backward(), read x.g, W.g and b.g.
    Gradients are assigned, not accumulated. Whatever else bwd needs travels on the output, such as out.cols.
    A layer of your own must return its parameters from parameters(), or SGD does not see them, and must not
    use the names `args`, `out` and `input_grad`. There is no training mode: set a Dropout or BatchNorm of
    your own to training or evaluation yourself, before and after evaluate(). best.pt holds parameters only,
    no running statistics.
    Raises RuntimeError for backward() before a forward pass, ValueError for input that does not fit.
    """

    args = out = None  # class attributes: a layer needs no super().__init__()
    input_grad = True  # Sequential sets it to False where the model input's gradient isn't needed

    @torch.no_grad()  # a caller's tensor may require torch's own gradients, but its graph must not grow
    def __call__(self, x, *args):
        kind = type(x).__name__
        check(isinstance(x, torch.Tensor), f"{type(self).__name__}: the input is a {kind}, expected a tensor")
        out = self.forward(x, *args)
        self.args, self.out = (x, *args), out
        return out

    @torch.no_grad()
    def backward(self, out=None):
        """Runs bwd() for the last call; `out` may name its output, as a check."""
        self.check_last(out)
        self.bwd(self.out, *self.args)

    def check_last(self, out):
        name = f"{type(self).__name__}.backward()"
        if self.args is None:
            raise RuntimeError(f"{name}: no output yet; call it first, as layer(x), not as layer.forward(x)")
        if out is not None and out is not self.out:
            text = "pass the output itself (not the loss or a gradient), or call the layer again"
            raise RuntimeError(f"{name}: this is not the output of the last call: {text}")

    def parameters(self):
        return []


def upstream(out):
    """The gradient that arrives at `out`; raises RuntimeError if unset, ValueError if of another shape."""
    g = getattr(out, "g", None)
    if g is None:
        raise RuntimeError(
            "the last call's output has no gradient: call criterion(output, y) and criterion.backward() "
            "after every model(x), or assign output.g. Of a model with reorder=True, such as build_cnn()'s, "
            "call backward(), not its layers' one by one: pooling runs before ReLU there"
        )
    check(isinstance(g, torch.Tensor), f"the gradient is a {type(g).__name__}, expected a tensor")
    check(g.shape == out.shape, f"the gradient has shape {list(g.shape)}, the output {list(out.shape)}")
    check(out.is_floating_point(), f"the output is {out.dtype}: only floating-point numbers have gradients")
    return g.detach().to(out.dtype)


def check(condition, message):
    if not condition:
        raise ValueError(message)


def check_sizes(**sizes):
    for name, n in sizes.items():
        fits = isinstance(n, (int, np.integer)) and n >= 1
        check(fits, f"{name} is {n!r}: expected an int, at least 1")


def as_pair(name, value, least=1):
    """An int or a pair of ints, as a pair."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    fits = len(pair) == 2 and all(isinstance(n, (int, np.integer)) and n >= least for n in pair)
    check(fits, f"{name} is {value!r}: expected an int or a pair of ints, at least {least}")
    return pair


def check_input(layer, x, shape, like=None):
    """x must have the shape (None: any size), and the type and device of `like`."""
    fits = x.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape))
    expected = ", ".join("any" if n is None else str(n) for n in shape)
    hint = ": put Flatten() before it" if x.dim() > len(shape) == 2 else ""
    check(fits, f"{layer}: the input is {list(x.shape)}, expected [{expected}]{hint}")
    if like is not None:
        kinds = [f"{t.dtype} on {t.device}" for t in (x, like)]
        check(kinds[0] == kinds[1], f"{layer}: the input is {kinds[0]}, the parameters are {kinds[1]}")


def check_bias(layer, b, size, weight):
    fits = b.shape == (size,) and b.dtype == weight.dtype
    check(fits, f"{layer}: b is {b.dtype} {list(b.shape)}, expected {weight.dtype} [{size}]")


def output_size(layer, x, kernel, stride, padding):
    """(Ho, Wo) of a layer with windows, which must fit into the padded input."""
    padded = tuple(n + 2 * p for n, p in zip(x.shape[2:], padding))
    fits = all(k <= n for k, n in zip(kernel, padded))
    check(fits, f"{layer}: kernel {kernel} is larger than the padded input {padded}")
    return [(n - k) // s + 1 for n, k, s in zip(padded, kernel, stride)]


def glorot_uniform(shape, fan_in, fan_out, device, dtype):
    """Uniform within ±sqrt(6 / (fan_in + fan_out)): Glorot and Bengio 2010, "Understanding the difficulty of
    training deep feedforward neural networks", equation 16. Drawn on the CPU: the same weights on any device.
    """
    # uniform in ±a has the variance a²/3, here 2 / (fan_in + fan_out): between 1 / fan_in, which keeps the
    # size of the activations from layer to layer, and 1 / fan_out, which keeps that of the gradients
    limit = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape, device="cpu", dtype=dtype).uniform_(-limit, limit).to(device or DEVICE)


class Linear(Module):
    """y = x w + b for x [N, in_features], w [in_features, out_features], b [out_features].

    w is the transpose of torch.nn.Linear's weight. There is always a bias b.

    dx = dy wᵀ    dw = xᵀ dy    db = Σ_n dy
    """

    def __init__(self, in_features, out_features, device=None, dtype=None):
        check_sizes(in_features=in_features, out_features=out_features)
        self.w = glorot_uniform((in_features, out_features), in_features, out_features, device, dtype)
        # zeros will do: the random w already makes the units differ
        self.b = torch.zeros(out_features, device=device or DEVICE, dtype=dtype)

    def parameters(self):
        return [self.w, self.b]

    def forward(self, x):
        check_input("Linear", x, (None, len(self.w)), self.w)
        check_bias("Linear", self.b, self.w.shape[1], self.w)
        return torch.addmm(self.b, x, self.w)  # N, out_features

    def bwd(self, out, x):
        g = upstream(out)  # N, out_features
        self.w.g = x.t() @ g
        self.b.g = g.sum(0)  # b was added to each of the N rows
        if self.input_grad:
            x.g = g @ self.w.t()


class Conv2D(Module):
    """y[n,o,h,w] = b[o] + Σ_{c,i,j} W[o,c,i,j] · x[n, c, h·s+i-p, w·s+j-p]: cross-correlation, as in torch.

    With K = C·kH·kW and L = Ho·Wo·N, im2col makes a matrix [K, L]: its row (c, i, j) holds, for every output
    pixel of every image, the input pixel that W[:, c, i, j] is multiplied by. For one 3×3 image, 2×2 kernel:

        x = 1 2 3    cols = 1 2 4 5  for W[:, 0, 0, 0]
            4 5 6           2 3 5 6  for W[:, 0, 0, 1]
            7 8 9           4 5 7 8  for W[:, 0, 1, 0]
                            5 6 8 9  for W[:, 0, 1, 1]

        y = W · cols + b    dW = dy · colsᵀ    db = Σ dy    dcols = Wᵀ · dy

    col2im turns dcols into dx: the gradient of a pixel is the sum over its copies.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, device=None, dtype=None
    ):
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        self.kernel, self.stride = as_pair("kernel_size", kernel_size), as_pair("stride", stride)
        self.padding = as_pair("padding", padding, least=0)
        shape, area = (out_channels, in_channels, *self.kernel), math.prod(self.kernel)
        # fan_in: weights into one output pixel; fan_out: weights out of one input pixel (stride 1)
        self.W = glorot_uniform(shape, in_channels * area, out_channels * area, device, dtype)
        self.b = torch.zeros(out_channels, device=device or DEVICE, dtype=dtype) if bias else None

    def parameters(self):
        return [self.W] if self.b is None else [self.W, self.b]

    def forward(self, x):
        check_input("Conv2D", x, (None, self.W.shape[1], None, None), self.W)
        Ho, Wo = output_size("Conv2D", x, self.kernel, self.stride, self.padding)
        check(self.W.shape[2:] == self.kernel, f"Conv2D: W is {list(self.W.shape)}, the kernel {self.kernel}")
        O, N = len(self.W), len(x)
        cols = self.im2col(x, Ho, Wo)  # K, L
        y = product(self.W.reshape(O, -1), cols)  # O, L
        if self.b is not None:
            check_bias("Conv2D", self.b, O, self.W)
            y += self.b[:, None]
        out = y.view(O, Ho, Wo, N).permute(3, 0, 1, 2)  # N, O, Ho, Wo
        out.cols = cols  # dW needs the same matrix: kept, not made again
        return out

    def bwd(self, out, x):
        N, O, Ho, Wo = out.shape
        # no copy if the gradient has the output's memory layout, which ReLU and MaxPool2D preserve
        g = upstream(out).permute(1, 2, 3, 0).reshape(O, Ho * Wo * N)  # O, L
        if self.b is not None:
            self.b.g = g.sum(1)
        dW = product(out.cols, g.t()).t()  # O, K: (cols · dyᵀ)ᵀ, as a CPU takes twice as long for dy · colsᵀ
        self.W.g = dW.reshape(self.W.shape).contiguous()
        if self.input_grad:
            dcols = product(self.W.reshape(O, -1).t(), g)  # K, L
            x.g = self.col2im(dcols, x, Ho, Wo)

    def im2col(self, x, Ho, Wo):
        """x [N, C, H, W] -> cols [K, L]."""
        (N, C, _, _), (kH, kW), (sH, sW), (pH, pW) = x.shape, self.kernel, self.stride, self.padding
        # N last: the copy below then moves runs of N numbers, however narrow the images; F.pad counts
        # dimensions from the last: N, W, H
        xp = F.pad(x.permute(1, 2, 3, 0), (0, 0, pW, pW, pH, pH))  # C, H+2p, W+2p, N
        windows = xp.unfold(1, kH, sH).unfold(2, kW, sW)  # C, Ho, Wo, N, kH, kW: a view, nothing is copied
        cols = x.new_empty(C, kH, kW, Ho, Wo, N).copy_(windows.permute(0, 4, 5, 1, 2, 3))
        return cols.view(C * kH * kW, Ho * Wo * N)

    def col2im(self, dcols, x, Ho, Wo):
        """dcols [K, L] -> dx [N, C, H, W]; a pixel in several windows has several copies: hence +=."""
        (N, C, H, W), (kH, kW), (sH, sW), (pH, pW) = x.shape, self.kernel, self.stride, self.padding
        dcols = dcols.view(C, kH, kW, Ho, Wo, N)
        dxp = dcols.new_zeros(C, H + 2 * pH, W + 2 * pW, N)
        # over the kernel, not over the windows: a few additions of large tensors, not many of small ones
        for i in range(kH):
            for j in range(kW):
                # Ho × Wo pixels, s apart
                dxp[:, i : i + sH * Ho : sH, j : j + sW * Wo : sW] += dcols[:, i, j]
        dx = dxp[:, pH : pH + H, pW : pW + W].permute(3, 0, 1, 2)
        return torch.empty_like(x).copy_(dx)  # x's memory layout: x.g.view(-1) works if x.view(-1) does


class ReLU(Module):
    """y = max(x, 0)    dx = dy where x > 0, else 0."""

    def forward(self, x):
        return x.clamp_min(0)

    def bwd(self, out, x):
        g = upstream(out)
        positive = torch.gt(x, 0, out=torch.empty_like(x))  # 1.0 or 0.0: a CPU is slower with bool
        x.g = positive.mul_(g)


class MaxPool2D(Module):
    """y[n,c,h,w] = max_{i,j} x[n, c, h·s+i-p, w·s+j-p]; padding counts as -inf, as in torch.

    The maximum of a window is the maximum of its rows' maxima, so pooling runs in one dimension, then in the
    other. dy goes back the same way, to the maximum; where several are equal, to the first one.
    """

    def __init__(self, kernel_size, stride=None, padding=0):
        self.kernel = as_pair("kernel_size", kernel_size)
        self.stride = self.kernel if stride is None else as_pair("stride", stride)
        self.padding = as_pair("padding", padding, least=0)
        fits = all(2 * p <= k for p, k in zip(self.padding, self.kernel))
        check(fits, f"MaxPool2D: padding {padding} is more than half of the kernel {kernel_size}")

    def forward(self, x):
        check_input("MaxPool2D", x, (None, None, None, None))
        output_size("MaxPool2D", x, self.kernel, self.stride, self.padding)  # only checks that it fits
        (pH, pW), xp = self.padding, x
        if any(self.padding) or self.kernel == (1, 1):  # a 1×1 pooling must not share x's memory
            least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            xp = F.pad(x, (pW, pW, pH, pH), value=least)  # N, C, H+2p, W+2p
        # about 2k comparisons per k×k window, not k²
        rows = self.pool(xp, 3)  # N, C, H+2p, Wo
        out = self.pool(rows, 2)  # N, C, Ho, Wo
        out.xp, out.rows = xp, rows
        return out

    def bwd(self, out, x):
        (pH, pW), (H, W) = self.padding, x.shape[2:]
        g = self.unpool(upstream(out), out, out.rows, 2)  # N, C, H+2p, Wo
        g = self.unpool(g, out.rows, out.xp, 3)  # N, C, H+2p, W+2p
        x.g = torch.empty_like(x).copy_(g[:, :, pH : pH + H, pW : pW + W]) if any(self.padding) else g

    def elements(self, x, dim):
        """[element 0 of every window along dim, element 1, ...]: views of x, one per kernel position."""
        return x.unfold(dim, self.kernel[dim - 2], self.stride[dim - 2]).unbind(-1)

    def pool(self, x, dim):
        """Each window's maximum along dim, and where it is: out.larger[k - 1] is 1.0 where element k exceeds
        all before it, else 0.0. The last 1.0 marks the first maximum; without one, it is element 0.
        """
        elements, larger = self.elements(x, dim), []
        out = elements[0]
        for element in elements[1:]:
            larger.append(torch.gt(element, out, out=torch.empty_like(out)))
            out = torch.maximum(out, element)
        p, s = self.padding[dim - 2], self.stride[dim - 2]
        # only for inputs of -inf: in a window that starts in the padding, the first p - start elements are
        # padding. If the image's are all -inf as well, none exceeds them and the gradient would go to the
        # padding, so mark the image's first element, whatever its value: a larger one after it still wins
        for window, start in enumerate(range(0, p, s)[: out.shape[dim]]):
            larger[p - start - 1].select(dim, window).fill_(1)
        out.larger = larger
        return out

    def unpool(self, g, out, x, dim):
        """The gradient of x from g, the gradient of out = pool(x, dim).

        Walks back from a window's last element: the first flag set to 1.0 takes all of g, leaving nothing for
        earlier elements.
        """
        dx = torch.zeros_like(x)
        elements, overlap = self.elements(dx, dim), self.stride[dim - 2] < self.kernel[dim - 2]
        for k in range(len(elements) - 1, 0, -1):
            # written in place where windows don't overlap; else an element may be the maximum of several
            won = torch.mul(g, out.larger[k - 1], out=None if overlap else elements[k])
            if overlap:
                elements[k].add_(won)
            g = g - won
        elements[0].add_(g)
        return dx


class Flatten(Module):
    """[N, C, H, W] -> [N, C·H·W]."""

    def forward(self, x):
        check(x.dim() > 1, f"Flatten: the input is {list(x.shape)}, expected at least two dimensions")
        # a copy, so that the output keeps its values when the caller changes x in place
        return x.clone(memory_format=torch.contiguous_format).view(len(x), math.prod(x.shape[1:]))

    def bwd(self, out, x):
        x.g = upstream(out).reshape(x.shape).contiguous()


class CrossEntropy(Module):
    """The mean over the batch of -log softmax(logits)[target]; d logits = (softmax - onehot) · loss.g / N.

    logits float [N, classes], targets of any integer type [N]; loss.g counts as 1 if unset. Call the
    criterion's backward(): loss.backward() is autograd's, and fails here. Raises ValueError for wrong shapes
    and for targets out of range.
    """

    def forward(self, logits, targets):
        kind = type(targets).__name__
        check(isinstance(targets, torch.Tensor), f"CrossEntropy: the targets are a {kind}, expected a tensor")
        shapes = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
        fits = logits.dim() == 2 and targets.shape == logits.shape[:1]
        check(fits, f"CrossEntropy: {shapes}, expected [N, classes] and [N], not one-hot")
        kind, classes = targets.dtype, logits.shape[1]
        integer = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        check(integer, f"CrossEntropy: targets are {kind}, expected class numbers of an integer type")
        check(logits.is_floating_point(), f"CrossEntropy: logits are {logits.dtype}, expected floats")
        targets = targets.long()
        if len(targets):
            low, high = torch.stack(targets.aminmax()).tolist()  # synchronises with a GPU, so only once
            fits = low >= 0 and high < classes
            check(fits, f"CrossEntropy: targets {low} to {high}, expected 0 to {classes - 1}")
        # log softmax ignores shifts of a row; subtracting its maximum keeps exp from overflowing
        log_p = logits - logits.amax(1, keepdim=True)  # N, classes
        log_p -= log_p.exp().sum(1, keepdim=True).log_()
        loss = log_p[torch.arange(len(logits), device=logits.device), targets].mean().neg_()
        loss.log_p = log_p  # bwd needs softmax, which is its exp
        return loss

    def bwd(self, out, logits, targets):
        g = getattr(out, "g", None)
        g = torch.as_tensor(1 if g is None else g, dtype=out.dtype)
        check(g.numel() == 1, "CrossEntropy: loss.g is not one number")
        difference = out.log_p.exp()  # N, classes: softmax, then minus the one-hot targets
        difference[torch.arange(len(logits), device=logits.device), targets.long()] -= 1
        logits.g = difference.mul_(g.reshape(()) / max(len(logits), 1))  # / N: loss is a mean; 1 if no rows


class Sequential(Module):
    """Layers one after the other: y = model(x); set y.g (or let CrossEntropy do it); model.backward(y).

    With reorder=True, as in build_cnn, ReLU followed by MaxPool2D runs as MaxPool2D, then ReLU. ReLU is
    monotone, so outputs are the same, and where a window has no positive element no gradient passes either
    way; after a 2×2 pooling ReLU has a quarter of the work. The layers' `args` and `out` are then those of
    the order that ran: call the model's backward(), not one layer's after the other.

    A layer without parameters may occur several times (a Sequential only once); Sequentials may be nested.
    Constructing one calls keep_freed_memory(), which affects the whole process.

    Raises ValueError for parameters that occur twice, RuntimeError for backward() of anything but the
    output of the last call.
    """

    def __init__(self, *layers, reorder=False):
        for layer in layers:
            is_layer = hasattr(layer, "bwd") and hasattr(layer, "parameters") and not isinstance(layer, type)
            kind = f"{type(layer).__module__}.{type(layer).__name__}"  # torch.nn has a ReLU, too
            text = "layers with bwd(), as in Sequential(Linear(4, 3), ReLU())"
            check(is_layer, f"Sequential: {layer!r} is a {kind}, expected {text}")
        self.layers, self.reorder, self.tape = list(layers), reorder, []
        keep_freed_memory()

    def forward(self, x):
        ids = [id(p) for p in self.parameters()]
        once = len(set(ids)) == len(ids)
        check(once, "Sequential: the same parameters occur twice; make a layer for each use")
        # free the last step's tensors first: their memory, still in the CPU cache, is then reused
        self.args, self.out, self.tape = None, None, []
        for layer in self.layers:
            layer.args = layer.out = None
        for layer in self.run_order():
            out = layer(x)
            self.tape.append((layer, out, x))  # not layer.args: a layer may run twice
            x = out
        return x

    @torch.no_grad()
    def backward(self, last_out=None, input_grad=True):
        """Computes every parameter's g from last_out.g. With input_grad=False, a Linear or Conv2D that comes
        first leaves out the gradient of the model's input.

        last_out must be the last call's output, which is also the default.
        """
        self.check_last(last_out)
        try:
            for place, (layer, out, x) in reversed([*enumerate(self.tape)]):
                layer.input_grad = input_grad or place > 0  # only the first may leave out x.g
                layer.bwd(out, x)
                check(place == 0 or hasattr(x, "g"), f"{type(layer).__name__}: bwd() must set x.g")
        finally:
            for layer in self.layers:
                layer.input_grad = True

    def bwd(self, out, x):
        self.backward(out, self.input_grad)

    def run_order(self):
        order = list(self.layers)
        for k in range(len(order) - 1):
            # these very classes: a subclass may compute something else
            if self.reorder and type(order[k]) is ReLU and type(order[k + 1]) is MaxPool2D:
                order[k], order[k + 1] = order[k + 1], order[k]
        return order

    def parameters(self):
        return [p for layer in self.layers for p in layer.parameters()]


class SGD:
    """As torch.optim.SGD: g += weight_decay·p, v = momentum·v + g, p -= lr·v (Nesterov: g + momentum·v).

    A parameter without a gradient is left alone. zero_grad() is needed only if the next backward() does not
    reach all parameters: it replaces gradients, rather than adding to them. Raises ValueError for settings
    that are out of range.
    """

    def __init__(self, params, lr, momentum=0, nesterov=False, weight_decay=0):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check(value >= 0, f"SGD: {name} is {value}, expected at least 0")
        check(momentum > 0 or not nesterov, "SGD: nesterov needs a momentum above 0")
        text = "SGD: expected a list of tensors, as from model.parameters()"
        check(hasattr(params, "__iter__") and not isinstance(params, torch.Tensor), text)
        self.params, self.lr, self.momentum = list(params), lr, momentum
        check(all(isinstance(p, torch.Tensor) for p in self.params), text)
        check(self.params, "SGD: no parameters: does a layer of yours not return them from parameters()?")
        check(len({id(p) for p in self.params}) == len(self.params), "SGD: a parameter occurs twice")
        self.nesterov, self.weight_decay = nesterov, weight_decay
        self.velocity = [None] * len(self.params)

    def zero_grad(self):
        for p in self.params:
            p.g = None

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.params):
            g = getattr(p, "g", None)
            if g is None:
                continue
            if self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            if self.momentum:
                v = self.velocity[i]
                # a copy at first: v is changed in place from then on, and p.g must not change with it
                v = self.velocity[i] = g.clone() if v is None else v.mul_(self.momentum).add_(g)
                g = g.add(v, alpha=self.momentum) if self.nesterov else v
            p.sub_(g, alpha=self.lr)  # in place: the layers hold this very tensor


def build_cnn(device=None, dtype=None):
    """The assignment's network for [N, 1, 28, 28]: two convolutions, one linear layer, 9,098 parameters."""
    where = {"device": device, "dtype": dtype}
    # a padding of 1 makes up for what a 3×3 window loses at the border: only pooling shrinks the image.
    # layers[1].out is 14×14 already, as the pooling runs first; call the layers one by one to see it at 28×28
    layers = [Conv2D(1, 8, 3, padding=1, **where), ReLU(), MaxPool2D(2)]  # N, 8, 14, 14
    layers += [Conv2D(8, 16, 3, padding=1, **where), ReLU(), MaxPool2D(2)]  # N, 16, 7, 7
    layers += [Flatten(), Linear(784, 10, **where)]  # N, 10
    model = Sequential(*layers, reorder=True)  # a step takes 7 to 14 % less time
    assert sum(p.numel() for p in model.parameters()) == 9098, "in a network of yours, drop this line"
    return model


# -------------------------------------------------------------------------------------- two notes on speed

ONEDNN_PRODUCT = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(a, b):
    """a [M, K] · b [K, L] -> [M, L]."""
    # on a CPU in float32, with few rows and very many columns, oneDNN's product is faster than a @ b: a step
    # takes 5 to 20 % less time; torch.compile's code calls the same operator
    if ONEDNN_PRODUCT and a.is_cpu and a.dtype == torch.float32 and a.numel() and b.numel():
        return ONEDNN_PRODUCT(a, b.t(), None, "none", [], "")  # neither bias nor activation
    return a @ b


@functools.cache  # once per process
def keep_freed_memory():
    """Makes glibc keep freed memory for reuse, process-wide; does nothing with another C library.

    By default it returns large blocks to the system and takes them anew at every step, at the price of a page
    fault for every 4 KB: a step takes 1.1 times as long at batch 128, three times at batch 640.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too


# ---------------------------------------------------------------------------------------------- data


class InputError(ValueError):
    """Bad input from the user: one line, exit status 2."""


# these mean an unwritable folder; anything else that stops a download is the network's fault
FOLDER_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
}


def is_of_folder(error):
    # the errno of an SSLError is OpenSSL's, not the system's
    return getattr(error, "errno", None) in FOLDER_ERRORS and not isinstance(error, ssl.SSLError)


def one_line(error, limit=200):
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def load_mnist(folder):
    """MNIST: [training set, test set], each a pair (images uint8 [n, 28, 28], labels int64 [n]).

    Downloads them into `folder` if they are missing. Raises ConnectionError if that fails, InputError if the
    files are damaged or the folder can't be written, PermissionError if a file can't be read.
    """
    raw, sets = Path(folder) / "MNIST" / "raw", []
    names = [f"{s}-{kind}-ubyte" for s in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all((raw / name).exists() for name in names):
        download_mnist(folder, raw, names)
    for name in ("train", "t10k"):
        try:
            data = torchvision.datasets.MNIST(folder, train=name == "train")
            images, labels = data.data, data.targets
            # torchvision checks none of these; max() raises on an empty set, too
            if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
                raise ValueError("images that are not 28×28, not one label for each, or labels above 9")
        except (MemoryError, PermissionError):
            raise
        except Exception as e:  # damage shows as anything from an assertion to the end of the file
            raise InputError(f"{raw}: {name}-* is damaged ({one_line(e)}): delete it and start again") from e
        sets.append((images, labels))
    return sets


def download_mnist(folder, raw, names):
    timeout, mirrors = socket.getdefaulttimeout(), torchvision.datasets.MNIST.mirrors
    socket.setdefaulttimeout(30)  # seconds; without it, a server that never answers would hang the run
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # unpacked aside, as another run may be downloading or reading these files
        with tempfile.TemporaryDirectory(dir=raw, ignore_cleanup_errors=True) as aside:
            unpacked = Path(aside, "MNIST", "raw")
            unpacked.mkdir(parents=True)
            for path in raw.glob("*.gz"):
                shutil.copy(path, unpacked)
            for mirror in mirrors:
                # one by one, as torchvision gives up when a connection breaks off; it compares checksums
                source = type("MNIST", (torchvision.datasets.MNIST,), {"mirrors": [mirror]})
                try:
                    source(aside, download=True)
                    break
                except Exception as e:
                    if mirror == mirrors[-1] or is_of_folder(e):
                        raise
            for name in names:
                os.replace(unpacked / name, raw / name)
    except Exception as e:  # network, server, archive or folder: each raises its own
        if is_of_folder(e):
            raise InputError(f"--data-dir: {raw} can't be written ({one_line(e)})") from e
        raise ConnectionError(
            f"MNIST is not in {raw} and can't be downloaded from {' or '.join(mirrors)} ({one_line(e)}). "
            f"To continue offline, put {', '.join(names)} there (or the official files with .gz)"
        ) from e
    finally:
        socket.setdefaulttimeout(timeout)


def load_digits():
    """scikit-learn's 1,797 real digits, 8×8, in the form of load_mnist: 1,437 and 360.

    Scaled to 20×20 in the middle of 28×28, where MNIST has its digits.
    """
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # n, 1, 8, 8; grey levels were 0 to 16
    images = F.interpolate(images, size=(20, 20), mode="bilinear").round_().to(torch.uint8)[:, 0]
    images = F.pad(images, (4, 4, 4, 4))  # n, 28, 28
    labels = torch.from_numpy(digits.target).long()
    # the same test set for every seed: runs with different seeds can be compared
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[rows], labels[rows]) for rows in (order[360:], order[:360])]


def load_data(dataset, folder):
    """(name of the data set, [training set, test set]); auto falls back to the digits, and says so."""
    try:
        return ("digits", load_digits()) if dataset == "digits" else ("mnist", load_mnist(folder))
    except ConnectionError as e:
        if dataset == "mnist":
            raise InputError(f"{e}, or use --dataset digits") from e
        print("!" * 100 + f"\nWARNING: {e}.\nThis run trains on scikit-learn's 1,797 small digits instead:")
        print("none of its results are MNIST's.\n" + "!" * 100, flush=True)
        return "digits", load_digits()


def split(images, labels, seed):
    """A random 90 % for training and 10 % for validation; InputError for fewer than ten images."""
    if len(images) < 10:
        raise InputError(f"{len(images)} training images are too few to keep a tenth for validation")
    # a generator of its own: the split stays the same, whatever else draws random numbers before
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    tenth = len(order) // 10
    return [(images[rows], labels[rows]) for rows in (order[tenth:], order[:tenth])]


def to_input(images):
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28], MNIST's mean 0 and variance 1, batch innermost."""
    fits = isinstance(images, torch.Tensor) and images.dtype == torch.uint8
    fits = fits and images.dim() == 3 and images.shape[1:] == (28, 28)
    check(fits, "to_input: expected a uint8 tensor [N, 28, 28], with grey levels from 0 to 255")
    x = images.permute(1, 2, 0).contiguous().float()  # 28, 28, N
    return x.div_(255).sub_(0.1307).div_(0.3081)[None].permute(3, 0, 1, 2)


def batches(images, labels, size, generator, shift):
    """One epoch of (x, y): every sample once, in random order, moved by up to `shift` pixels each way."""
    # windows[n, top, left] is image n moved by (shift - top, shift - left): a view, so it costs no memory
    windows = F.pad(images, (shift,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)  # n, 2·shift+1, 2·shift+1, 28, 28
    order = torch.randperm(len(images), generator=generator).to(images.device)
    top, left = torch.randint(2 * shift + 1, (2, len(images)), generator=generator).to(images.device)
    for rows, i, j in zip(order.split(size), top.split(size), left.split(size)):
        yield to_input(windows[rows, i, j]), labels[rows]


# ---------------------------------------------------------------------------------------------- training


def learning_rate(step, steps, peak, schedule):
    """One-cycle (Smith 2018, arXiv 1803.09820): linearly up over the first tenth, then linearly to zero."""
    if schedule == "constant":
        return peak
    # the peak rate could throw random weights far off at the start, and would not settle at the end
    return peak * min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))


def train_epoch(model, optimizer, data, rates, epoch=1):
    """One pass over the batches of `data`, with a learning rate for each step; returns (loss, accuracy).

    Raises FloatingPointError naming the step and epoch if the loss is not finite.
    """
    criterion, losses, hits, sizes = CrossEntropy(), [], [], []
    for rate, (x, y) in zip(rates, data, strict=True):
        optimizer.lr = rate
        logits = model(x)
        losses.append(criterion(logits, y))
        criterion.backward()  # sets logits.g
        model.backward(logits, input_grad=False)  # sets W.g, w.g and b.g
        optimizer.step()
        hits.append((logits.argmax(1) == y).sum())  # stays on the device: reading it would wait for a GPU
        sizes.append(len(y))
    losses = torch.stack(losses).tolist()
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            where = f"at step {step} of epoch {epoch}"
            raise FloatingPointError(f"the loss is {loss} {where}: try a smaller --lr")
    total = sum(loss * n for loss, n in zip(losses, sizes))  # a smaller last batch weighs less
    return total / sum(sizes), int(sum(hits)) / sum(sizes)


def evaluate(model, images, labels):
    """(mean loss, accuracy in 0..1, logits [n, 10]) of uint8 images [n, 28, 28]."""
    # in chunks: im2col holds every pixel nine times
    logits = torch.cat([model(to_input(chunk)) for chunk in images.split(1000)])
    hits = int((logits.argmax(1) == labels).sum())
    return float(CrossEntropy()(logits, labels)), hits / len(labels), logits


def named(model, prefix=""):
    """The parameters by name: the layer's number in its Sequential and the attribute, as 0.W or 2.1.b; for
    one that is not the layer's own attribute, its place in parameters()."""
    found = {}
    for i, layer in enumerate(model.layers):
        if isinstance(layer, Sequential):
            found |= named(layer, f"{prefix}{i}.")
        else:
            names = {id(value): name for name, value in vars(layer).items()}
            for j, p in enumerate(layer.parameters()):
                found[f"{prefix}{i}.{names.get(id(p), j)}"] = p
    return found


@torch.no_grad()
def fit(model, train, val, args, out):
    """Trains, and leaves the model with the weights of the best epoch on validation (the first of equals).

    Writes log.csv into the folder `out` after every epoch, and best.pt after each new best one. Returns
    the log: a dict for each epoch.
    """
    course = args.schedule == "constant"  # the course's recipe: no Nesterov, no weight decay, no shifts
    decay, shift = (0, 0) if course else (WEIGHT_DECAY, 1)
    sgd = SGD(model.parameters(), args.lr, args.momentum, not course and args.momentum > 0, decay)
    generator = torch.Generator().manual_seed(args.seed)
    per_epoch, epochs = math.ceil(len(train[0]) / args.batch_size), 1 if args.dry_run else args.epochs
    best, log, start = -1, [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        began, steps = time.perf_counter(), range((epoch - 1) * per_epoch, epoch * per_epoch)
        rates = [learning_rate(k, epochs * per_epoch, args.lr, args.schedule) for k in steps]
        data = batches(*train, args.batch_size, generator, shift)
        loss, accuracy = train_epoch(model, sgd, data, rates, epoch)
        seconds = time.perf_counter() - began
        val_loss, val_accuracy, _ = evaluate(model, *val)
        if not math.isfinite(val_loss):  # training losses predate their step: none shows the last
            raise FloatingPointError(f"the loss is {val_loss} after epoch {epoch}: try a smaller --lr")
        row = dict(epoch=epoch, train_loss=loss, train_accuracy=accuracy, val_loss=val_loss)
        row |= dict(val_accuracy=val_accuracy, lr=rates[-1], seconds=seconds, best=int(val_accuracy > best))
        log.append(row)
        if row["best"]:
            # copies: the optimizer keeps changing the parameters in place
            best, weights = val_accuracy, {name: p.to("cpu", copy=True) for name, p in named(model).items()}
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            write_file(out / "best.pt", buffer.getvalue())
        report_epoch(out, log, epochs, (time.perf_counter() - start) / epoch * (epochs - epoch))
    for name, p in named(model).items():
        p.copy_(weights[name])
    return log


def report_epoch(out, log, epochs, eta):
    """Writes the log as log.csv, and prints its last row."""
    table, row = io.StringIO(), log[-1]
    writer = csv.DictWriter(table, row, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    write_file(out / "log.csv", table.getvalue().encode())
    train, val = (f"{k} loss {row[f'{k}_loss']:.4f} acc {row[f'{k}_accuracy']:.2%}" for k in ("train", "val"))
    times = f"lr {row['lr']:.1e} | {duration(row['seconds'])} | eta {duration(eta)}"
    best = " | best" if row["best"] else ""
    print(f"epoch {row['epoch']:2d}/{epochs} | {train} | {val} | {times}{best}", flush=True)


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.1f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


# ---------------------------------------------------------------------------------------------- pictures


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def save_grid(path, images, titles, heading):
    """Images uint8 [n, 28, 28] in rows of eight, a title above each."""
    rows = max(1, math.ceil(len(images) / 8))
    figure = Figure(figsize=(9.2, 1.4 * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(rows, 8, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")  # also where the last row has no image
    for axes, image, title in zip(grid, images, titles):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
    save_figure(figure, path)


def save_curves(path, title, log):
    figure, epochs = Figure(figsize=(9.2, 3.6), layout="constrained"), [row["epoch"] for row in log]
    figure.suptitle(title, fontsize=11)
    # blue and vermilion of Okabe and Ito's palette: colour-blind safe; the markers differ even in grey
    train = "train", "training, mean over the epoch", "o--", "#0072B2"
    val = "val", "validation, after the epoch", "s-", "#D55E00"
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for name, label, style, colour in (train, val):
            axes.plot(epochs, [row[f"{name}_{key}"] for row in log], style, color=colour, ms=5, label=label)
        axes.set(xlabel="epoch", ylabel=key, xlim=(0.5, len(log) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend()
        axes.grid(alpha=0.3)
        if key == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    save_figure(figure, path)


def save_filters(path, title, model, image, label):
    """What build_cnn()'s convolutions have learnt, and what they make of one digit, uint8 [28, 28].

    Draws nothing for another network.
    """
    kinds = [type(layer) for layer in model.layers[:6]]
    sizes = [len(p) for p in model.parameters() if p.dim() == 4]  # output channels of the convolutions
    if kinds != 2 * [Conv2D, ReLU, MaxPool2D] or sizes != [8, 16]:
        return
    x, maps = to_input(image[None]), []
    for layer in model.layers[:6]:  # one by one: model(x) would run the pooling before ReLU
        x = layer(x)
        maps.append(x[0].cpu())
    filters = model.layers[0].W[:, 0].cpu()  # 8, 3, 3
    limit = float(filters.abs().max())
    figure = Figure(figsize=(9.2, 6.2), layout="constrained")
    figure.suptitle(f"{title}: what the filters have learnt", fontsize=13)
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 8))
    axes = left.add_subplot(xticks=[], yticks=[])
    axes.set_title(f"test digit {label}\n(28×28)", fontsize=12)
    axes.imshow(image.cpu(), cmap="gray")
    first = f"first layer: its 3×3 filters, weights from {-limit:.1f} (red) to {limit:.1f} (blue)"
    match = "what each filter makes of the digit, after ReLU (28×28): bright is large"
    second = "second layer: each map combines all eight above, after ReLU and pooling (7×7)"
    rows = (first, filters, "RdBu", -limit), (match, maps[1], "gray", 0), (second, maps[5], "gray", 0)
    parts = right.subfigures(3, 1, height_ratios=(1, 1, 1.85))
    for part, (heading, images, colours, low) in zip(parts, rows):
        part.suptitle(heading, fontsize=12)
        for axes, picture in zip(part.subplots(len(images) // 8, 8).flat, images):
            # one scale for all of a row: on a scale of its own, a filter that finds nothing would look busy
            axes.imshow(picture, cmap=colours, vmin=low, vmax=float(images.abs().max()))
            axes.set(xticks=[], yticks=[])
    save_figure(figure, path)


def save_pictures(out, title, model, train, test, logits, log):
    """Draws PICTURES; logits: the trained model's, on the test set."""
    save_grid(out / "samples.png", train[0][:32].cpu(), train[1][:32].tolist(), f"{title}: training samples")
    save_curves(out / "curves.png", title, log)
    save_filters(out / "filters.png", title, model, test[0][0], int(test[1][0]))

    images, labels = (t.cpu() for t in test)
    p, guess = logits.cpu().softmax(1).max(1)
    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    axes = figure.add_subplot(title=f"{title}: test set")
    show = metrics.ConfusionMatrixDisplay.from_predictions
    show(labels, guess, labels=range(10), cmap="Blues", ax=axes, colorbar=False)
    save_figure(figure, out / "confusion.png")

    wrong = (guess != labels).nonzero()[:, 0]
    worst = wrong[p[wrong].argsort(descending=True, stable=True)][:32]
    titles = [f"{int(labels[k])} → {int(guess[k])} ({float(p[k]):.0%})" for k in worst]
    heading = f"{title}: {len(worst)} of {len(wrong)} mistakes, surest first: true → predicted (probability)"
    save_grid(out / "mistakes.png", images[worst], titles, heading)


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


def read_digit(path):
    """A picture's digit, placed as in MNIST: uint8 [28, 28], and a warning or None."""
    square, warning = find_ink(crop_to_sheet(open_picture(path)), path)
    image = np.pad(np.asarray(square.resize((20, 20), Image.Resampling.BICUBIC), np.float32), 4)
    shift = np.rint(13.5 - np.array(ndimage.center_of_mass(image))).clip(-4, 4).astype(int)
    image = np.roll(image, shift, (0, 1))  # its centre of mass in the middle
    return torch.from_numpy(image * (255 / image.max())).round().byte(), warning


@torch.no_grad()
def load_weights(path, model):
    """A run's best.pt into the model; InputError if it is something else, or damaged."""
    try:
        content = Path(path).read_bytes()
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load doesn't verify checksums
            raise ValueError("a checksum does not fit")
        weights = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        if "model" in weights:
            raise ValueError("it is resnet18.py's")
        shapes = [{name: list(p.shape) for name, p in some.items()} for some in (weights, named(model))]
        if shapes[0] != shapes[1]:
            raise ValueError("it has {}, the model {}".format(*shapes))
        for name, p in named(model).items():
            p.copy_(weights[name])
    except Exception as e:  # unpickling fails in many ways
        raise InputError(f"--checkpoint: {path} can't be used ({one_line(e, 400)})") from e


def predict(args):
    """Prints a line for every picture; returns the exit status, 2 if one of them could not be read."""
    device, status = choose_device(args.device), 0
    model = build_cnn(device)
    load_weights(args.checkpoint, model)
    with contextlib.suppress(OSError):
        if is_of_digits(Path(args.checkpoint).parent):
            print("warning: trained on scikit-learn's small digits, this network often misreads photographs")
    for path in args.predict:
        try:
            image, warning = read_digit(path)
        except InputError as e:  # the other pictures may be good
            print(f"error: {e}", file=sys.stderr, flush=True)
            status = 2
            continue
        p = model(to_input(image[None].to(device))).softmax(1)[0].tolist()
        if max(p) < 0.5:
            warning = f"{warning}; low confidence" if warning else "low confidence"
        line = f"{path}: {np.argmax(p)} | " + "  ".join(f"{k} {share:.1%}" for k, share in enumerate(p))
        print(line + (f" | warning: {warning}" if warning else ""), flush=True)
    return status


# ---------------------------------------------------------------------------------------------- the run

PICTURES = ("samples.png", "curves.png", "filters.png", "confusion.png", "mistakes.png")
RUN_FILES = {"args.json", "log.csv", "metrics.json", "best.pt", *PICTURES}
BEFORE = {"code", "commit", ".lock"}  # what a batch job puts there before the run, and the lock


def write_file(path, content):
    """Writes bytes, or other content as JSON, atomically; InputError if that is not possible."""
    if not isinstance(content, bytes):
        content = (json.dumps(content, indent=1) + "\n").encode()
    temporary = path.with_suffix(".tmp")  # renamed when it is complete
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())  # else a power cut could leave the new name without the content
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):  # half a file would keep a full disk full
            temporary.unlink()
        raise InputError(f"--out: {path} can't be written ({e.strerror})") from e


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


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name, True):
        raise InputError(f"--device {name}: {name} is not available here; use --device auto")
    return DEVICE if name == "auto" else torch.device(name)


def seed_everything(seed, deterministic):
    """For initial weights; split and order have their own generators."""
    torch.manual_seed(seed)
    if deterministic:  # cuBLAS is deterministic only with this workspace
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def finished(out, arguments):
    """Whether `out` holds a finished run of the same arguments; InputError if a run can't go there."""
    try:
        names = {path.name for path in out.iterdir() if path.suffix != ".tmp"} if out.exists() else set()
        names -= BEFORE
        before = json.loads((out / "args.json").read_text()) if "args.json" in names else {}
        given = {key: value for key, value in arguments.items() if value is not None}
        # with auto, the defaults depend on which data set was found
        sets = [name for name in DEFAULTS if arguments["dataset"] in (name, "auto")]
        possible = [DEFAULTS[name] | given for name in sets]
        arguments = next((one for one in possible if one.items() <= before.items()), possible[0])
        if "args.json" in names and not arguments.keys() <= before.keys():
            raise ValueError(f"args.json lacks {', '.join(sorted(arguments.keys() - before.keys()))}")
        other = [f"--{k} {before.get(k)} there, {v} now" for k, v in arguments.items() if before.get(k) != v]
    except (OSError, ValueError, AttributeError) as e:  # no folder; no JSON; JSON, but not a dict
        raise InputError(f"--out {out} can't be used ({one_line(e, 80)})") from e
    foreign = sorted(names - RUN_FILES if before else names)
    if foreign:
        text = f"other files ({', '.join(foreign[:3])})" + ("" if before else " and no args.json")
        raise InputError(f"--out {out} holds {text}: name a new --out")
    if before and other:
        other = "; ".join(other).replace("_", "-")
        raise InputError(f"--out {out} holds a run with other arguments: {other}; name a new --out")
    return "metrics.json" in names


def is_of_digits(out):
    """Whether a finished run was on the digits, even if its metrics.json is damaged elsewhere."""
    return b'"dataset": "digits"' in (out / "metrics.json").read_bytes()


def claim_folder(out, arguments):
    """Makes the folder; returns a lock that keeps other runs out of it until it is closed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
    except OSError as e:
        raise InputError(f"--out {out} can't be written ({e.strerror})") from e
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"another run is writing into {out}: name another --out") from e
    except OSError as e:  # some network file systems have no locks
        print(f"warning: {out} can't be locked ({e.strerror}): use it for one run only", flush=True)
    if finished(out, arguments):  # asked again, as another run may have had the lock until now
        raise InputError(f"another run has just finished in {out}")
    if (out / "args.json").exists():
        print(f"{out} holds an unfinished run: training starts again")
    return lock


def run(args):
    """Data, training, the test set once, and the results in args.out; returns the exit status."""
    began = time.perf_counter()
    out = Path(args.out or f"results/cnn-{datetime.now():%Y%m%d-%H%M%S}")
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "data_dir", "predict", "checkpoint")}
    if finished(out, arguments):
        dataset = "digits" if is_of_digits(out) else "mnist"
        print(f"finished before, on {dataset}, nothing to do: {out} (delete the folder to train again)")
        return 0
    device = choose_device(args.device)
    seed_everything(args.seed, args.deterministic)
    dataset, (train, test) = load_data(args.dataset, args.data_dir)
    for key, value in DEFAULTS[dataset].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    train, val = split(*train, args.seed)
    size = args.batch_size if args.dry_run else None
    train, val, test = ([t[:size].to(device) for t in pair] for pair in (train, val, test))
    model = build_cnn(device)
    with claim_folder(out, arguments):
        write_file(out / "args.json", arguments | {"epochs": args.epochs, "lr": args.lr})
        dry = "DRY RUN, one batch: " if args.dry_run else ""
        print(f"{dry}{dataset}: {len(train[0])} train, {len(val[0])} validation, {len(test[0])} test images")
        print(f"{device_name(device)} | torch {torch.__version__} | seed {args.seed} | {out}", flush=True)
        log = fit(model, train, val, args, out)
        test_loss, test_accuracy, logits = evaluate(model, *test)
        title = f"{dataset}, seed {args.seed}" + (", dry run" if args.dry_run else "")
        save_pictures(out, title, model, train, test, logits, log)
        best, params = next(row for row in reversed(log) if row["best"]), model.parameters()
        train_seconds, total_seconds = sum(row["seconds"] for row in log), time.perf_counter() - began
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        results = dict(dataset=dataset, seed=args.seed, dry_run=args.dry_run, epochs=len(log))
        results |= dict(batch_size=args.batch_size, samples_per_epoch=len(train[0]), command=command)
        results |= dict(device=device_name(device), torch=torch.__version__, git_commit=git_commit())
        results |= dict(trainable_params=sum(p.numel() for p in params), best_epoch=best["epoch"])
        results |= dict(train_seconds=train_seconds, total_seconds=total_seconds)
        results |= dict(val_accuracy=best["val_accuracy"], test_accuracy=test_accuracy, test_loss=test_loss)
        write_file(out / "metrics.json", results)  # last: without it, a run is unfinished
    print(f"training {duration(train_seconds)}, in all {duration(total_seconds)}; results in {out}")
    chosen = f"with the weights of epoch {best['epoch']} (best on validation: {best['val_accuracy']:.2%})"
    print(f"{dry}{dataset} test, once, {chosen}: accuracy {test_accuracy:.2%}, loss {test_loss:.4f}")
    return 0


# ---------------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Trains the CNN on MNIST, or reads digits with a trained one."
    )
    default = " (default: %(default)s)"  # argparse fills it in
    add = parser.add_argument_group("data").add_argument
    text = "auto: MNIST, or scikit-learn's digits if it can't be downloaded" + default
    add("--dataset", choices=("auto", "mnist", "digits"), default="auto", help=text)
    add("--data-dir", default="data", metavar="DIR", help="folder of the data sets" + default)
    add = parser.add_argument_group("recipe").add_argument
    by_set = " (default: {} on MNIST, {} on digits)".format
    text = "passes over the training set" + by_set(*(values["epochs"] for values in DEFAULTS.values()))
    add("--epochs", type=int, help=text)
    add("--batch-size", type=int, default=64, help="images per step" + default)
    text = "learning rate (onecycle: the peak)" + by_set(*(values["lr"] for values in DEFAULTS.values()))
    add("--lr", type=float, help=text)
    add("--momentum", type=float, default=0.9, help="SGD's momentum" + default)
    text = "onecycle: with weight decay, Nesterov, shifts by up to 1 px; constant: a fixed rate without"
    text += default
    add("--schedule", choices=("onecycle", "constant"), default="onecycle", help=text)
    add(
        "--seed", type=int, default=0, help="seed of the split, the initial weights and the batches" + default
    )
    add = parser.add_argument_group("run").add_argument
    text = "auto: cuda, else cpu; mps (no float64) only if named" + default
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    add("--out", metavar="DIR", help="results folder (default: results/cnn-<timestamp>)")
    add("--deterministic", action="store_true", help="bit-exact repeats, on CUDA too")
    add("--dry-run", action="store_true", help="run everything on one batch")
    add = parser.add_argument_group("prediction").add_argument
    text = "pictures or photographs of one digit each, dark on light or light on dark"
    add("--predict", nargs="+", metavar="IMAGE", help=text)
    add("--checkpoint", metavar="FILE", help="best.pt of a run, for --predict")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):
    # argparse reads "--seed=--" as a flag without a value; "--out $OUT" may come from an unset variable
    if any(value in ([], "", [""]) for value in vars(args).values()):
        parser.error("a flag's value is empty or --")
    limits = {"epochs": (1, 2**31), "batch_size": (1, 2**31), "momentum": (0, 1), "seed": (-(2**63), 2**64)}
    limits["lr"] = 1e-38, 1e38  # float32 begins and ends there
    for name, (least, end) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value < end:  # this way round, nan is refused, too
            name = name.replace("_", "-")
            parser.error(f"--{name} is {value}: expected at least {least} and less than {end}")
    if (args.predict is None) != (args.checkpoint is None):
        parser.error("--predict IMAGE... and --checkpoint FILE go together")


def guard_streams():
    """Nothing that is printed may end a run: stdout or stderr may be closed, or take only ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    guard_streams()
    try:
        args = parse(argv)
        status = predict(args) if args.predict else run(args)
        sys.stdout.flush()  # here, where an error can still be caught
        return status
    except (InputError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, MemoryError) or "out of memory" in str(e) or "allocate memory" in str(e)):
            raise
        print("error: out of memory, try a smaller --batch-size", file=sys.stderr)
        return 1
    except OSError as e:
        # mostly from print(): the pipe's reader is gone (`| head`), or a disk is full. Python flushes
        # stdout once more when it exits, and would complain of the same error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(e, BrokenPipeError):
            return 141  # what a shell shows for a program that SIGPIPE ended
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
