"""Training speed of both tasks, compared with torch.nn; `python tests.py bench` runs this file.

    python report/bench.py                                  # both, each in its own process
    python report/bench.py cnn                              # task 1: about five minutes on two cores
    python report/bench.py cnn --rounds 3 --batch-size 64   # a quick look
    python report/bench.py resnet                           # task 2

A step of the CNN is compared twice. "As users run it": every contestant is a process of its own, so that the
C library's allocator counts too, with its default setting for torch.nn and the one that our Sequential makes
for us. "Kernel for kernel": all contestants share one process and so that setting.
"""

import argparse
import contextlib
import io
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torch_mnist
import torchvision
from torch_mnist import LAYOUTS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cnn_from_scratch as c  # noqa: E402 - both scripts are one folder up
import resnet18 as r  # noqa: E402

# ---------------------------------------------------------------------------------------------- the CNN


def our_step(images, labels):
    """A function that makes one training step on this batch with our layers."""
    model, criterion, x = c.build_cnn(images.device), c.CrossEntropy(), c.to_input(images)
    sgd = c.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step():
        logits = model(x)
        criterion(logits, labels)
        criterion.backward()
        model.backward(logits, input_grad=False)
        sgd.step()

    return step


def bench_ours(args):
    """Our counterpart of torch_mnist.py, with the same data, timing and output."""
    for size in args.batch_size:
        step = our_step(*torch_mnist.random_batch(size))
        print(f"batch {size}: {torch_mnist.median_ms(step, args.steps):.2f} ms a step", flush=True)


def bench_cnn(args):
    """On a GPU, if there is one, only the second comparison, first of all; then both on the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # float32 for everyone
    print(f"{c.device_name(torch.device('cpu'))}, torch {torch.__version__}, float32")
    print("build_cnn(), SGD with Nesterov and weight decay: ms per training step; speed is the time of")
    print("torch.nn's faster layout over ours", flush=True)
    if torch.cuda.is_available():
        kernel_for_kernel(torch.device("cuda"), sorted(args.batch_size))
    as_users_run_it(sorted(args.batch_size), args.rounds, args.steps)
    kernel_for_kernel(torch.device("cpu"), sorted(args.batch_size))


def as_users_run_it(sizes, rounds, steps):
    """Separate processes take turns; speed compares times of the same round, when the machine was as busy."""
    scripts = {name: ("torch_mnist.py", "--layout", name) for name in LAYOUTS}
    scripts["ours"] = ("bench.py", "ours")
    # a process measures all sizes, the smallest first: the allocator adapts to the largest block so far
    flags = ["--steps", str(steps), "--batch-size", *map(str, sizes)]
    names, ms = list(scripts), {name: [] for name in scripts}
    for k in range(rounds):
        for name in names[k % 3 :] + names[: k % 3]:  # everyone gets to be first
            script, *options = scripts[name]
            command = [sys.executable, HERE / script, *options, *flags]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            ms[name].append([float(found) for found in re.findall(r"([\d.]+) ms", output)])
    ms = {name: np.array(times) for name, times in ms.items()}  # rounds, sizes
    speed = np.minimum(*(ms[name] for name in LAYOUTS)) / ms["ours"]

    def spread(values, unit=""):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        return f"{middle:.2f}{unit} ({low:.2f}-{high:.2f})"

    print(f"\nas users run it: a process each, {rounds} rounds; medians and quartiles, speed within rounds")
    print(f"{'batch':>9} {'torch NCHW':>21} {'channels_last':>21} {'ours':>21} {'speed':>19}")
    for k, size in enumerate(sizes):
        cells = " ".join(f"{spread(ms[name][:, k]):>21}" for name in names)
        print(f"{size:9d} {cells} {spread(speed[:, k], 'x'):>19}", flush=True)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs, device, rounds, block):
    """Median seconds of each of the runs, taken in turns, in blocks of a few."""
    times = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            synchronise(device)
            clock = time.perf_counter()
            for _ in range(block):
                run()
            synchronise(device)
            if k:  # the first round warms up
                times[name].append((time.perf_counter() - clock) / block)
    return {name: float(np.median(t)) for name, t in times.items()}


def kernel_for_kernel(device, sizes, rounds=40, block=5):
    """Everyone in this process: what is left is the difference between the kernels and their order."""
    print(f"\nkernel for kernel, {c.device_name(device)}: one process, interleaved blocks, medians")
    print(f"{'batch':>9} {'torch NCHW':>13} {'channels_last':>13} {'ours':>9} {'speed':>9}  of the faster")
    for size in sizes:
        batch = torch_mnist.random_batch(size, device)
        runs = {"ours": our_step(*batch)}  # first, because it changes the allocator setting
        runs |= {name: torch_mnist.training_step(*batch, name) for name in LAYOUTS}
        seconds = interleaved(runs, device, rounds if size < 300 else rounds // 2, block)
        ms = {name: 1000 * s for name, s in seconds.items()}
        best = min(LAYOUTS, key=ms.get)
        cells = f"{ms['NCHW']:13.2f} {ms['channels_last']:13.2f} {ms['ours']:9.2f}"
        print(f"{size:9d} {cells} {ms[best] / ms['ours']:8.2f}x  {best}", flush=True)


# ---------------------------------------------------------------------------------------------- ResNet-18


def images_per_second(step, batch, count=20):
    """Median rate of `count` steps, after two to warm up."""
    times = []
    for _ in range(count + 2):
        clock = time.perf_counter()
        step()
        times.append(time.perf_counter() - clock)
    return batch / float(np.median(times[2:]))


def usual_loop(trains, images, labels):
    """The step that people write: everything in the graph's way, float32, NCHW, BatchNorm as it comes."""
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Linear(512, 62)
    for name, p in model.named_parameters():
        p.requires_grad = trains == "all" or name.startswith(r.PARTS[trains].prefixes)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    x = r.prepare(images, 224).contiguous()

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def our_loop(trains, keep, images, labels, folder, *flags, layout=torch.channels_last):
    """One training step of resnet18.py on the same images, and its trainer."""
    flags = ["--image-size", "224", "--batch-size", str(len(labels)), "--device", "cpu", *flags]
    args = r.parse_args([*flags, *([] if keep else ["--cache-gb", "0"])])
    run = r.Run(args)
    run.out = folder
    run.settings = argparse.Namespace(**vars(args) | {"amp": r.choose_amp(args.amp, run.device)})
    sets = ("train", "val", "test")
    data = r.Data("random", r.CLASSES, dict.fromkeys(sets, images), dict.fromkeys(sets, labels))
    model = r.build_model(62, None, 0).to(memory_format=layout)
    regime = {"fc": "linear_probe", "layer4": "partial_unfreeze", "all": "full"}[trains]
    t = r.Trainer(run, data, model, r.stages_of(regime, run.settings), folder)
    with contextlib.redirect_stdout(io.StringIO()):
        t.inputs.compute(t.timer)
    t.head.train()
    order = torch.arange(t.n)

    def step():
        t.state.step = 0
        t.train_step(order)

    return step, t


def bench_resnet(batch=32, count=20, epochs=15):
    """The speed table, at 224 px on random images, against the usual loop in the same process."""
    images = torch.randint(0, 256, (batch, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 62, (batch,))
    print(f"{r.device_name(torch.device('cpu'))}, torch {torch.__version__}, 224 px, batch {batch}, images/s")
    with tempfile.TemporaryDirectory() as folder:
        usual = {k: images_per_second(usual_loop(k, images, labels), batch, count) for k in r.PARTS}
        ours = {}
        for trains, keep in (("fc", True), ("layer4", True), ("layer4", False), ("all", False)):
            step, t = our_loop(trains, keep, images, labels, Path(folder))
            ours[trains, keep] = images_per_second(step, batch, count)
        frozen, head = r.split_at(t.model.eval(), "fc", t.run.settings.amp)
        with torch.no_grad():
            forward = images_per_second(lambda: head(frozen(r.prepare(images, 224))), batch, count)
        data = images_per_second(lambda: r.prepare(images, 224), batch, count)
        techniques = {}
        for layout, amp in itertools.product((torch.channels_last, torch.contiguous_format), ("auto", "off")):
            with mock.patch.object(r, "layout", lambda device, layout=layout: layout):
                step, t = our_loop("all", False, images, labels, Path(folder), "--amp", amp, layout=layout)
                name = f"full, {t.run.settings.amp.replace('off', 'float32')}, {str(layout)[6:]}"
                techniques[name] = images_per_second(step, batch, count)
    probe = epochs / (1 / forward + epochs / ours["fc", True])  # one pass, then all epochs on what it gave
    rows = (
        (f"linear probe, {epochs} epochs in all", usual["fc"], probe),
        ("partial unfreeze, layer3 in memory", usual["layer4"], ours["layer4", True]),
        ("partial unfreeze, layer3 recomputed", usual["layer4"], ours["layer4", False]),
        ("full", usual["all"], ours["all", False]),
    )
    for name, before, after in rows:
        print(f"{name:36} usual {before:7.1f}  ours {after:7.1f}  {after / before:5.1f}x")
    for name, rate in techniques.items():
        print(f"{name:36} {rate:6.1f}")
    for name, key in (("recomputed layer3", ("layer4", False)), ("full", ("all", False))):
        print(f"share of a step outside the model, {name}: {ours[key] / data:.1%}")


# ---------------------------------------------------------------------------------------------- command line


def main(argv):
    parser = argparse.ArgumentParser(description="Training speed, compared with torch.nn.")
    names = "one of the two (default: both); ours: only our CNN, timed in this process as torch_mnist.py is"
    parser.add_argument("bench", nargs="?", choices=("resnet", "cnn", "ours"), help=names)
    add = parser.add_argument_group("cnn").add_argument
    add("--batch-size", type=int, nargs="+", default=[64, 128, 640], help="default: 64 128 640")
    add("--rounds", type=int, default=15, help="turns of every process (default: %(default)s)")
    add("--steps", type=int, default=50, help="per process and batch size (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.bench is None:
        for name in ("resnet", "cnn"):  # one process each: memory that one keeps would slow the other down
            subprocess.run([sys.executable, __file__, name, *argv], check=True)
    elif args.bench == "resnet":
        bench_resnet()
    else:
        {"cnn": bench_cnn, "ours": bench_ours}[args.bench](args)


if __name__ == "__main__":
    main(sys.argv[1:])
