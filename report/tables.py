"""Turns a folder of finished runs into the report's numbers, tables and figures; no number is typed by hand.

    python report/tables.py RESULTS OUT    numbers, tables and figures for report.tex, into OUT
    python report/tables.py --readme       README.md's tables and picture, from report/results

Runs are found by their metrics.json, whatever their folders are called. RESULTS may also hold bench.txt and
tests.txt (the output of "python tests.py bench" and "python tests.py"), a folder cluster (logs of batch jobs)
and note.txt (what a reader must know of these runs). Whatever is missing appears as n/a in the report.
"""

import collections
import csv
import json
import re
import statistics
import string
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import figures

HERE = Path(__file__).resolve().parent
REGIMES = ("linear_probe", "partial_unfreeze", "full", "gradual")
RECIPE = ("epochs", "batch_size", "lr", "momentum", "schedule")  # by which runs of task 1 may differ
DEFAULT, COURSE = (5, 64, 0.1, 0.9, "onecycle"), (5, 640, 0.01, 0, "constant")
TOP = "confusions_top.png"
# characters drawn alike: most of those whose cases EMNIST's authors merge (by-merge), and zero and one
ALIKE = ("0Oo", "1Il", "Cc", "Jj", "Kk", "Mm", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")


# ---------------------------------------------------------------------------------------------- runs


class Group:
    """Runs that differ in the seed alone. group["device"] is the first run's."""

    def __init__(self, runs):
        self.runs, self.cost = runs, statistics.median(run["train_seconds"] for run in runs)
        self.accuracies = [100 * run["test_accuracy"] for run in runs]
        self.accuracy = statistics.mean(self.accuracies)
        self.deviation = statistics.stdev(self.accuracies) if len(runs) > 1 else None

    def __getitem__(self, key):
        return self.runs[0][key]

    def mean(self, key):
        return statistics.mean(run[key] for run in self.runs)


def spread(values, digits=2, unit=""):
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{unit}{deviation}"


def read_groups(results):
    """(groups of task 1, groups of task 2) of the finished runs below `results`, in the tables' order."""
    groups, tasks = {}, ([], [])
    for path in sorted(results.rglob("metrics.json")):
        run = json.loads(path.read_text()) | {"folder": path.parent}
        # a regime's arguments are in the folder above
        text = read_text(path.parent / "args.json") or read_text(path.parent.parent / "args.json") or "{}"
        arguments = json.loads(text)
        arguments = arguments.get("arguments", arguments)
        if arguments.get("dry_run") or "checkpoint" in run:  # the latter: --evaluate repeats a run's test
            continue
        switched = {
            "augmented": arguments.get("augment"),
            "no cache": arguments.get("cache_gb") == 0,
            "float32": arguments.get("amp") == "off" and arguments.get("weights") != "none",
            "random weights": arguments.get("weights") == "none",
        }
        own = [f"{k} {arguments[k]:g}" for k in ("lr", "epochs", "batch_size") if arguments.get(k)]
        own = ["course's recipe"] if own == ["lr 0.0005", "epochs 20"] else own
        run["variant"] = ", ".join([name for name, on in switched.items() if on] + own)
        run["device"] = run["device"].replace("(1 threads)", "(1 thread)")  # an older run's
        run["recipe"] = tuple(arguments.get(k) for k in RECIPE)
        if "regime" in run:
            run["size"] = run["samples_per_epoch"], run["image_size"]
            key = 1, run["size"], run["variant"], run["device"], run["torch"], REGIMES.index(run["regime"])
            key += run["dataset"], run["weights"]
        else:
            key = 0, run["recipe"] != DEFAULT, str(run["recipe"]), run["dataset"] != "mnist"
        groups.setdefault(key, []).append(run)
    for key in sorted(groups):
        tasks[key[0]].append(Group(groups[key]))
    return tasks


def read_text(path):
    return path.read_text() if path.exists() else ""


def read_csv(path):
    return list(csv.DictReader(read_text(path).splitlines()))


def constant(script, name):
    return float(re.search(rf"^{name} = (\S+)", (HERE.parent / script).read_text(), re.M)[1])


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def mnist_cells(group):
    """Name -> text of what the tables and the sentences of the report say of a group."""
    names = {DEFAULT: "default, batch 64", COURSE: "the course's recipe"}
    other = "batch {1}, lr {2}, momentum {3}, {4}, {0} epochs".format(*group["recipe"])
    return {
        "recipe": names.get(group["recipe"], other) + ("" if group["dataset"] == "mnist" else " (DIGITS)"),
        "seeds": str(len(group.runs)),
        "test accuracy": spread(group.accuracies, unit=" %"),
        "lowest to highest": f"{min(group.accuracies):.2f} to {max(group.accuracies):.2f} %",
        "training": f"{group.cost:.1f} s",
        "on": group["device"],
        "dataset": group["dataset"].upper(),
        "trainable": f"{group['trainable_params']:,}",
        "images": f"{group['samples_per_epoch']:,}",
        **{k: str(group[k]) for k in ("batch_size", "epochs", "torch")},
    }


def emnist_cells(group):
    epochs = sorted(run["epochs_run"] for run in group.runs)
    corrected = Group([run | run["prior_corrected"] for run in group.runs])
    return {
        "images": f"{group['samples_per_epoch']:,}",
        "px": str(group["image_size"]),
        "regime": group["regime"] + (f" ({group['variant']})" if group["variant"] else ""),
        "seeds": str(len(group.runs)),
        "accuracy": spread(group.accuracies, unit=" %"),
        "precision": f"{group.mean('test_precision_macro'):.3f}",
        "recall": f"{group.mean('test_recall_macro'):.3f}",
        "macro-F1": f"{group.mean('test_f1_macro'):.3f}",
        "F1": spread([run["test_f1_macro"] for run in group.runs], 3),
        "trainable": f"{group['trainable_params']:,}",
        "epochs": "–".join(str(n) for n in sorted({epochs[0], epochs[-1]})),
        "training": duration(group.cost),
        "in all": duration(statistics.median(run["total_seconds"] for run in group.runs)),
        "percent": f"{group.accuracy:.1f}",
        "corrected F1": f"{corrected.mean('test_f1_macro'):.3f}",
        "corrected recall": f"{corrected.mean('test_recall_macro'):.3f}",
        "corrected percent": f"{corrected.accuracy:.1f}",
        **{k: group[k] for k in ("dataset", "weights", "device", "amp")},
    }


def name_of(group):
    return "{regime}, {px} px, {images} images".format(**emnist_cells(group))


# ---------------------------------------------------------------------------------------------- tables


def table_of(rows, *columns):
    return [list(columns), *([row[k] for k in columns] for row in rows)]


def mnist_table(results):
    rows = [mnist_cells(group) for group in read_groups(results)[0]]
    return table_of(rows, "recipe", "seeds", "test accuracy", "lowest to highest", "training", "on")


def emnist_table(results):
    columns = ["images", "px", "regime", "seeds", "accuracy (%)", "precision", "recall", "F1"]
    columns += ["epochs", "training", "in all", "on"]
    groups = read_groups(results)[1]
    rows = [emnist_cells(group) | {"accuracy (%)": spread(group.accuracies)} for group in groups]
    letters = {name: letter for letter, name in machines(groups).items()}
    for row, group in zip(rows, groups):
        row["on"] = letters[machine(group)]
    return table_of(rows, *columns)


def machine(group):
    return f"{group['device']}, torch {group['torch'].split('+')[0]}"


def machines(groups):
    """Letter -> machine; A has the most groups. Times can be compared within one of them."""
    names = [name for name, _ in collections.Counter(map(machine, groups)).most_common()]
    return dict(zip(string.ascii_uppercase, names))


def short_list(groups):
    """README's: the runs without a variant, those on the smallest images and those on the most images."""
    groups = [group for group in groups if not group["variant"]]
    images, px = [g["samples_per_epoch"] for g in groups], [g["image_size"] for g in groups]
    return [g for g in groups if g["image_size"] == min(px) or g["samples_per_epoch"] == max(images)]


def emnist_short_table(results):
    rows = [emnist_cells(group) for group in short_list(read_groups(results)[1])]
    rows = [row | {"images × px": f"{row['images']} × {row['px']}"} for row in rows]
    return table_of(rows, "regime", "images × px", "accuracy", "macro-F1", "trainable", "training")


def recipe_table(results):
    """The hyper-parameters, as the runs have recorded them; task 1's weight decay is its script's."""
    cnn, resnet = read_groups(results)
    rows = {"task 1, " + mnist_cells(group)["recipe"]: dict(zip(RECIPE, group["recipe"])) for group in cnn}
    for row in rows.values():
        decay = constant("cnn_from_scratch.py", "WEIGHT_DECAY") if row["schedule"] == "onecycle" else 0
        row["weight_decay"] = decay
    for group in resnet:
        course = ", the course's recipe" if "course" in group["variant"] else ""
        if group["regime"] != "gradual":
            rows["task 2, " + group["regime"] + course] = group["stages"][0]
    keys = "lr", "momentum", "weight_decay", "batch_size", "epochs", "warmup_epochs", "patience"
    head = "", "learning rate", "momentum", "weight decay", "batch size", "epochs", "warm-up", "patience"
    return [head, *([name, *(f"{row[k]:g}" if k in row else "" for k in keys)] for name, row in rows.items())]


def step_table(results):
    """A row per batch size: times and speed "as users run it", and the speed "kernel for kernel".

    On a GPU only the latter is measured: its rows come last, with its name and the times of that comparison.
    """
    text = read_text(results / "bench.txt")
    sections = re.split(r"^kernel for kernel, (.+):.*", text, flags=re.M)[1:]  # the CPU's is the last one
    median, rows = r" +([\d.]+)x? \(([\d.]+)-([\d.]+)\)", {}  # and the quartiles
    for batch, *times, speed, low, high in re.findall(rf"^ +(\d+){4 * median}$", text, re.M):
        rows[batch] = [batch, *(f"{ms} ms" for ms in times[::3]), f"{speed}× ({low}–{high})", ""]
    line = r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)x"
    for device, section in zip(sections[::2], sections[1::2]):
        for batch, *times, speed in re.findall(line, section, re.M):
            name = batch if device == sections[-2] else f"{batch} {device}"
            rows.setdefault(name, [name, *(f"{ms} ms" for ms in times), "", ""])[-1] = f"{speed}×"
    head = ["batch", "torch.nn NCHW", "torch.nn channels_last", "by hand"]
    return [[*head, "speed as users run it", "speed kernel for kernel"], *rows.values()]


def regime_speed_table(results):
    line = r"^(.+?) +usual +([\d.]+) +ours +([\d.]+) +([\d.]+)x"
    found = re.findall(line, read_text(results / "bench.txt"), re.M)
    rows = [[name, f"{usual} images/s", f"{ours} images/s", f"{x}×"] for name, usual, ours, x in found]
    return [["224 px, batch 32", "usual loop", "here", "factor"], *rows]


def technique_table(results):
    found = re.findall(r"^full, (\w+), (\w+) +([\d.]+)$", read_text(results / "bench.txt"), re.M)
    rows = [[f"{kind}, {layout.replace('contiguous_format', 'NCHW')}", rate] for kind, layout, rate in found]
    return [["full, 224 px, batch 32", "images/s"], *rows]


TABLES = {"mnist": mnist_table, "emnist": emnist_table, "emnist-short": emnist_short_table}
TABLES |= {"step": step_table, "regime-speed": regime_speed_table, "technique": technique_table}
TABLES["recipe"] = recipe_table


def with_tables(text, results):
    """README's text with new tables between <!-- table NAME --> and <!-- end -->."""

    def markdown(found):
        head, *rows = TABLES[found[2]](results)
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        return "\n".join([found[1], *lines, found[3]])

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- end -->)", markdown, text, flags=re.S)


def latex(table):
    left = [any(cell[:1].isalpha() or "±" in cell for cell in column[1:]) for column in zip(*table)]
    columns = "".join("l" if words else "r" for words in left)
    head, *rows = [" & ".join(tex(cell) for cell in row) + r" \\" for row in table]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "%\n"


def tex(text):
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
    for old, new in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("×", r"$\times$"), ("–", "--")):
        text = text.replace(old, new)
    return text


# ---------------------------------------------------------------------------------------------- numbers

COMPARED = {  # two groups of scopes_of(): what the first gains on the second
    "unfreezing": ("small/partial_unfreeze", "small/linear_probe"),
    "full": ("small/full", "small/partial_unfreeze"),
    "gradual": ("small/gradual", "small/partial_unfreeze"),
    "size": ("px224/partial_unfreeze", "px64/partial_unfreeze"),
    "no cache": ("no cache/partial_unfreeze", "later/partial_unfreeze"),
    "float32": ("float32/partial_unfreeze", "same/partial_unfreeze"),
    "augmented": ("augmented/partial_unfreeze", "later/partial_unfreeze"),
    "pretrained": ("later/full", "random weights/full"),
    "more, probe": ("main/linear_probe", "fewer/linear_probe"),
    "more, partial": ("main/partial_unfreeze", "fewer/partial_unfreeze"),
}


def numbers_of(results):
    r"""Name -> text of every number in the report's sentences; report.tex shows it by \R{name}."""
    cnn, resnet = read_groups(results)
    recipes = {group["recipe"]: group for group in reversed(cnn)}  # MNIST's runs replace those on the digits
    named = {k: mnist_cells(recipes[v]) for k, v in (("mnist", DEFAULT), ("course", COURSE)) if v in recipes}
    scopes = scopes_of(resnet) if resnet else {}
    named |= {name: emnist_cells(group) for name, group in scopes.items()}
    for name, (group, base) in COMPARED.items():
        if group in scopes and base in scopes:
            named[name] = difference(scopes[group], scopes[base])
    if "best" in scopes:
        named["alike"] = alike_numbers(scopes["best"])
        for group in pictured(resnet)[:1]:
            named["top"] = {"run": name_of(group)}
    named["table"] = {"machines": "; ".join(f"{k}: {v}" for k, v in machines(resnet).items())}
    named["progress"] = {"points": f"{100 * constant('resnet18.py', 'MIN_DELTA'):g}"}
    named |= bench_numbers(results)
    return {f"{name}/{key}": text for name, texts in named.items() for key, text in texts.items()}


def scopes_of(groups):
    """Name -> group: "main/full" is on the most images, "small/full" of the size with the most runs.

    On as many images as small: "px64/full" and so on, "fewer/full" of main's image size; also, of small's
    size, "same/full", "float32/full" and so on. These have the same seeds, so that a difference between them
    does not come from the seed. "later/full" is in float32, too, from another machine than most runs if there
    is one. "best" is main's best on validation.
    """
    here = machines(groups)["A"]
    groups = sorted(groups, key=lambda group: machine(group) == here)  # the last of a name is taken
    usual = min(group["variant"] for group in groups)  # no variant, unless all runs have one
    sizes = collections.Counter(g["size"] for g in groups if g["variant"] == usual for _ in g.runs)
    main, small = max(sizes), max(sizes, key=sizes.get)
    peers = [group for group in groups if group["size"][0] == small[0]]
    seeds = set.intersection(*({run["seed"] for run in group.runs} for group in peers))

    def at(size, variant=usual):
        return [group for group in groups if (group["size"], group["variant"]) == (size, variant)]

    def same_seeds(*where):
        return [Group([run for run in g.runs if run["seed"] in seeds] or g.runs) for g in at(*where)]

    scopes = {"main": at(main), "small": at(small), "same": same_seeds(small)}
    scopes["fewer"] = same_seeds((small[0], main[1])) if main[0] > small[0] else []
    scopes |= {f"px{px}": same_seeds((small[0], px)) for px in (64, 112, 224)}
    scopes |= {name: same_seeds(small, f"{name}, float32") for name in ("augmented", "no cache")}
    scopes |= {name: same_seeds(small, name) for name in ("random weights", "float32")}
    scopes["recipe"], float32 = same_seeds(small, "float32, course's recipe"), scopes["float32"]
    scopes["later"] = [group for group in float32 if machine(group) != here] or float32
    named = {f"{name}/{group['regime']}": group for name, members in scopes.items() for group in members}
    return named | {"best": max(scopes["main"], key=lambda group: group.mean("val_accuracy"))}


def difference(group, base):
    """Points of test accuracy that a group gains on another one, also by seed; time and images as factors."""
    points = round(group.accuracy - base.accuracy, 6)
    before = {run["seed"]: run["test_accuracy"] for run in base.runs}
    runs = [run for run in group.runs if run["seed"] in before]
    gains = [100 * (run["test_accuracy"] - before[run["seed"]]) for run in runs]
    return {
        "points": f"{points:.1f}" if abs(points) >= 0.05 else "0.0",
        "paired": spread(gains) if gains else "n/a",
        "lowest": f"{min(gains):.2f}" if gains else "n/a",
        "times": f"{group.cost / base.cost:.1f}",
        "images": f"{group['samples_per_epoch'] / base['samples_per_epoch']:.1f}",
    }


def pictured(groups):
    """Those with a picture of their most frequent confusions, the best on validation first."""
    found = [group for group in groups if (group["folder"] / TOP).exists()]
    return sorted(found, key=lambda group: -group.mean("val_accuracy"))


def read_confusion(group):
    """(classes, confusion matrix of integers) of the first run."""
    rows = read_csv(group["folder"] / "confusion.csv")
    return [row.pop("true") for row in rows], np.array([[int(v) for v in row.values()] for row in rows])


def f1_of(confusion):
    return 2 * confusion.diagonal() / np.maximum(1, confusion.sum(0) + confusion.sum(1))


def alike_numbers(group):
    """How far one gets without telling characters apart that are drawn alike, and how far this run gets."""
    classes, confusion = read_confusion(group)
    if not set("".join(ALIKE)) <= set(classes):
        return {}
    look = np.array([next((alike for alike in ALIKE if name in alike), name) for name in classes])
    images, total, right = confusion.sum(1), confusion.sum(), confusion.trace()
    merged = confusion[look[:, None] == look].sum()
    guesses = {kind: images[look == kind].max() for kind in set(look)}
    hits = {kind: confusion.diagonal()[look == kind].sum() for kind in set(look)}
    f1 = f1_of(confusion)
    worst = np.argsort(f1, kind="stable")[:4]
    misread = sum(confusion[k, look == look[k]].sum() - confusion[k, k] for k in worst)
    return {
        "all hits": f"{sum(hits[kind] for kind in ALIKE):,}",
        "all guesses": f"{sum(guesses[kind] for kind in ALIKE):,}",
        "worst": ", ".join(f"{classes[k]} ({f1[k]:.2f})" for k in worst),
        "misread": f"{100 * misread / images[worst].sum():.0f}",
        "ceiling": f"{100 * sum(guesses.values()) / total:.1f}",
        "merged": f"{100 * merged / total:.1f}",
        "share": f"{100 * (merged - right) / (total - right):.0f}",
        "names": ", ".join("/".join(alike) for alike in ALIKE),
        "images": f"{total:,}",
    }


def bench_numbers(results):
    rates = {name: float(rate) for name, rate in technique_table(results)[1:]}
    text = read_text(results / "bench.txt") + read_text(results / "tests.txt")
    machines = {part: name for name, part in re.findall(r"^(.+, torch \S+), (224 px|float32)", text, re.M)}
    tests = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped", text, re.M)
    skipped = collections.Counter(re.findall(r"SKIPPED: (.+) here$", text, re.M))
    reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
    told = "{} tests pass, {} fail, {} are skipped" + (f": {reasons}" if reasons else "")
    return {
        "bench": machines | {"precision": " or ".join({name.split(",")[0] for name in rates} - {"float32"})},
        "step": {row[0]: row[4].split("×")[0] for row in step_table(results)[1:]},
        "kernels": {row[0]: row[5].rstrip("×") for row in step_table(results)[1:]},
        "speed": {row[0]: row[3].rstrip("×") for row in regime_speed_table(results)[1:]},
        "technique": {k: f"{rate / rates['float32, NCHW']:.1f}" for k, rate in rates.items()},
        "tests": {"summary": told.format(*tests.groups()).replace(" 0 fail", " none fails")} if tests else {},
    }


# ---------------------------------------------------------------------------------------------- report


def curves(lines):
    """The logs of the first runs of (label, group or None)."""
    return [(label, read_csv(group["folder"] / "log.csv") if group else []) for label, group in lines]


def points(groups):
    """Name, regime's number, minutes, accuracy and its deviation, by training time, on the usual machine."""
    usual = machines(groups)["A"]
    for group in sorted((g for g in groups if machine(g) == usual), key=lambda g: g.cost):
        style, minutes = REGIMES.index(group["regime"]), group.cost / 60
        yield name_of(group), style, minutes, group.accuracy, group.deviation


def worst_classes(group, count=12):
    """The classes with the lowest F1, what they are read as, and in how many percent of their images."""
    classes, confusion = read_confusion(group)
    f1, share = f1_of(confusion), 100 * confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    rows = np.argsort(f1, kind="stable")[:count].tolist()
    columns = sorted({*rows, *np.flatnonzero(share[rows].max(0) >= 5).tolist()})
    columns.sort(key=lambda k: next((alike for alike in ALIKE if classes[k] in alike), classes[k]).lower())
    names = [f"{classes[k]}  {f1[k]:.2f}" for k in rows], [classes[k] for k in columns]
    return *names, share[np.ix_(rows, columns)]


def copy_part(paths, target, box):
    """The first picture that is there, cut to left, upper, right, lower in pixels: a part prints larger."""
    for path in [path for path in paths if path.exists()][:1]:
        with Image.open(path) as picture:
            picture.crop(tuple(map(min, box, 2 * picture.size))).save(target)


def write_listing(path, source, wanted="", lines=50, width=112):
    """The last of a text's lines that match `wanted`, wrapped to the page's width."""
    kept = [line for line in read_text(source).replace("±", "+-").splitlines() if re.match(wanted, line)]
    options = {"subsequent_indent": "    ", "break_on_hyphens": False}
    wrapped = [textwrap.fill(line, width, **options) for line in kept[-lines:] or ["n/a"]]
    path.write_text("\n".join(wrapped) + "\n")


def write_report(results, out):
    out.mkdir(parents=True, exist_ok=True)
    cnn, resnet = read_groups(results)
    if not cnn and not resnet:
        raise SystemExit(f"error: no metrics.json of a finished run below {results}")
    macro = r"\expandafter\def\csname r:%s\endcsname{%s}"
    lines = [macro % (name, tex(text)) for name, text in numbers_of(results).items()]
    (out / "numbers.tex").write_text("\n".join(lines) + "\n")
    for name, table in TABLES.items():
        (out / f"table-{name}.tex").write_text(latex(table(results)))
    (out / "note.tex").write_text(tex(read_text(results / "note.txt")))
    write_listing(out / "tests.txt", results / "tests.txt", r"SideBySide|Gradients|\d+ passed, ")
    for source in ("cnn.out", "vanished.out", "files.txt"):
        write_listing(out / f"{source[:-4]}.txt", results / "cluster" / source)
    lines = [(mnist_cells(group)["recipe"], group) for group in cnn]
    figures.draw_curves(out / "mnist-curves.pdf", curves(lines))
    for picture, box in (("filters", (0, 26, 1400, 1400)), ("mistakes", (0, 26, 759, 340))):
        paths = [run["folder"] / f"{picture}.png" for group in cnn for run in group.runs]
        copy_part(paths, out / f"mnist-{picture}.png", box)
    if resnet:
        scopes = scopes_of(resnet)
        lines = [(regime, scopes.get(f"small/{regime}")) for regime in REGIMES]
        figures.draw_curves(out / "curves.pdf", curves(lines))
        figures.draw_compute(out / "compute.pdf", points(resnet))
        folder = scopes["best"]["folder"]
        if (folder / "confusion.csv").exists():
            figures.draw_confusion(out / "confusion.pdf", *worst_classes(scopes["best"]))
        copy_part([folder.parent / "samples.png"], out / "samples.png", (0, 0, 1405, 455))
        paths = [group["folder"] / TOP for group in pictured(resnet)]
        copy_part(paths, out / "top.png", (0, 0, 1232, 945))


def main(argv):
    if argv == ["--readme"]:
        path, results = HERE.parent / "README.md", HERE / "results"
        path.write_text(with_tables(path.read_text(), results))
        groups = short_list(read_groups(results)[1])
        figures.draw_compute(results / "compute.png", points(groups), key=False)
    elif len(argv) == 2:
        write_report(Path(argv[0]), Path(argv[1]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
