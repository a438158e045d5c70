"The commands that the tutorials print, tried as a reader would type them."
import inspect
import json
import os
import re
import shlex
import subprocess

import pytest
from conftest import NBS, cells
from forks import run
from PIL import Image
from test_practitioner import COLOURS, write_pictures

from vitdynconv.tools.cli import CommandParser, options_of
from vitdynconv.train.recipes import recipe_options
from vitdynconv.train.run import planned_recipe, vdc_train


def code_blocks(name):
    "The blocks of code in the text of a tutorial."
    text = "\n".join("".join(cell["source"]) for cell in cells(NBS/f"tutorials/{name}.ipynb", "markdown"))
    return re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)


def road():
    "The five commands of the page about pictures."
    block = next(block for block in code_blocks("pictures") if "vdc_train --data" in block)
    return block.strip().splitlines()


def test_the_road_has_five_short_commands():
    assert [line.split()[0] for line in road()] == ["vdc_train", "vdc_eval", "vdc_predict", "vdc_export", "vdc_train"]
    assert all(len(line) < 80 for line in road())


def test_the_command_for_pretrained_weights_works(tmp_path):
    "As printed, with a network that comes with the library in the place of DeiT-S, and smaller batches."
    write_pictures(tmp_path/"pictures")
    block, = [block for block in code_blocks("pictures") if "--recipe finetune" in block]
    name, *words = shlex.split(block.replace("\\\n", " "))
    words = ["4" if word == "32" else "2" if word == "10" else word for word in words]
    smaller = "--model vdc_vit_fashion --img_size 28 --in_chans 1 --workers 0".split()
    code, out, errors = run(tmp_path, *words, *smaller, command=name)
    assert code == 0, errors
    assert "recipe finetune: vdc_vit_fashion, activation softmax" in out and (tmp_path/"RUN/best.safetensors").exists()


def as_people_have_them(root, colours=COLOURS, images=12):
    "JPEG files from a telephone, a scanner and the web: in folders of folders, of every mode, lying on their side, with endings in capitals."
    side = Image.Exif()
    side[0x0112] = 6
    for name, colour in colours.items():
        for number in range(images):
            place = root/name/("2019/summer" if number % 3 == 0 else "")/f"IMG {number:02}{('.jpg', '.JPG', '.jpeg', '.jpe')[number % 4]}"
            place.parent.mkdir(parents=True, exist_ok=True)
            mode = {5: "L", 7: "CMYK"}.get(number, "RGB")
            Image.new("RGB", (40 + number, 30), colour).convert(mode).save(place, "JPEG", **(dict(exif=side) if number % 2 else {}))
        Image.new("RGB", (30, 30), colour).quantize(8).save(root/name/"drawing.gif")
        (root/name/"notes.txt").write_text("found in the attic")
    return root


@pytest.mark.slow
def test_the_road_from_a_folder_to_a_prediction(tmp_path):
    as_people_have_them(tmp_path/"pictures")
    write_pictures(tmp_path/"new_pictures", images=2)
    for line in road():
        name, *words = shlex.split(line)
        code, out, errors = run(tmp_path, *words, command=name)
        assert code == 0, f"{line}: {errors}"
        if name == "vdc_train" and "--data" in words: assert "30 training images" in out and "left out: 3 x .txt" in out, out
    record = json.loads((tmp_path/"RUN/run.json").read_text())
    assert record["in_chans"] == 3 and sum(count for count, _ in record["fingerprint"]["parts"]["train"].values()) == 30, record
    assert "going on after epoch 20 of 20" in out
    rows = (tmp_path/"names.csv").read_text().splitlines()
    assert len(rows) == 7 and (tmp_path/"pictures.onnx").stat().st_size > 10_000
    right = [row.split(",")[0].split("/")[1] == row.split(",")[1] for row in rows[1:]]
    assert all(right), rows


def train_words(words):
    "The arguments of `vdc_train` on a line of torchrun, checked by its own parser."
    return CommandParser("vdc_train", "", [*options_of(inspect.unwrap(vdc_train)), *recipe_options()]).parse(words)


def test_every_command_line_of_the_imagenet_page_is_understood():
    from torch.distributed.run import get_args_parser
    found = 0
    for block in code_blocks("imagenet"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if not words or words[0] not in ("torchrun", "vdc_train") or "$" in line: continue
            if words[0] == "torchrun":
                parsed = get_args_parser().parse_args(words[1:])
                assert parsed.module and parsed.training_script == "vitdynconv.train.run"
                words = ["vdc_train", *parsed.training_script_args]
            options = train_words(words[1:])
            fields = {option.name: options.pop(option.name) for option in recipe_options()}
            if not options["resume"]: planned_recipe(fields, options)
            found += 1
    assert found >= 6


STUBS = {
    "scontrol": 'echo "$@" > scontrol.txt; printf "node-07\\nnode-08\\n"',
    "srun": 'printf "%s\\n" "$@" > srun.txt',
}


def test_the_slurm_script_tells_torchrun_what_it_needs(tmp_path):
    "The script of the page runs under a shell; `scontrol` and `srun` are stand-ins that write down what they are told."
    script, = [block for block in code_blocks("imagenet") if "#SBATCH" in block]
    (tmp_path/"job.sh").write_text(script)
    for name, body in STUBS.items():
        (tmp_path/name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path/name).chmod(0o755)
    told = dict(SLURM_JOB_NODELIST="node-[07-10]", SLURM_JOB_NUM_NODES="4", SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="4711", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert set(re.findall(r"\$(SLURM_\w+)", script)) == {name for name in told if name.startswith("SLURM")}
    subprocess.run(["bash", "-eu", "job.sh"], cwd=tmp_path, env=told, check=True)
    assert (tmp_path/"scontrol.txt").read_text().split() == ["show", "hostnames", "node-[07-10]"]
    launcher, *words = (tmp_path/"srun.txt").read_text().splitlines()
    from torch.distributed.run import get_args_parser
    parsed = get_args_parser().parse_args(words)
    assert launcher == "torchrun" and parsed.module and parsed.training_script == "vitdynconv.train.run"
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_id, parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.max_restarts) == ("4", "8", "4711", "c10d", "node-07:29500", 3)
    options = train_words(parsed.training_script_args)
    assert options["resume"] == "auto" and options["out"]
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("4", "8", "1")
    assert int(asked["cpus-per-task"]) >= 8 * (int(options["workers"]) + 1), "a core for each decoder and each process"
