"""A folder of runs becomes what the report and the README show, so that no number is typed by hand.

    python report/tables.py RESULTS OUT    numbers, tables and figures for report.tex, into OUT
    python report/tables.py --readme       README.md's tables and picture, from report/results

Runs are found by their metrics.json, whatever their folders are called. Beside them may lie bench.txt and
tests.txt (what "python tests.py bench" and "python tests.py" print) and a folder cluster (jobs' logs).
What is missing shows as n/a.
"""

import csv
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cnn_from_scratch as c  # noqa: E402 - for the worked example

REGIMES = ("linear_probe", "partial_unfreeze", "full", "gradual")
COLOURS = dict(zip(REGIMES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
MARKERS = dict(zip(REGIMES, "os^D", strict=True))
# characters drawn alike: most of those whose cases EMNIST's authors merge (by-merge), and zero and one
GROUPS = ("0Oo", "1Il", "Cc", "Jj", "Kk", "Mm", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")


# ---------------------------------------------------------------------------------------------- reading


def read_runs(results):
    """Finished runs below `results`, those of the CNN and those of ResNet-18, each a dict of its metrics."""
    cnn, resnet = [], []
    for path in sorted(results.rglob("metrics.json")):
        row = json.loads(path.read_text()) | {"folder": path.parent}
        told = next(
            (p / "args.json" for p in (path.parent, path.parent.parent) if (p / "args.json").exists()), None
        )
        told = json.loads(told.read_text()) if told else {}
        row["arguments"] = told.get("arguments", told)
        if row["arguments"].get("dry_run") or "checkpoint" in row:  # an --evaluate of a run that is here too
            continue
        if "regime" in row:
            resnet.append(row | {"images": row["samples_per_epoch"], "variant": variant(row)})
        else:
            cnn.append(row)
    return cnn, resnet


def variant(row):
    """What was switched on or off beside the regime and the size."""
    told = row["arguments"]
    words = ["augmented"] * bool(told.get("augment"))
    words += ["layer3 recomputed"] * (told.get("cache_gb") == 0)
    words += ["float32"] * (told.get("amp") == "off")
    return ", ".join(words)


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def grouped(rows, key):
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def resnet_groups(resnet):
    """Runs that differ in the seed alone, ordered by images, size, variant and regime."""

    def key(r):
        return (
            r["images"],
            r["image_size"],
            r["variant"],
            REGIMES.index(r["regime"]),
            r["dataset"],
            r["weights"],
        )

    return [rows for _, rows in sorted(grouped(resnet, key).items())]


def cnn_groups(cnn):
    """The default recipe, the course's and others: runs that differ in the seed alone."""

    def key(r):
        names = ("epochs", "batch_size", "lr", "momentum", "schedule")
        return r["dataset"], *(r["arguments"].get(k) for k in names)

    return grouped(cnn, key)


def recipe(key):
    _, epochs, size, lr, momentum, schedule = key
    if (epochs, size, lr, momentum, schedule) == (5, 64, 0.1, 0.9, "onecycle"):
        return "default"
    if (epochs, size, lr, momentum, schedule) == (5, 640, 0.01, 0, "constant"):
        return "course"
    return f"batch {size}, lr {lr}, momentum {momentum}, {schedule}, {epochs} epochs"


def runs_of(cnn, name):
    """A recipe's runs: those on MNIST where there are any, else on the digits; none: an empty list."""
    found = [(key[0] == "mnist", rows) for key, rows in cnn_groups(cnn).items() if recipe(key) == name]
    return max(found, key=lambda group: group[0])[1] if found else []


def mean_std(rows, key, scale=1.0):
    values = [row[key] * scale for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cost_of(rows):
    """Median seconds of training over the seeds."""
    return statistics.median(r["train_seconds"] for r in rows)


def difference(rows, base):
    """Points of test accuracy that a group gains on another, and its training time as a multiple."""
    points = mean_std(rows, "test_accuracy", 100)[0] - mean_std(base, "test_accuracy", 100)[0]
    return signed(points), f"{cost_of(rows) / cost_of(base):.1f}"


def best_of(groups):
    """The group that is best on validation."""
    return max(groups, key=lambda rows: mean_std(rows, "val_accuracy")[0])


def spread_of(rows, places):
    """Mean test accuracy in percent, with the standard deviation over seeds where there are several."""
    mean, std = mean_std(rows, "test_accuracy", 100)
    return f"{mean:.{places}f} %" + f" ± {std:.{places}f}" * (len(rows) > 1)


def signed(points):
    """One place after the point, with its sign; what rounds to nothing has none."""
    return f"{points:+.1f}" if abs(points) >= 0.05 else "0.0"


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# ---------------------------------------------------------------------------------------------- tables


def mnist_table(results):
    head = ["recipe", "seeds", "test accuracy", "lowest to highest", "training", "on"]
    table = [head]
    groups = sorted(cnn_groups(read_runs(results)[0]).items(), key=lambda item: recipe(item[0]) != "default")
    for key, rows in groups:
        values = [100 * r["test_accuracy"] for r in rows]
        name = {"default": "default, batch 64", "course": "the course's original"}.get(
            recipe(key), recipe(key)
        )
        name += " (DIGITS)" * (key[0] != "mnist")
        limits = f"{min(values):.2f} to {max(values):.2f} %"
        table.append(
            [name, str(len(rows)), spread_of(rows, 2), limits, f"{cost_of(rows):.1f} s", rows[0]["device"]]
        )
    return table


def emnist_table(results):
    head = ["images", "px", "regime", "seeds", "accuracy", "precision", "recall", "macro-F1"]
    table = [[*head, "trainable", "epochs", "training", "in all"]]
    for rows in resnet_groups(read_runs(results)[1]):
        one = rows[0]
        scores = [f"{mean_std(rows, f'test_{k}_macro')[0]:.3f}" for k in ("precision", "recall", "f1")]
        name = one["regime"] + f" ({one['variant']})" * bool(one["variant"])
        cells = [f"{one['images']:,}", str(one["image_size"]), name, str(len(rows))]
        cells += [spread_of(rows, 2), *scores]
        epochs = sorted({r["epochs_run"] for r in rows})
        cells += [
            f"{one['trainable_params']:,}",
            "–".join(str(e) for e in dict.fromkeys((epochs[0], epochs[-1]))),
        ]
        table.append(
            cells
            + [duration(statistics.median(r[k] for r in rows)) for k in ("train_seconds", "total_seconds")]
        )
    return table


def emnist_short_table(results):
    """README's: the runs without a variant, on the smallest images and on the most images."""
    table = [["regime", "images × px", "accuracy", "macro-F1", "trainable", "training"]]
    groups = [rows for rows in resnet_groups(read_runs(results)[1]) if not rows[0]["variant"]]
    least, most = min(g[0]["image_size"] for g in groups), max(g[0]["images"] for g in groups)
    for rows in groups:
        one = rows[0]
        if one["image_size"] == least or one["images"] == most:
            size, f1 = f"{one['images']:,} × {one['image_size']}", f"{mean_std(rows, 'test_f1_macro')[0]:.3f}"
            cells = [one["regime"], size, spread_of(rows, 2), f1, f"{one['trainable_params']:,}"]
            table.append([*cells, duration(cost_of(rows))])
    return table


def bench_lines(results):
    path = results / "bench.txt"
    return path.read_text().splitlines() if path.exists() else []


def step_table(results):
    """A row per batch size: what report/bench.py prints "as users run it", and the speed "kernel for kernel".

    On a GPU only the latter is measured; its rows come last, with the times of that comparison and its name.
    """
    head = ["batch", "torch.nn NCHW", "torch.nn channels_last", "by hand"]
    table, rows = [[*head, "speed as users run it", "speed kernel for kernel"]], {}
    device = ""
    spread = r"\s+([\d.]+)x? \(([\d.]+)-([\d.]+)\)"  # median (quartiles)
    for line in bench_lines(results):
        if found := re.fullmatch(r"\s+(\d+)" + 4 * spread, line):
            batch, *figures, speed, low, high = found.groups()
            rows[batch] = [batch, *(f"{ms} ms" for ms in figures[::3]), f"{speed}× ({low}–{high})", ""]
            table.append(rows[batch])
        elif found := re.match(r"kernel for kernel, (.+):", line):
            device = found[1]
        elif found := re.fullmatch(r"\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)x\s+\S+", line):
            batch, *ms, speed = found.groups()
            row = rows.pop(batch, None)  # the CPU's row is filled once, the next of the same size is a GPU's
            if row is None:
                row = [f"{batch} {device}".strip(), *(f"{m} ms" for m in ms), "", ""]
                table.append(row)
            row[-1] = f"{speed}×"
    return table


def regime_speed_table(results):
    table = [["224 px, batch 32", "usual loop", "here", "factor"]]
    for line in bench_lines(results):
        if found := re.match(r"(.+?) +usual +([\d.]+) +ours +([\d.]+) +([\d.]+)x", line):
            name, usual, ours, factor = found.groups()
            table.append([name, f"{usual} images/s", f"{ours} images/s", f"{factor}×"])
    return table


def technique_table(results):
    table = [["full, 224 px, batch 32", "images/s"]]
    for line in bench_lines(results):
        if found := re.match(r"full, (\w+), (\w+) +([\d.]+)$", line):
            table.append([f"{found[1]}, {found[2].replace('contiguous_format', 'NCHW')}", found[3]])
    return table


TABLES = {
    "mnist": mnist_table,
    "step": step_table,
    "emnist": emnist_table,
    "emnist-short": emnist_short_table,
    "regime-speed": regime_speed_table,
    "technique": technique_table,
}


def markdown(table):
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tex(text):
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
    for old, new in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("×", r"$\times$"), ("–", "--")):
        text = text.replace(old, new)
    return text


def latex(table):
    words = ["l" if any(row[k][:1].isalpha() for row in table[1:]) else "r" for k in range(len(table[0]))]
    rows = [" & ".join(tex(cell) for cell in row) + r" \\" for row in table]
    top = [rf"\begin{{tabular}}{{{''.join(words)}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*top, *rows[1:], r"\bottomrule", r"\end{tabular}"]) + "%\n"


# ---------------------------------------------------------------------------------------------- numbers


def numbers_of(results):
    r"""Name -> text of every number in the report's sentences, read there as \R{name}."""
    cnn, resnet = read_runs(results)
    found = {}
    for name, prefix in (("default", "mnist"), ("course", "course")):
        rows = runs_of(cnn, name)
        found |= cnn_numbers(prefix, rows) if rows else {}
    groups = resnet_groups(resnet)
    found |= resnet_numbers(groups) if groups else {}
    found |= bench_numbers(results)
    return found


def cnn_numbers(name, rows):
    values = [100 * r["test_accuracy"] for r in rows]
    row = {
        "spread": spread_of(rows, 2),
        "seeds": len(rows),
        "dataset": rows[0]["dataset"].upper(),
    }
    row |= {"low": f"{min(values):.2f}", "high": f"{max(values):.2f}", "seconds": f"{cost_of(rows):.1f}"}
    row |= {
        "params": f"{rows[0]['trainable_params']:,}",
        "epochs": rows[0]["epochs"],
        "batch": rows[0]["batch_size"],
    }
    row |= {
        "train": f"{rows[0]['samples_per_epoch']:,}",
        "device": rows[0]["device"],
        "torch": rows[0]["torch"],
    }
    return {f"{name}/{k}": str(v) for k, v in row.items()}


def scopes(groups):
    """Named sets of groups: all images (main), most regimes (small), and the ablations at the same images."""

    usual = min(g[0]["variant"] for g in groups)  # no variant, where any run is without one

    def at(images, px, variant=usual):
        wanted = images, px, variant
        return [g for g in groups if (g[0]["images"], g[0]["image_size"], g[0]["variant"]) == wanted]

    places = {(g[0]["images"], g[0]["image_size"]) for g in groups if g[0]["variant"] == usual}
    named = {"main": at(*max(places))}
    small = max(places, key=lambda place: (len(at(*place)), sum(map(len, at(*place)))))
    named["small"] = at(*small)
    same = [same_seeds(g, groups) for g in at(*small)]
    named |= {"same": same} | {f"px{px}": at(small[0], px) for px in (64, 112, 224) if px != small[1]}
    named[f"px{small[1]}"] = same
    named |= {v.replace("layer3 ", ""): at(*small, v) for v in ("augmented", "layer3 recomputed", "float32")}
    return named


def same_seeds(rows, groups):
    """Those runs of a group whose seeds all groups at as many images have: what differs is not the seed."""
    peers = [{r["seed"] for r in g} for g in groups if g[0]["images"] == rows[0]["images"]]
    return [r for r in rows if r["seed"] in set.intersection(*peers)] or rows


def resnet_numbers(groups):
    found, named = {}, scopes(groups)
    for scope, members in named.items():
        for rows in members:
            one, name = rows[0], f"{scope}/{rows[0]['regime']}"
            row = {
                "accuracy": f"{mean_std(rows, 'test_accuracy', 100)[0]:.1f}",
                "spread": spread_of(rows, 1),
                "seeds": len(rows),
                "px": one["image_size"],
            }
            for k in ("precision_macro", "recall_macro", "f1_macro"):
                row[k.split("_")[0]] = f"{mean_std(rows, 'test_' + k)[0]:.3f}"
            row |= {"time": duration(cost_of(rows)), "images": f"{one['images']:,}"}
            row |= {"params": f"{one['trainable_params']:,}", "device": one["device"], "amp": one["amp"]}
            row |= {"dataset": one["dataset"], "weights": one["weights"]}
            corrected = [r["prior_corrected"] for r in rows]
            row["correctedrecall"] = f"{mean_std(corrected, 'test_recall_macro')[0]:.3f}"
            row["correctedaccuracy"] = f"{mean_std(corrected, 'test_accuracy', 100)[0]:.1f}"
            found |= {f"{name}/{k}": str(v) for k, v in row.items()}
            base = {g[0]["regime"]: g for g in named["same"]}.get(one["regime"])
            if base:
                found[f"{name}/points"], found[f"{name}/factor"] = difference(rows, base)
        found |= against(scope, members, "linear_probe", "probe") | against(
            scope, members, "partial_unfreeze", "partial"
        )
    best = best_of(named["main"])
    found |= {
        k.replace("main/" + best[0]["regime"], "best"): v
        for k, v in found.items()
        if k.startswith("main/" + best[0]["regime"] + "/")
    }
    images = named["small"][0][0]["images"]
    peers = [same_seeds(g, groups) for g in groups if g[0]["images"] == images]
    found["frontier/small"] = "; ".join(frontier(peers))
    found["frontier/seeds"] = ", ".join(str(r["seed"]) for r in peers[0])
    size = f"px{named['main'][0][0]['image_size']}"
    less = {g[0]["regime"]: mean_std(g, "test_accuracy", 100)[0] for g in named.get(size, [])}
    for rows in named["main"]:
        one = rows[0]
        if one["images"] > images and one["regime"] in less:
            points = mean_std(rows, "test_accuracy", 100)[0] - less[one["regime"]]
            found[f"data/{one['regime']}/points"] = signed(points)
            found["data/times"] = f"{one['images'] / images:.1f}"
    return found | alike_numbers(best[0])


def against(scope, members, regime, short):
    """What each regime of a scope gains on one of them, and how many times its training time it takes."""
    base = next((rows for rows in members if rows[0]["regime"] == regime), None)
    if base is None:
        return {}
    found = {}
    for rows in members:
        name = f"{scope}/{rows[0]['regime']}/{short}"
        found[f"{name}points"], found[f"{name}times"] = difference(rows, base)
    return found


def frontier(groups):
    """The groups than which none is both cheaper and more accurate on validation, the cheapest first."""
    kept, best = [], -1.0
    for rows in sorted(groups, key=cost_of):
        accuracy, chosen_by = (mean_std(rows, f"{part}_accuracy", 100)[0] for part in ("test", "val"))
        if chosen_by > best:
            one, best = rows[0], chosen_by
            name = one["regime"].replace("_", " ") + f", {one['variant']}," * bool(one["variant"])
            kept.append(
                f"{name} at {one['image_size']} pixels ({accuracy:.1f} % in {duration(cost_of(rows))})"
            )
    return kept


def confusion_of(row):
    path = row["folder"] / "confusion.csv"
    if not path.exists():
        return None, None
    rows = read_csv(path)
    classes = [r.pop("true") for r in rows]
    return classes, [[int(v) for v in r.values()] for r in rows]


def alike_numbers(row):
    """The ceiling for a reader to whom the members of a group look alike, and what this run loses there."""
    classes, confusion = confusion_of(row)
    if classes is None or not all(k in classes for group in GROUPS for k in group):
        return {}
    total = sum(map(sum, confusion))
    images = {k: sum(line) for k, line in zip(classes, confusion, strict=True)}
    lost = sum(sum(images[k] for k in group) - max(images[k] for k in group) for group in GROUPS)
    group_of = {k: next((g for g in GROUPS if k in g), k) for k in classes}
    merged = within = errors = 0
    for a, line in zip(classes, confusion, strict=True):
        for b, n in zip(classes, line, strict=True):
            merged += n * (group_of[a] == group_of[b])
            within += n * (a != b and group_of[a] == group_of[b])
            errors += n * (a != b)
    row = {"ceiling": f"{100 * (1 - lost / total):.1f}", "merged": f"{100 * merged / total:.1f}"}
    row |= {
        "share": f"{100 * within / errors:.0f}",
        "groups": len(GROUPS),
        "classes": len(set(group_of.values())),
    }
    row["names"] = ", ".join("/".join(group) for group in GROUPS)
    return {f"alike/{k}": str(v) for k, v in row.items()} | {"test/images": f"{total:,}"}


def bench_numbers(results):
    found = {}
    for batch, _, _, ours, speed, kernel in step_table(results)[1:]:
        values = [ours.removesuffix(" ms"), *re.findall(r"[\d.]+", speed), kernel.rstrip("×")]
        if len(values) == 5:  # not a GPU's
            names = ("ours", "speed", "low", "high", "kernel")
            found |= {f"step/{batch}/{name}": value for name, value in zip(names, values, strict=True)}
    for row, name in zip(
        regime_speed_table(results)[1:], ("probe", "kept", "recomputed", "full"), strict=False
    ):
        found[f"speed/{name}"] = row[3].rstrip("×")
    rates = {row[0]: float(row[1]) for row in technique_table(results)[1:]}
    if len(rates) == 4:
        base = rates["float32, NCHW"]
        for name, rate in rates.items():
            found[f"technique/{name.replace(', ', '/')}"] = f"{rate / base:.1f}"
    sizes = re.findall(r", (\d+) px, batch (\d+), images/s", "\n".join(bench_lines(results)))
    found |= {"bench/px": sizes[-1][0]} if sizes else {}
    passed = re.findall(r"^(\d+) passed, (\d+) failed", read_text(results / "tests.txt"), re.M)
    if passed:
        found["tests/passed"], found["tests/failed"] = passed[-1]
    return found


def read_text(path):
    return path.read_text() if path.exists() else ""


# ---------------------------------------------------------------------------------------------- the example


def matrix(values):
    return (
        r"\begin{pmatrix}"
        + r" \\ ".join(" & ".join(f"{v + 0.0:g}" for v in row) for row in values)
        + r"\end{pmatrix}"
    )


def worked_example():
    """One 3 x 3 image and a 2 x 2 kernel through Conv2D: name -> LaTeX of its matrices."""
    conv = c.Conv2D(1, 1, 2, device="cpu", dtype=torch.float64)
    x = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    conv.W.copy_(torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]))
    conv.b.fill_(3.0)
    y = conv(x)
    y.g = torch.tensor([[[[1.0, 0.0], [2.0, -1.0]]]], dtype=torch.float64)
    conv.backward()
    cols = F.unfold(x, 2)[0]
    cols = torch.cat([cols, torch.ones_like(cols[:1])])
    weights = torch.cat([conv.W.flatten(), conv.b])[None]
    shown = {"x": x[0, 0], "cols": cols, "w": weights, "y": y.reshape(1, 4), "dy": y.g.reshape(1, 4)}
    shown |= {"dw": torch.cat([conv.W.g.flatten(), conv.b.g])[None], "dx": x.g[0, 0]}
    shown["dcols"] = conv.W.reshape(4, 1) @ y.g.reshape(1, 4)
    return {f"example/{k}": matrix(v.tolist()) for k, v in shown.items()}


# ---------------------------------------------------------------------------------------------- figures


def new_axes(width, height, columns=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_curves(path, members):
    """Validation and training accuracy of every regime over the epochs of a set of runs."""
    figure, axes = new_axes(7.2, 2.6, 2)
    for rows in reversed(members):  # gradual below: its first stage is the probe
        log, regime = read_csv(rows[0]["folder"] / "log.csv"), rows[0]["regime"]
        for ax, part in zip(axes, ("train", "val"), strict=True):
            values = [100 * float(line[f"{part}_accuracy"]) for line in log]
            ax.plot(
                range(1, len(log) + 1),
                values,
                color=COLOURS[regime],
                marker=MARKERS[regime],
                ms=3,
                label=regime,
            )
    for ax, part in zip(axes, ("training", "validation"), strict=True):
        ax.set(xlabel="epoch", ylabel=f"{part} accuracy (%)")
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path)


def draw_compute(path, groups):
    """Test accuracy over training time of all runs, seeds averaged; numbered by time, the key beside."""
    figure, (ax,) = new_axes(8.4, 3.6)
    for number, rows in enumerate(sorted(groups, key=cost_of), 1):
        minutes = cost_of(rows) / 60
        one, (mean, std) = rows[0], mean_std(rows, "test_accuracy", 100)
        name = f"{one['image_size']} px" + f", {one['variant']}" * bool(one["variant"])
        name = f"{number}  {one['regime']}, {name}, {one['images']:,} images"
        style = {"fmt": MARKERS[one["regime"]], "color": COLOURS[one["regime"]], "ms": 6, "capsize": 2}
        ax.errorbar(minutes, mean, std if len(rows) > 1 else None, label=name, **style)
        x, y, side = ((-6, -3, "right"), (-3, 6, "center"), (3, -13, "center"))[number % 3]
        ax.annotate(str(number), (minutes, mean), (x, y), textcoords="offset points", ha=side, fontsize=8)
    ax.set(xscale="log", xlabel="training time (minutes, logarithmic)", ylabel="test accuracy (%)")
    ax.margins(y=0.12)
    ax.grid(alpha=0.3)
    handles, names = ax.get_legend_handles_labels()
    figure.legend([h[0] for h in handles], names, loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def draw_confusion(path, row, count=15):
    """The part of the confusion matrix with the most errors, as shares of the true class."""
    classes, confusion = confusion_of(row)
    if classes is None:
        return
    size = range(len(classes))
    errors = [sum(confusion[i][j] + confusion[j][i] for j in size if j != i) for i in size]
    worst = sorted(size, key=lambda i: -errors[i])[:count]
    worst.sort(key=lambda i: next((g for g in GROUPS if classes[i] in g), classes[i]).lower())
    share = [[100 * confusion[i][j] / max(1, sum(confusion[i])) for j in worst] for i in worst]
    figure, (ax,) = new_axes(4.2, 3.7)
    picture = ax.imshow(share, cmap="cividis", vmin=0, vmax=100)
    for i, line in enumerate(share):
        for j, value in enumerate(line):
            if value >= 1:
                ax.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black" if value > 55 else "white",
                )
    names = [classes[i] for i in worst]
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(picture, ax=ax, shrink=0.8, label="% of the true class")
    figure.savefig(path)


def verbatim(path, text, lines=40, width=118):
    """The last lines, cut to the page."""
    kept = [line.replace("±", "+-")[:width] for line in text.expandtabs().splitlines()][-lines:]
    path.write_text("\n".join(kept or ["n/a"]) + "\n")


def write_report(results, out):
    out.mkdir(parents=True, exist_ok=True)
    cnn, resnet = read_runs(results)
    if not cnn and not resnet:
        raise SystemExit(f"error: no metrics.json of a finished run below {results}")
    numbers = numbers_of(results) | worked_example()
    lines = [
        rf"\expandafter\def\csname r:{k}\endcsname{{{v if k.startswith('example/') else tex(v)}}}"
        for k, v in numbers.items()
    ]
    (out / "numbers.tex").write_text("\n".join(lines) + "\n")
    for name, table in TABLES.items():
        (out / f"table-{name}.tex").write_text(latex(table(results)))
    groups = resnet_groups(resnet)
    if groups:
        named = scopes(groups)
        best = best_of(named["main"])[0]
        draw_curves(out / "curves.pdf", named["small"])
        draw_compute(out / "compute.pdf", groups)
        draw_confusion(out / "confusion.pdf", best)
        for source, name in (
            (best["folder"].parent / "samples.png", "samples.png"),
            (best["folder"] / "confusions_top.png", "top.png"),
        ):
            if source.exists():
                shutil.copy(source, out / name)
    default = runs_of(cnn, "default") or cnn
    for name in ("curves.png", "mistakes.png"):
        sources = [row["folder"] / name for row in default if (row["folder"] / name).exists()]
        if sources:
            shutil.copy(sources[0], out / f"mnist-{name}")
    verbatim(out / "tests.txt", read_text(results / "tests.txt"), 14)
    for log in ("cnn.out", "resnet.out", "vanished.out", "files.txt"):
        verbatim(out / f"cluster-{log[:-4]}.txt", read_text(results / "cluster" / log))


# ---------------------------------------------------------------------------------------------- README


def with_tables(text, results):
    """README's text with the tables between <!-- table NAME --> and <!-- end --> made anew."""

    def made(found):
        return f"{found[1]}\n{markdown(TABLES[found[2]](results))}\n{found[3]}"

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- end -->)", made, text, flags=re.S)


def main(argv):
    if argv == ["--readme"]:
        path, results = HERE.parent / "README.md", HERE / "results"
        path.write_text(with_tables(path.read_text(), results))
        draw_compute(results / "compute.png", resnet_groups(read_runs(results)[1]))
    elif len(argv) == 2:
        write_report(Path(argv[0]), Path(argv[1]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
