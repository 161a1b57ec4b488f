"""The network of build_cnn() and its training step the way a user of torch.nn writes them, and their timing.

    python report/torch_mnist.py --batch-size 64 640 --layout channels_last

prints one line per batch size: `batch 64: 2.39 ms a step`. Nothing of cnn_from_scratch.py is used here.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def random_batch(size, device="cpu"):
    """Random pixels and labels in MNIST's format: uint8 [size, 28, 28] and int64 [size]."""
    torch.manual_seed(0)
    images, labels = torch.randint(256, (size, 28, 28), dtype=torch.uint8), torch.randint(10, (size,))
    return images.to(device), labels.to(device)


def training_step(images, labels, layout):
    """A function that makes one training step on this batch."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, 10)),
    ).to(images.device, memory_format=LAYOUTS[layout])
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    x = ((images[:, None] / 255 - 0.1307) / 0.3081).to(memory_format=LAYOUTS[layout])

    def step():
        sgd.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        sgd.step()

    return step


def median_ms(step, steps, warm_up=10):
    """Median milliseconds of `steps` calls; the first calls, which allocate memory, are left out."""
    times = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[warm_up:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a training step with torch.nn.")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], help="default: 64")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="default: NCHW")
    parser.add_argument("--steps", type=int, default=50, help="per batch size (default: 50)")
    args = parser.parse_args()
    for size in args.batch_size:
        step = training_step(*random_batch(size), args.layout)
        print(f"batch {size}: {median_ms(step, args.steps):.2f} ms a step", flush=True)
