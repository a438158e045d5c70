"Programs that know nothing of this library, run by `python -m vitdynconv.tools.timm`."
import json
import os
import subprocess
import sys

from safetensors import safe_open
from test_practitioner import home  # noqa: F401 (a fixture)

from vitdynconv import load_run, predict
from vitdynconv.train.export import vdc_export

VALIDATE = '''
import argparse, json
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, ParseKwargs, accuracy

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--checkpoint", default="")
parser.add_argument("--config", type=json.loads)

def main():
    args = parser.parse_args()
    assert timm.is_model(args.model) and timm.list_models("vdc_*")
    model = timm.create_model(args.model, checkpoint_path=args.checkpoint, **args.model_kwargs).eval()
    config = resolve_data_config(args.config, model=model)
    loader = create_loader(create_dataset("", args.data, search_split=False), batch_size=4, use_prefetcher=False, num_workers=0, **config)
    top1 = AverageMeter()
    with torch.no_grad():
        for images, labels in loader: top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    optimizer = create_optimizer_v2(model.train(), "adamw", lr=1e-3)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    print(json.dumps(dict(images=top1.count, top1=top1.avg / 100)))

if __name__ == "__main__": main()
'''


def run(*words):
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "vitdynconv.tools.timm", *map(str, words)], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(PYTHONWARNINGS="ignore"))


def test_an_unedited_script_validates_and_trains_a_model_of_this_library(home, tmp_path):
    "The same accuracy as `predict`, from the weights that `vdc_export` wrote."
    (tmp_path/"validate.py").write_text(VALIDATE)
    vdc_export(run=str(home/"RUN"), format="timm", out=str(tmp_path/"weights.safetensors"))
    with safe_open(tmp_path/"weights.safetensors", "pt") as file: about = file.metadata()
    kwargs = json.loads(about["arguments"]) | dict(activation="softmax")
    config = dict(input_size=[3, 16, 16], mean=json.loads(about["mean"]), std=json.loads(about["std"]),
                  crop_pct=json.loads(about["crop_pct"]), interpolation=json.loads(about["interpolation"]))
    done = run(tmp_path/"validate.py", home/"pictures", "--model", f"vdc_{about['model'].removeprefix('vdc_')}", "--checkpoint", tmp_path/"weights.safetensors",
               "--config", json.dumps(config), "--model-kwargs", *(f"{name}={value!r}" for name, value in kwargs.items()))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    said = predict(load_run(home/"RUN"), home/"pictures")
    right = [f"/{each.label}/" in each.image for each in said]
    assert found == dict(images=36, top1=sum(right) / 36)


def test_a_missing_script_is_one_line(tmp_path):
    for words in [], [tmp_path/"none.py"]:
        done = run(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SCRIPT [ARGUMENTS]" in done.stderr


def test_what_a_script_raises_is_its_own(tmp_path):
    (tmp_path/"script.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    done = run(tmp_path/"script.py", "--a", "b")
    assert done.returncode == 7 and done.stdout == "['--a', 'b']\n"
