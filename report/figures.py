"""The figures that tables.py has drawn, from plain numbers."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"))  # also for the colour-blind
WIDTH = 6.85  # inches of the report's page: figures are drawn as large as they are printed


def draw_curves(path, lines):
    """Loss and accuracy over the epochs; a line is (label, rows of log.csv, which may be missing)."""
    columns = "train_loss", "val_loss", "train_accuracy", "val_accuracy"
    titles = "training loss", "validation loss", "training accuracy (%)", "validation accuracy (%)"
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    for ax, column, title in zip(figure.subplots(2, 2).ravel(), columns, titles):
        scale = 100 if "accuracy" in column else 1
        for (label, rows), (colour, marker) in zip(lines, STYLES):
            if rows:
                values = [scale * float(row[column]) for row in rows]
                style = {"color": colour, "marker": marker, "ms": 4, "lw": 1}
                style["zorder"] = 9 - len(ax.lines)  # first on top: the first stage of gradual is the probe
                ax.plot(range(1, len(values) + 1), values, label=label, **style)
        ax.set_xlabel("epoch")
        ax.set_ylabel(title, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def draw_compute(path, points, key=True):
    """Test accuracy over training time of (name, style, minutes, accuracy, deviation or None).

    The points have numbers, with a key below, or their names beside them.
    """
    figure, labels = Figure(figsize=(WIDTH, 4.6 if key else 3.6), layout="constrained"), []
    ax = figure.subplots()
    for number, (name, style, *point, deviation) in enumerate(points, 1):
        colour, marker = STYLES[style]
        ax.errorbar(*point, deviation, ecolor=colour, capsize=2)
        ax.plot(*point, marker, color=colour, label=f"{number}  {name}")
        labels.append((str(number) if key else name.replace(", ", "\n", 1), *point, deviation or 0))
    ax.set(xscale="log", xlabel="training time (minutes, logarithmic)", ylabel="test accuracy (%)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(y=0.12)
    ax.grid(alpha=0.3)
    if key:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    place_labels(ax, labels)
    figure.savefig(path, dpi=150)


def place_labels(ax, labels):
    """Writes each (text, x, y, deviation) on the side of its point where it covers the fewest others."""
    ax.figure.draw_without_rendering()  # now the points are where they stay
    low, high = (ax.transData.transform([(x, y + k * d) for _, x, y, d in labels]) for k in (-1, 1))
    taken = [Bbox(corners) for corners in zip(low - 5, high + 5)]
    for text, *point, _ in labels:
        tries = []
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            style = {
                "ha": ("center", "left", "right")[x],
                "va": ("center", "bottom", "top")[y],
                "fontsize": 8,
            }
            note = ax.annotate(text, point, (6 * x, 6 * y), textcoords="offset points", **style)
            box = note.get_window_extent()
            outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1
            tries.append((box.count_overlaps(taken) + 9 * outside, len(tries), box, note))
        tries.sort()
        taken.append(tries[0][2])
        for *_, note in tries[1:]:
            note.remove()


def draw_confusion(path, rows, columns, share):
    """A part of a confusion matrix, in percent of the true class."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    ax = figure.subplots()
    ax.imshow(share, cmap="cividis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share):
        if value >= 1:
            colour = "black" if value > 55 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    # in a typeface that tells 1, l and I apart
    ax.set_xticks(range(len(columns)), columns, fontfamily="monospace")
    ax.set_yticks(range(len(rows)), rows, fontfamily="monospace")
    ax.set(xlabel="predicted", ylabel="true class, and its F1")
    figure.savefig(path)
