"""Reads finished runs, in groups that differ in the seed alone, and bench.txt; the texts of their numbers."""

import collections
import csv
import json
import re
import statistics
import string
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REGIMES = ("linear_probe", "partial_unfreeze", "full", "gradual")
RECIPE = ("epochs", "batch_size", "lr", "momentum", "schedule")  # by which runs of task 1 may differ
DEFAULT, COURSE = (5, 64, 0.1, 0.9, "onecycle"), (5, 640, 0.01, 0, "constant")
PRECISION = {"off": "float32"}  # metrics.json's word: the report's
# characters drawn alike: most of those whose cases EMNIST's authors merge (by-merge), and zero and one
ALIKE = ("0Oo", "1Il", "Cc", "Jj", "Kk", "Mm", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")


class Group:
    """Runs that differ in the seed alone. group["device"] is the first run's."""

    def __init__(self, runs):
        self.runs, self.cost = runs, statistics.median(map(training_seconds, runs))
        self.accuracies = [100 * run["test_accuracy"] for run in runs]
        self.accuracy = statistics.mean(self.accuracies)
        self.deviation = statistics.stdev(self.accuracies) if len(runs) > 1 else None

    def __getitem__(self, key):
        return self.runs[0][key]

    def mean(self, key):
        return statistics.mean(run[key] for run in self.runs)


def training_seconds(run):
    """On a CPU, CPU time per thread, which other work on the machine disturbs less than wall time."""
    threads = re.search(r"\((\d+) thread", run["device"])
    if threads and "train_cpu_seconds" in run:
        return run["train_cpu_seconds"] / int(threads[1])
    return run["train_seconds"]


def spread(values, digits=2, unit=""):
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{unit}{deviation}"


def read_runs(results):
    """metrics.json of each finished run below `results`, with its folder, its arguments and its recipe."""
    for path in sorted(results.rglob("metrics.json")):
        run = json.loads(path.read_text()) | {"folder": path.parent}
        # a regime's arguments are in the folder above
        text = read_text(path.parent / "args.json") or read_text(path.parent.parent / "args.json") or "{}"
        arguments = json.loads(text)
        run["arguments"] = arguments = arguments.get("arguments", arguments)
        run["recipe"] = tuple(arguments.get(k) for k in RECIPE)
        if not arguments.get("dry_run") and "checkpoint" not in run:  # --evaluate's: it repeats a run's test
            yield run


def variant(run, usual_amp):
    """What is unusual about a run of task 2: "" for most."""
    arguments = run["arguments"]
    switched = {
        "augmented": arguments.get("augment"),
        "no cache": arguments.get("cache_gb") == 0,
        PRECISION.get(run["amp"], run["amp"]): run["amp"] != usual_amp,
        "random weights": arguments.get("weights") == "none",
    }
    own = [f"{k} {arguments[k]:g}" for k in ("lr", "epochs", "batch_size") if arguments.get(k)]
    own = ["course's recipe"] if own == ["lr 0.0005", "epochs 20"] else own
    return ", ".join([name for name, on in switched.items() if on] + own)


def read_groups(results):
    """(groups of task 1, groups of task 2) of the finished runs below `results`, in the tables' order."""
    runs, groups, tasks = list(read_runs(results)), {}, ([], [])
    precisions = collections.Counter(run["amp"] for run in runs if "regime" in run)
    for run in runs:
        if "regime" in run:
            run["size"] = run["samples_per_epoch"], run["image_size"]
            run["variant"] = variant(run, precisions.most_common(1)[0][0])
            key = 1, run["size"], run["variant"], run["device"], run["torch"], REGIMES.index(run["regime"])
            key += run["dataset"], run["weights"]
        else:
            key = 0, run["recipe"] != DEFAULT, str(run["recipe"]), run["dataset"] != "mnist"
        groups.setdefault(key, {}).setdefault(run["seed"], run)  # a repeated run counts once
    for key in sorted(groups):
        tasks[key[0]].append(Group(list(groups[key].values())))
    return tasks


def read_text(path):
    return path.read_text() if path.exists() else ""


def read_csv(path):
    return list(csv.DictReader(read_text(path).splitlines()))


def constant(script, name):
    return float(re.search(rf"^{name} = (\S+)", (ROOT / script).read_text(), re.M)[1])


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
        "amp": PRECISION.get(group["amp"], group["amp"]),
        **{k: group[k] for k in ("dataset", "weights", "device")},
    }


def name_of(group):
    return "{regime}, {px} px, {images} images".format(**emnist_cells(group))


def machine(group):
    return f"{group['device']}, torch {group['torch'].split('+')[0]}"


def machines(groups):
    """Letter -> machine; A has the most groups. Times can be compared within one of them."""
    names = [name for name, _ in collections.Counter(map(machine, groups)).most_common()]
    return dict(zip(string.ascii_uppercase, names))


def usual_variant(groups):
    return min((group["variant"] for group in groups), default="")  # "", unless all runs have one


def usual_groups(groups):
    """Machine A's, without those of an unusual variant."""
    here, usual = machines(groups).get("A"), usual_variant(groups)
    return [group for group in groups if machine(group) == here and group["variant"] == usual]


def read_confusion(group):
    """(classes, confusion matrix of integers) of the first run."""
    rows = read_csv(group["folder"] / "confusion.csv")
    return [row.pop("true") for row in rows], np.array([[int(v) for v in row.values()] for row in rows])


def f1_of(confusion):
    return 2 * confusion.diagonal() / np.maximum(1, confusion.sum(0) + confusion.sum(1))


def bench_steps(text):
    """Rows of bench.txt on task 1, one per batch size: [batch, three times, speed "as users run it", speed
    "kernel for kernel"].

    On a GPU only the latter is measured: its rows come last, with its name and the times of that comparison.
    """
    sections = re.split(r"^kernel for kernel, (.+):.*", text, flags=re.M)[1:]  # the CPU's is the last one
    median, rows = r" +([\d.]+)x? \(([\d.]+)-([\d.]+)\)", {}  # and the quartiles
    for batch, *times, speed, low, high in re.findall(rf"^ +(\d+){4 * median}$", text, re.M):
        rows[batch] = [batch, *(f"{ms} ms" for ms in times[::3]), f"{speed}× ({low}–{high})", ""]
    line = r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)x"
    for device, section in zip(sections[::2], sections[1::2]):
        for batch, *times, speed in re.findall(line, section, re.M):
            name = batch if device == sections[-2] else f"{batch} {device}"
            rows.setdefault(name, [name, *(f"{ms} ms" for ms in times), "", ""])[-1] = f"{speed}×"
    return list(rows.values())


def bench_sections(text):
    """(hardware, its usual precision, rows, rates) of each part of bench.txt on task 2."""
    parts, seen = re.split(r"^(.+, torch [\d.]+)\S*, 224 px.*", text, flags=re.M)[1:], collections.Counter()
    for hardware, section in zip(parts[::2], parts[1::2]):
        section = section.replace("contiguous_format", "NCHW")
        rates = re.findall(r"^full, (\w+, \w+) +([\d.]+)$", section, re.M)
        rows = re.findall(r"^(.+?) +usual +([\d.]+) +ours +([\d.]+) +([\d.]+)x", section, re.M)
        precision = rates[0][0].split(",")[0]
        hardware += ", without bf16" if precision == "float32" else f", with {precision}"
        seen[hardware] += 1
        again = f" (run {seen[hardware]})" if seen[hardware] > 1 else ""
        yield hardware + again, precision, rows, rates
