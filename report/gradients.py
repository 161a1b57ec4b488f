"""What the report shows of the hand-written gradients, computed by the layers of cnn_from_scratch.py.

python report/gradients.py OUT    gradients.tex (a worked example, the check's numbers) and gradients.pdf
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import STYLES, WIDTH

import cnn_from_scratch as c

FLOAT64 = {"device": "cpu", "dtype": torch.float64}


def worked_example():
    """A 3 × 3 image and a 2 × 2 kernel through Conv2D: name -> LaTeX of its matrices."""
    conv = c.Conv2D(1, 1, 2, **FLOAT64)
    x = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    conv.W.copy_(torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]))
    conv.b.fill_(3.0)
    y = conv(x)
    y.g = torch.tensor([[[[1.0, 0.0], [2.0, -1.0]]]], dtype=torch.float64)
    conv.backward()
    shown = {
        "x": x[0, 0],
        "cols": y.cols,
        "w": conv.W.reshape(1, 4),
        "b": conv.b[None],
        "y": y.reshape(1, 4),
        "dy": y.g.reshape(1, 4),
        "dw": conv.W.g.reshape(1, 4),
        "db": conv.b.g[None],
        "dx": x.g[0, 0],
        "dcols": conv.W.reshape(4, 1) @ y.g.reshape(1, 4),
    }
    return {f"example/{name}": matrix(values.tolist()) for name, values in shown.items()}


def matrix(values):
    rows = r" \\ ".join(" & ".join(f"{v + 0.0:g}" for v in row) for row in values)
    return rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"


def gradient_check(step=1e-6):
    """Name -> (hand-written, numeric) gradients of a small network's parameters and of its input.

    The numeric ones are central differences. Padding, a stride and overlapping pooling windows take part.
    """
    torch.manual_seed(0)
    conv, linear = c.Conv2D(2, 3, 3, stride=2, padding=1, **FLOAT64), c.Linear(27, 5, **FLOAT64)
    model = c.Sequential(conv, c.ReLU(), c.MaxPool2D(2, stride=1), c.Flatten(), linear)
    x, targets, loss_of = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.arange(4), c.CrossEntropy()
    for b in (conv.b, linear.b):
        b.normal_()  # not zero, as at the start of a training

    logits = model(x)
    loss_of(logits, targets)
    loss_of.backward()
    model.backward(logits)

    tensors = {
        "Conv2D, W": conv.W,
        "Conv2D, b": conv.b,
        "Linear, w": linear.w,
        "Linear, b": linear.b,
        "input": x,
    }
    pairs = {}
    for name, tensor in tensors.items():
        values, numeric = tensor.view(-1), []
        for k, value in enumerate(values.tolist()):
            losses = []
            for moved in (value + step, value - step):
                values[k] = moved
                losses.append(loss_of(model(x), targets).item())
            values[k] = value
            numeric.append((losses[0] - losses[1]) / (2 * step))
        pairs[name] = tensor.g.flatten(), torch.tensor(numeric, dtype=torch.float64)
    return pairs


def deviation(written, numeric):
    """The largest one, as LaTeX."""
    factor, exponent = f"{(written - numeric).abs().max():.0e}".split("e")
    return rf"${factor} \cdot 10^{{{int(exponent)}}}$"


def draw(path, pairs):
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    ax = figure.subplots()
    for (name, (written, numeric)), (colour, marker) in zip(pairs.items(), (*STYLES, ("#000000", "v"))):
        label = f"{name}: {len(written)} values,\nat most {deviation(written, numeric)} apart"
        ax.plot(written, numeric, marker, mfc="none", color=colour, ms=5, label=label)
    ax.axline((0, 0), slope=1, color="#999999", lw=1, zorder=0)
    ax.set(xlabel="hand-written gradient", ylabel="numeric gradient", aspect="equal")
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), fontsize=9, frameon=False, labelspacing=0.8)
    figure.savefig(path)


def numbers_of(pairs):
    r"""Name -> LaTeX of what report.tex shows by \R{name}."""
    written, numeric = (torch.cat(gradients) for gradients in zip(*pairs.values()))
    return {"check/values": len(written), "check/deviation": deviation(written, numeric)} | worked_example()


def main(out):
    pairs = gradient_check()
    draw(out / "gradients.pdf", pairs)
    lines = [rf"\expandafter\def\csname r:{k}\endcsname{{{v}}}" for k, v in numbers_of(pairs).items()]
    (out / "gradients.tex").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
