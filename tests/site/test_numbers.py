"Numbers that the prose repeats are those of the files that they come from."
import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from vitdynconv.models.paper import TABLE2, TABLE3

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"


def prose(page):
    cells = json.loads((NBS/page).read_text())["cells"]
    return " ".join("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").split())


def lines(file):
    with open(NBS/file, newline="") as opened: return list(csv.DictReader(opened))


def accuracies():
    "Percent right after the last epoch, of every seed: (base, activation, kernel, pos, class token) -> list."
    last = {}
    for row in lines("results/convergence/digits/history.csv"):
        network = row["base"], row["activation"], row["kernel"], row["pos"], row["cls"] == "True"
        last[network, row["seed"]] = 100 * float(row["accuracy"])
    found = defaultdict(list)
    for (network, _), accuracy in last.items(): found[network].append(accuracy)
    return found


def test_where_the_networks_of_the_study_end():
    text, ends = prose("study/05_predictions.ipynb"), [mean(values) for values in accuracies().values()]
    assert f"end between {min(ends):.0f} and {max(ends):.0f}%" in text
    vit, swin = (100 * float(row["accuracy on held-out training images"]) for row in lines("results/convergence/pilots.csv")
                 if row["remark"].endswith("taken for the study"))
    assert f"ended at {vit:.1f} and {swin:.1f}%" in text


def test_the_first_page_quotes_the_paper():
    text = prose("index.ipynb")
    top1 = {(row["base"], row["activation"], row["kernel"], row["pos"]): row["top1"] for row in TABLE3}
    lost = [accuracy - top1[base, "scaling", "depthwise", pos] for (base, activation, _, pos), accuracy in top1.items()
            if activation == "softmax" and pos == "rel"]
    assert len(lost) == 4 and f"loses {min(lost):.1f} to {max(lost):.1f} points" in text
    swin = {row["activation"]: row["top1"] for row in TABLE2 if row["base"] == "swin_t" and row["pos"] == "rel"}
    assert f"from {swin['softmax']:.2f} to {swin['ln_relu']:.2f} %" in text


def test_the_accuracies_of_the_six_activations():
    "The page on activations prints Table 2: base, position and class token are the columns."
    columns = {"DeiT-S, Abs, class token": ("deit_s", "abs", True), "DeiT-S, Rel, class token": ("deit_s", "rel", True),
               "DeiT-S, Rel, mean": ("deit_s", "rel", False), "Swin-T, Abs": ("swin_t", "abs", False), "Swin-T, Rel": ("swin_t", "rel", False)}
    top1 = {(row["base"], row["pos"], row["class_token"], row["activation"]): row["top1"] for row in TABLE2}
    page = "\n".join("".join(c["source"]) for c in json.loads((NBS/"layers/02_activations.ipynb").read_text())["cells"])
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert head[1:] == [*columns] and len(rows) == 6
    printed = {(*columns[name], row[0].strip("`")): float(cell) for row in rows for name, cell in zip(head[1:], row[1:]) if cell}
    assert printed == top1


def test_the_missed_goals_of_the_page_on_speed():
    "The page names them in words: scaling and ln from 197 on, ReLU in windows, ln_relu up to 197, relative position."
    missed = defaultdict(set)
    rows = [row for row in lines("results/speed.csv") if row["met"] == "no"]
    for row in rows: missed[row["work"]].add(int(row["size"].split("=")[1]))
    assert missed == {"scaling": {197, 784, 3136}, "ln": {197, 784, 3136}, "scaling_relu": {49}, "ln_relu": {49, 197}, "relative position": {3136}}
    limit = {(row["work"].endswith("gradients"), row["size"]): float(row["ratio"]) for row in lines("results/speed.csv") if row["work"].startswith("matrix-product limit")}
    slower = {size for (training, size), ratio in limit.items() if training and ratio > 1}
    assert slower == {"N = 49", "N = 197"} and "at 49 and at 197 positions fused softmax is faster" in prose("results/speed.ipynb")


def test_a_whole_swin_with_scaling():
    ratio = {row["work"]: float(row["ratio"]) for row in lines("results/speed.csv") if row["suite"] == "model"}
    for base in ("swin_t", "swin_b"):
        assert ratio[f"{base} scaling rel, inference"] > ratio[f"{base} softmax rel, inference"]
        assert ratio[f"{base} softmax rel, training"] - .06 < ratio[f"{base} scaling rel, training"] < ratio[f"{base} softmax rel, training"]
    assert "slower than one with softmax in inference, and a little faster in training" in prose("fast/00_products.ipynb")


def test_sizes():
    assert f"70,000 x 28 x 28, {70_000 * 28 ** 2 / 1e6:.0f} MB" in prose("data/03_fashion.ipynb")
    files = list((ROOT/"vitdynconv/bundled").glob("*.safetensors"))
    assert len(files) == 7 and sum(file.stat().st_size for file in files) < 2e6, "smaller than one photograph of a camera"
