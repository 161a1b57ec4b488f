"""Every number of the sentences in report.tex, from a folder of finished runs."""

import collections
import re

import numpy as np
import runs

COMPARED = {  # two groups of scopes_of(): what the first gains on the second
    "unfreezing": ("small/partial_unfreeze", "small/linear_probe"),
    "full": ("small/full", "small/partial_unfreeze"),
    "gradual": ("small/gradual", "small/partial_unfreeze"),
    "size": ("large/partial_unfreeze", "same/partial_unfreeze"),
    "no cache": ("no cache/partial_unfreeze", "same/partial_unfreeze"),
    "float32": ("float32/partial_unfreeze", "mixed/partial_unfreeze"),
    "augmented": ("augmented/partial_unfreeze", "same/partial_unfreeze"),
    "pretrained": ("same/full", "random weights/full"),
    "more, probe": ("main/linear_probe", "fewer/linear_probe"),
    "more, partial": ("main/partial_unfreeze", "fewer/partial_unfreeze"),
}


def numbers_of(results):
    r"""Name -> text of every number in the report's sentences; report.tex shows it by \R{name}."""
    cnn, resnet = runs.read_groups(results)
    bench, tests = (runs.read_text(results / name) for name in ("bench.txt", "tests.txt"))
    recipes = {group["recipe"]: group for group in reversed(cnn)}  # MNIST's runs replace those on the digits
    recipes = {"mnist": recipes.get(runs.DEFAULT), "course": recipes.get(runs.COURSE)}
    named = {name: runs.mnist_cells(group) for name, group in recipes.items() if group}
    scopes = scopes_of(resnet) if resnet else {}
    named |= {name: runs.emnist_cells(group) for name, group in scopes.items()}
    for name, (group, base) in COMPARED.items():
        if group in scopes and base in scopes:
            named[name] = difference(scopes[group], scopes[base])
    if "best" in scopes:
        named["alike"] = alike_numbers(scopes["best"]) | {"run": runs.name_of(scopes["best"])}
    named["table"] = {"machines": "; ".join(f"{k}: {v}" for k, v in runs.machines(resnet).items())}
    named["progress"] = {"points": f"{100 * runs.constant('resnet18.py', 'MIN_DELTA'):g}"}
    named |= bench_numbers(bench) | {"tests": test_numbers(tests)}
    return {f"{name}/{key}": text for name, texts in named.items() for key, text in texts.items()}


def scopes_of(groups):
    """Name -> group: "main/full" is on the most images, "small/full" of the size with the most runs.

    The following have only the seeds that all runs on as many images share, so that a difference between them
    does not come from the seed: "same/full" of small's image size, "fewer/full" of main's, "large/full" of
    the largest, "augmented/full" and so on for the variants. "mixed/full" and "float32/full" are of one
    machine, too. "best" is main's best on validation.
    """
    here = runs.machines(groups)["A"]
    groups = sorted(groups, key=lambda group: runs.machine(group) == here)  # the last one of a name is taken
    usual = runs.usual_variant(groups)
    sizes = collections.Counter(g["size"] for g in groups if g["variant"] == usual for _ in g.runs)
    main, small = max(sizes), max(sizes, key=sizes.get)
    peers = [group for group in groups if group["size"][0] == small[0]]
    seeds = set.intersection(*({run["seed"] for run in group.runs} for group in peers))

    def at(size, variant=usual):
        return [group for group in groups if (group["size"], group["variant"]) == (size, variant)]

    def same_seeds(*where):
        return [runs.Group([run for run in g.runs if run["seed"] in seeds] or g.runs) for g in at(*where)]

    scopes = {"main": at(main), "small": at(small), "same": same_seeds(small)}
    scopes["fewer"] = same_seeds((small[0], main[1])) if main[0] > small[0] else []
    largest = max(size for size in sizes if size[0] == small[0])
    scopes["large"] = same_seeds(largest) if largest != small else []
    variants = "augmented", "no cache", "random weights", "course's recipe"
    scopes |= {name: same_seeds(small, name) for name in variants}
    named = {f"{name}/{group['regime']}": group for name, members in scopes.items() for group in members}
    for kind in ("bf16", "fp16", "float32"):  # whichever is not the usual precision
        for group in same_seeds(small, kind):
            for other in same_seeds(small):
                if runs.machine(group) == runs.machine(other) and group["regime"] == other["regime"]:
                    pair = sorted((group, other), key=lambda g: g["amp"] == "off")
                    named |= {f"{name}/{g['regime']}": g for name, g in zip(("mixed", "float32"), pair)}
    return named | {"best": max(scopes["main"], key=lambda group: group.mean("val_accuracy"))}


def difference(group, base):
    """Points of test accuracy that a group gains on another one, also by seed; time and images as factors."""
    points = round(group.accuracy - base.accuracy, 6)
    before = {run["seed"]: run["test_accuracy"] for run in base.runs}
    paired = [run for run in group.runs if run["seed"] in before]
    gains = [100 * (run["test_accuracy"] - before[run["seed"]]) for run in paired]
    return {
        "points": f"{points:.1f}" if abs(points) >= 0.05 else "0.0",
        "paired": runs.spread(gains) if gains else "n/a",
        "lowest": f"{min(gains):.2f}" if gains else "n/a",
        "times": f"{group.cost / base.cost:.1f}",
        "images": f"{group['samples_per_epoch'] / base['samples_per_epoch']:.1f}",
    }


def alike_numbers(group):
    """How far one gets without telling characters apart that are drawn alike, and how far this run gets."""
    classes, confusion = runs.read_confusion(group)
    if not set("".join(runs.ALIKE)) <= set(classes):
        return {}
    group_of = {name: alike for alike in runs.ALIKE for name in alike}
    look = np.array([group_of.get(name, name) for name in classes])
    images, total, right = confusion.sum(1), confusion.sum(), confusion.trace()
    merged = confusion[look[:, None] == look].sum()
    guesses = {kind: images[look == kind].max() for kind in set(look)}
    hits = {kind: confusion.diagonal()[look == kind].sum() for kind in set(look)}
    f1 = runs.f1_of(confusion)
    worst = np.argsort(f1, kind="stable")[:4]
    misread = sum(confusion[k, look == look[k]].sum() - confusion[k, k] for k in worst)
    return {
        "all hits": f"{sum(hits[kind] for kind in runs.ALIKE):,}",
        "all guesses": f"{sum(guesses[kind] for kind in runs.ALIKE):,}",
        "worst": ", ".join(f"{classes[k]} ({f1[k]:.2f})" for k in worst),
        "misread": f"{100 * misread / images[worst].sum():.0f}",
        "ceiling": f"{100 * sum(guesses.values()) / total:.1f}",
        "merged": f"{100 * merged / total:.1f}",
        "share": f"{100 * (merged - right) / (total - right):.0f}",
        "names": ", ".join("/".join(alike) for alike in runs.ALIKE),
        "images": f"{total:,}",
    }


def bench_numbers(text):
    """Task 1's step, task 2's speeds; of hardware with mixed precision, they are "speed mixed" and so on."""
    steps = runs.bench_steps(text)
    named = {"step": {row[0]: row[4].split("×")[0] for row in steps}}
    named["step"]["on"] = "".join(re.findall(r"^(.+, torch [\d.]+)\S*, float32$", text, re.M))
    named["kernels"] = {row[0]: row[5].rstrip("×") for row in steps}
    sections = list(runs.bench_sections(text))
    plain = [section for section in sections if section[1] == "float32"] or sections
    mixed = [section for section in sections if section[1] != "float32"]
    for kind, found in (("", plain), (" mixed", mixed)):
        named["speed" + kind] = ranges({k: v for k, *_, v in rows} for _, _, rows, _ in found)
        rates = [{k: float(v) for k, v in rates} for *_, rates in found]
        named["technique" + kind] = ranges({k: v / r["float32, NCHW"] for k, v in r.items()} for r in rates)
    return named


def ranges(measurements):
    """Name -> "1.2 to 1.5", or "1.3" of a single measurement, from dicts of name -> number."""
    values = collections.defaultdict(list)
    for name, value in (item for one in measurements for item in one.items()):
        values[name].append(float(value))
    ends = {name: (f"{min(v):.1f}", f"{max(v):.1f}") for name, v in values.items()}
    return {name: low if low == high else f"{low} to {high}" for name, (low, high) in ends.items()}


def test_numbers(text):
    """One sentence on the output of tests.py."""
    tests = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped", text, re.M)
    skipped = collections.Counter(re.findall(r"SKIPPED: (.+) here$", text, re.M))
    reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
    told = "{} tests pass, {} fail, {} are skipped" + (f": {reasons}" if reasons else "")
    return {"summary": told.format(*tests.groups()).replace(" 0 fail", " none fails")} if tests else {}
