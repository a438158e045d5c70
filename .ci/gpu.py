#!/usr/bin/env python3
"""What only a GPU can show, in ten minutes: tests, kernels against the definition, benchmark, a short training.

usage: gpu.py [FOLDER]   writes FOLDER/gpu.json and FOLDER/gpu.md (default: gpu)

On a machine without a GPU the same steps run on the CPU, small, with the kernels in Triton's interpreter.
"""
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU: os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
DEVICE = "cuda" if GPU else "cpu"
HEAD_SIZES = (8, 16, 24, 32, 48, 64, 80, 96, 128) if GPU else (8, 24, 64)
DTYPES = torch.float32, torch.half, torch.bfloat16


def facts():
    "What the rest was measured on."
    found = dict(device=platform.processor() or platform.machine(), python=platform.python_version(), torch=torch.__version__)
    if not GPU: return found | dict(kernels="in Triton's interpreter")
    properties = torch.cuda.get_device_properties(0)
    found |= dict(device=properties.name, capability=f"{properties.major}.{properties.minor}", cuda=torch.version.cuda)
    return found | dict(memory_gb=round(properties.total_memory / 2 ** 30, 1))


def tests():
    "The tests that need a GPU; on a CPU those of the kernels in the interpreter."
    which = ["-m", "cuda"] if GPU else ["-k", "triton"]
    command = [sys.executable, "-m", "pytest", "-q", *which, "tests"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if done.returncode: raise RuntimeError(done.stdout[-2000:])
    return done.stdout.strip().splitlines()[-1]


def kernels():
    "Each Triton kernel against the definition, forward and all gradients, for every dtype and head size."
    from vitdynconv.fast.triton import TOLERANCE, largest_gap
    rows = []
    for dtype in DTYPES:
        for head_dim in HEAD_SIZES:
            gap = largest_gap(torch.device(DEVICE), dtype, head_dim)
            rows.append(dict(dtype=str(dtype)[6:], head_dim=head_dim, gap=gap, tolerance=TOLERANCE[dtype]))
    wrong = [row for row in rows if not row["gap"] <= row["tolerance"]]
    if wrong: raise RuntimeError(f"kernels that differ from the definition: {wrong}")
    return rows


def core(amp):
    "The suite `core` of the benchmark."
    from vitdynconv.suites import core, models
    from vitdynconv.timing import Setting
    if not GPU: core.LENGTHS = (49,)
    return [vars(row) for row in core.core_rows(Setting(DEVICE, 4 if GPU else .01, amp=amp))]


def model(compiled):
    "The suite `model` of the benchmark, with AMP."
    from vitdynconv.suites import core, models
    from vitdynconv.timing import Setting
    setting = Setting(DEVICE, 2 if GPU else .01, batch=64 if GPU else 1, amp=True, compiled=compiled and GPU)
    bases = ("swin_t",) if compiled or not GPU else ("deit_s", "swin_t")  # compiling takes most of the time
    return [vars(row) for row in models.model_rows(setting, bases)]


def training(compiled):
    "Thirty steps of a small `ln_relu` network on four images, with AMP and channels last: the loss has to fall."
    from vitdynconv.models import create_model
    torch.manual_seed(0)
    size = dict(depth=4) if GPU else dict(depth=2, embed_dim=32, num_heads=2)
    network = create_model("deit_tiny_patch16_224", "ln_relu", pos="rel", img_size=64, num_classes=4, **size)
    network = network.to(DEVICE, memory_format=torch.channels_last)
    run = torch.compile(network, backend="inductor" if GPU else "aot_eager") if compiled else network
    images = torch.randn(4, 3, 64, 64, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.arange(4, device=DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=GPU)
    losses = []
    for _ in range(30 if GPU else 6):
        with torch.autocast(DEVICE, torch.half if GPU else torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    if not losses[-1] < losses[0]: raise RuntimeError(f"the loss did not fall: {losses}")
    return losses


STEPS = {
    "facts": facts,
    "tests": tests,
    "kernels against the definition": kernels,
    "core, float32": lambda: core(False),
    "core, AMP": lambda: core(True),
    "models, AMP": lambda: model(False),
    "models, AMP and compiled": lambda: model(True),
    "training, AMP and channels last": lambda: training(False),
    "training, AMP, channels last and compiled": lambda: training(True),
}


def run_step(step):
    "What came out, how long it took, and what was warned of."
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: outcome = dict(ok=True, result=step())
        except Exception: outcome = dict(ok=False, result=traceback.format_exc()[-3000:])
    ours = [str(w.message) for w in said if "vitdynconv" in str(w.message)]
    return outcome | dict(seconds=round(time.perf_counter() - start, 1), warnings=ours)


def table(rows):
    "Rows as a Markdown table, without empty columns."
    names = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    def show(value): return f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(show(row[name]) for name in names) + " |" for row in rows])


def page(results):
    "All results as one Markdown page."
    parts = ["# On this GPU" if GPU else "# Without a GPU, in Triton's interpreter"]
    for name, outcome in results.items():
        parts.append(f"## {name}: {'passed' if outcome['ok'] else 'FAILED'} ({outcome['seconds']} s)")
        parts += [f"Warning: {words}" for words in outcome["warnings"]]
        result = outcome["result"]
        if isinstance(result, list) and isinstance(result[0], dict): parts.append(table(result))
        elif isinstance(result, dict): parts.append(table([result]))
        elif isinstance(result, list): parts.append(" ".join(f"{x:.3f}" for x in result))
        else: parts.append(f"```\n{result}\n```")
    return "\n\n".join(parts) + "\n"


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, step in STEPS.items():
        print(f"{name} ...", end=" ", flush=True)
        results[name] = run_step(step)
        print("passed" if results[name]["ok"] else "FAILED", f"({results[name]['seconds']} s)", flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1))
        (folder / "gpu.md").write_text(page(results))
    print(f"written: {folder}/gpu.json, {folder}/gpu.md")
    return 0 if all(outcome["ok"] for outcome in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu")))
