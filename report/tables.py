"""Turns a folder of finished runs into the report's numbers, tables and figures; no number is typed by hand.

    python report/tables.py RESULTS OUT    numbers, tables and figures for report.tex, into OUT
    python report/tables.py --readme       README.md's tables and picture, from report/results

Runs are found by their metrics.json, whatever their folders are called. RESULTS may also hold bench.txt and
tests.txt (the output of "python tests.py bench" and "python tests.py"), a folder cluster (logs of batch jobs)
and note.txt (what a reader must know of these runs). Whatever is missing appears as n/a in the report.
"""

import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import figures
import runs
from sentences import numbers_of, scopes_of

# ---------------------------------------------------------------------------------------------- tables


def table_of(rows, *columns):
    return [list(columns), *([row[k] for k in columns] for row in rows)]


def mnist_table(results):
    rows = [runs.mnist_cells(group) for group in runs.read_groups(results)[0]]
    return table_of(rows, "recipe", "seeds", "test accuracy", "lowest to highest", "training", "on")


def emnist_table(results):
    columns = ["images", "px", "regime", "seeds", "accuracy (%)", "precision", "recall", "F1"]
    columns += ["epochs", "training", "in all", "on"]
    groups = runs.read_groups(results)[1]
    rows = [runs.emnist_cells(group) | {"accuracy (%)": runs.spread(group.accuracies)} for group in groups]
    letters = {name: letter for letter, name in runs.machines(groups).items()}
    for row, group in zip(rows, groups):
        row["on"] = letters[runs.machine(group)]
    return table_of(rows, *columns)


def short_list(groups):
    """README's: the usual runs on the smallest images, or on the most of them."""
    groups = runs.usual_groups(groups)
    images, px = [g["samples_per_epoch"] for g in groups], [g["image_size"] for g in groups]
    return [g for g in groups if g["image_size"] == min(px) or g["samples_per_epoch"] == max(images)]


def emnist_short_table(results):
    rows = [runs.emnist_cells(group) for group in short_list(runs.read_groups(results)[1])]
    rows = [row | {"images × px": f"{row['images']} × {row['px']}"} for row in rows]
    return table_of(rows, "regime", "images × px", "accuracy", "macro-F1", "trainable", "training")


def recipe_table(results):
    """The hyper-parameters, as the runs have recorded them; task 1's weight decay is its script's."""
    cnn, resnet = runs.read_groups(results)
    rows = {"task 1, " + runs.mnist_cells(group)["recipe"]: group["recipe"] for group in cnn}
    rows = {name: dict(zip(runs.RECIPE, recipe)) for name, recipe in rows.items()}
    for row in rows.values():
        decay = runs.constant("cnn_from_scratch.py", "WEIGHT_DECAY") if row["schedule"] == "onecycle" else 0
        row["weight_decay"] = decay
    for group in resnet:
        course = ", the course's recipe" if "course" in group["variant"] else ""
        if group["regime"] != "gradual":
            rows["task 2, " + group["regime"] + course] = group["stages"][0]
    keys = "lr", "momentum", "weight_decay", "batch_size", "epochs", "warmup_epochs", "patience"
    head = "", "learning rate", "momentum", "weight decay", "batch size", "epochs", "warm-up", "patience"
    return [head, *([name, *(f"{row[k]:g}" if k in row else "" for k in keys)] for name, row in rows.items())]


def step_table(results):
    head = ["batch", "torch.nn NCHW", "torch.nn channels_last", "by hand"]
    rows = runs.bench_steps(runs.read_text(results / "bench.txt"))
    return [[*head, "speed as users run it", "speed kernel for kernel"], *rows]


def regime_speed_table(results):
    sections = runs.bench_sections(runs.read_text(results / "bench.txt"))
    rows = [
        [f"{name} ({precision})", f"{usual} images/s", f"{ours} images/s", f"{factor}×", hardware]
        for hardware, precision, found, _ in sections
        for name, usual, ours, factor in found
    ]
    return [["224 px, batch 32", "usual loop", "here", "factor", "on"], *rows]


def technique_table(results):
    sections = runs.bench_sections(runs.read_text(results / "bench.txt"))
    rows = [[*rate, hardware] for hardware, _, _, rates in sections for rate in rates]
    return [["full, 224 px, batch 32", "images/s", "on"], *rows]


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


# ---------------------------------------------------------------------------------------------- report


def curves(lines):
    """The logs of the first runs of (label, group or None)."""
    return [(label, runs.read_csv(group["folder"] / "log.csv") if group else []) for label, group in lines]


def points(groups):
    """Name, regime's number, minutes, accuracy and its deviation of the usual runs, by training time."""
    for group in sorted(runs.usual_groups(groups), key=lambda g: g.cost):
        style, minutes = runs.REGIMES.index(group["regime"]), group.cost / 60
        yield runs.name_of(group), style, minutes, group.accuracy, group.deviation


def worst_classes(group, count=12):
    """The classes with the lowest F1, what they are read as, and in how many percent of their images."""
    classes, confusion = runs.read_confusion(group)
    f1, share = runs.f1_of(confusion), 100 * confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    rows = np.argsort(f1, kind="stable")[:count].tolist()
    columns = sorted({*rows, *np.flatnonzero(share[rows].max(0) >= 5).tolist()})
    group_of = {name: alike for alike in runs.ALIKE for name in alike}
    columns.sort(key=lambda k: group_of.get(classes[k], classes[k]).lower())
    names = [f"{classes[k]}  {f1[k]:.2f}" for k in rows], [classes[k] for k in columns]
    return *names, share[np.ix_(rows, columns)]


def copy_part(paths, target, box):
    """The first picture that is there, cut to left, upper, right, lower in pixels: a part prints larger."""
    for path in [path for path in paths if path.exists()][:1]:
        with Image.open(path) as picture:
            picture.crop(tuple(map(min, box, 2 * picture.size))).save(target)


def write_listing(path, source, wanted="", lines=50, width=112):
    """The last of a text's lines that match `wanted`, wrapped to the page's width."""
    kept = [line for line in runs.read_text(source).replace("±", "+-").splitlines() if re.match(wanted, line)]
    options = {"subsequent_indent": "    ", "break_on_hyphens": False}
    wrapped = [textwrap.fill(line, width, **options) for line in kept[-lines:] or ["n/a"]]
    path.write_text("\n".join(wrapped) + "\n")


def write_report(results, out):
    out.mkdir(parents=True, exist_ok=True)
    cnn, resnet = runs.read_groups(results)
    if not cnn and not resnet:
        raise SystemExit(f"error: no metrics.json of a finished run below {results}")
    macro = r"\expandafter\def\csname r:%s\endcsname{%s}"
    lines = [macro % (name, tex(text)) for name, text in numbers_of(results).items()]
    (out / "numbers.tex").write_text("\n".join(lines) + "\n")
    for name, table in TABLES.items():
        (out / f"table-{name}.tex").write_text(latex(table(results)))
    (out / "note.tex").write_text(tex(runs.read_text(results / "note.txt")))
    write_listing(out / "tests.txt", results / "tests.txt", r"SideBySide|Gradients|\d+ passed, ")
    for source in ("cnn.out", "vanished.out", "files.txt"):
        write_listing(out / f"{source[:-4]}.txt", results / "cluster" / source)
    lines = [(runs.mnist_cells(group)["recipe"], group) for group in cnn]
    figures.draw_curves(out / "mnist-curves.pdf", curves(lines))
    for picture, box in (("filters", (0, 26, 1400, 1400)), ("mistakes", (0, 26, 759, 340))):
        paths = [run["folder"] / f"{picture}.png" for group in cnn for run in group.runs]
        copy_part(paths, out / f"mnist-{picture}.png", box)
    if resnet:
        scopes = scopes_of(resnet)
        lines = [(regime, scopes.get(f"small/{regime}")) for regime in runs.REGIMES]
        figures.draw_curves(out / "curves.pdf", curves(lines))
        figures.draw_compute(out / "compute.pdf", points(resnet))
        folder = scopes["best"]["folder"]
        if (folder / "confusion.csv").exists():
            figures.draw_confusion(out / "confusion.pdf", *worst_classes(scopes["best"]))
        copy_part([folder.parent / "samples.png"], out / "samples.png", (0, 0, 1405, 455))
        copy_part([folder / "confusions_top.png"], out / "top.png", (0, 0, 1232, 945))


def main(argv):
    if argv == ["--readme"]:
        path, results = runs.ROOT / "README.md", runs.ROOT / "report" / "results"
        path.write_text(with_tables(path.read_text(), results))
        groups = short_list(runs.read_groups(results)[1])
        figures.draw_compute(results / "compute.png", points(groups), key=False)
    elif len(argv) == 2:
        write_report(Path(argv[0]), Path(argv[1]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
