"What `vdc_train --plan` counts, held to what a real step keeps; and the tally of mistakes, held to scikit-learn's."
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import confusion_matrix
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from vitdynconv.models.registry import create_model
from vitdynconv.tools.compat import memory_changes
from vitdynconv.train.learner import parameter_groups
from vitdynconv.train.mistakes import WORST, Tally, better_network, newest_is_best, tally_of
from vitdynconv.train.plan import Gpus, PlannedImages, StepMemory, moment_bytes, run_cost, share_of, step_bytes, step_memory
from vitdynconv.train.recipes import RECIPES

SMALL = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
SWIN = dict(img_size=112, depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 4, 8), num_classes=5)
NETWORKS = {  # name -> body, arguments, batch
    "softmax": ("deit_tiny_patch16_224", SMALL | dict(img_size=224), 16),
    "one block": ("deit_tiny_patch16_224", SMALL | dict(img_size=112, depth=1), 64),
    "softmax, relative position": ("deit_tiny_patch16_224", SMALL | dict(img_size=224, pos="rel", depth=4), 8),
    "ln_relu": ("deit_tiny_patch16_224", SMALL | dict(img_size=224, activation="ln_relu"), 16),
    "depthwise": ("deit_tiny_patch16_224", SMALL | dict(img_size=224, kernel="depthwise", activation="scaling"), 16),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 16),
    "swin, ln_relu": ("swin_tiny_patch4_window7_224", SWIN | dict(activation="ln_relu"), 16),
}


def peak_of_real_steps(make, recipe, images):
    "The most memory that two steps of training held on the CPU, by what the allocator reports to the profiler."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = make().train()
        optimizer = create_optimizer_v2(parameter_groups(model, recipe.weight_decay, recipe.layer_decay), lr=1e-3, **recipe.arguments("optimizer"))
        inputs, labels = torch.randn(images, 3, recipe.img_size, recipe.img_size), torch.randint(5, (images,))
        for _ in range(2):
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    changes = memory_changes(profiler)
    assert len(changes) > 100
    return np.cumsum(changes).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_of_a_step_is_that_of_a_real_one(name):
    "Never too little: a batch that is said to fit has to fit."
    body, arguments, images = NETWORKS[name]
    recipe = RECIPES["deit_s"].replace(img_size=arguments["img_size"], ema=False)
    make = lambda: create_model(body, **arguments)
    with torch.device("meta"): model = make()
    memory = step_memory(model, recipe, device="cpu")
    planned = memory.fixed + memory.passes(images)
    assert 0.99 < planned / peak_of_real_steps(make, recipe, images) < 1.1


def test_a_gpu_keeps_no_matrix_of_attention():
    "It has fused kernels, also where the position is learned; then one gradient of the size of the matrix is there for a moment."
    def memory(device, **more):
        with torch.device("meta"): model = create_model("deit_tiny_patch16_224", img_size=224, **SMALL | dict(depth=6), **more)
        return step_memory(model, RECIPES["deit_s"], device=device)
    matrix = 4 * 3 * 197 ** 2
    plain, learned, steps = memory("cuda"), memory("cuda", pos="rel"), memory("cpu", pos="rel")
    assert memory("cpu").per_image == plain.per_image
    assert plain.per_image < learned.per_image < plain.per_image + 1.1 * matrix < steps.per_image - 3 * matrix
    assert learned.once > 6 * 4 * 3 * 196 ** 2 > plain.once  # the bias of each block, whatever the batch


def test_the_plan_of_a_tiny_network_is_sober(capsys):
    from vitdynconv.train.run import vdc_train
    vdc_train(plan=True, embed_dim="8", depth="1", num_heads="1", epochs="1")
    said = capsys.readouterr().out
    assert "largest batch on a GPU of 80 GB: all 1,437 at once" in said and "MB" in said
    numbers = [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w.])", said.replace("25e12", ""))]
    assert len(numbers) > 10 and all(not number or 1e-4 < number < 1e5 for number in numbers), said


def test_every_part_of_a_step_is_counted():
    recipe = RECIPES["digits"].replace(ema=True, model_args={})
    with torch.device("meta"): model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, class_token=False, global_pool="avg", **SMALL)
    memory = step_memory(model, recipe)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory.weights == memory.gradients == memory.average == weights and memory.moments == pytest.approx(2 * weights, rel=1e-3)
    assert memory.passes(6) == pytest.approx(step_bytes(model.train(), torch.empty(6, 1, 16, 16, device="meta")), rel=1e-3)
    assert step_memory(model, recipe.replace(amp="bf16")).per_image == pytest.approx(memory.per_image * 2 / 3)
    assert step_memory(model, recipe.replace(ema=False)).average == 0
    with torch.device("meta"): tables = create_model("vit_tiny_patch16_224", pos="rel", img_size=16, patch_size=4, in_chans=1, **SMALL)
    whole, half = (step_memory(tables, recipe.replace(amp=amp)) for amp in ("", "bf16"))
    assert whole.once > 0 and (half.once, half.per_image) == pytest.approx((whole.once * 2 / 3, whole.per_image * 2 / 3))
    shared = step_memory(model, recipe.replace(shard=True), gpus=4)
    assert shared.fixed == pytest.approx(memory.fixed / 4) and shared.per_image == memory.per_image
    assert moment_bytes(model, recipe.replace(opt="sgd")) == weights


def test_the_largest_batch_is_the_largest():
    memory = StepMemory(1e9, 1e9, 2e9, 1e9, per_image=7e7)
    found = memory.largest_batch(16e9)
    needed = lambda images: memory.fixed + images * memory.per_image
    assert found % 2 == 0 and needed(found) <= 0.9 * 16e9 < needed(found + 2)
    assert memory.largest_batch(5e9) == 0


def test_time_is_multiply_adds_over_speed():
    recipe = RECIPES["deit_s"].replace(epochs=10, warmup_epochs=1.)
    cost = run_cost(recipe, PlannedImages(10_240, 1000, decoded=100.), 4.6, Gpus(4, speed=20.))
    assert cost.steps == 100 and cost.gpu_hours == pytest.approx(3 * 4.6e9 * 102_400 / 20e12 / 3600)
    assert cost.hours == pytest.approx(cost.gpu_hours / 4) and cost.cores == np.ceil(102_400 / (cost.hours * 3600) / 100)
    tiny = run_cost(recipe, PlannedImages(10_240, 1000, decoded=0.), 1e-6, Gpus(4))   # a step takes 0.02 s at least, on all GPUs at once
    assert (tiny.hours, tiny.gpu_hours, tiny.images_per_second, tiny.cores) == pytest.approx((100 * .02 / 3600, 4 * 100 * .02 / 3600, 102_400 / 2, 0))
    assert share_of(recipe, Gpus(4)) == 256
    with pytest.raises(ValueError, match="does not split over 3 GPUs"): share_of(recipe, Gpus(3))


def test_mistakes_are_counted_as_scikit_learn_does():
    torch.manual_seed(0)
    logits, labels, images = torch.randn(57, 4), torch.randint(4, (57,)), torch.rand(57, 1, 3, 3)
    tally = Tally()
    for part in range(0, 57, 10): tally.add(logits[part:part + 10], labels[part:part + 10], images[part:part + 10])
    assert tally.counts.tolist() == confusion_matrix(labels, logits.argmax(1), labels=range(4)).tolist()
    losses = F.cross_entropy(logits, labels, reduction="none")
    worst = losses.argsort(descending=True)[:WORST]
    assert torch.equal(tally.worst[0], losses[worst]) and torch.equal(tally.worst[3], images[worst])
    assert torch.equal(tally.worst[1], labels[worst]) and torch.equal(tally.worst[2], logits.argmax(1)[worst])


def random_states(): return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


def test_a_tally_made_afterwards_is_of_the_network_in_use():
    "Nothing drops out, and the random numbers of the run stay those that they were."
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(9, 4)).train()
    images, labels = torch.randn(57, 1, 3, 3), torch.randint(4, (57,))
    def batches():
        for part in range(0, 57, 10):
            drawn.append((torch.rand(1), np.random.rand(), random.random()))
            yield images[part:part + 10], labels[part:part + 10]
    drawn, before = [], random_states()
    tally = tally_of(network, batches())
    assert len(drawn) == 6 and random_states() == before
    guesses = (images.flatten(1) @ network[2].weight.T + network[2].bias).argmax(1)
    assert tally.counts.tolist() == confusion_matrix(labels, guesses, labels=range(4)).tolist()


@pytest.mark.parametrize("accuracies, averaged, best, average", [([.5], [.6], True, True), ([.6], [.5], True, False), ([.5], [.5], True, False), ([.5], [None], True, False),
                                                                ([.4, .5], [.7, .6], False, True), ([.4, .5], [.3, .6], True, True), ([.8, .5], [.3, .4], False, False)])
def test_what_the_newest_epoch_leaves(accuracies, averaged, best, average):
    "The more accurate of the network and its average, and only if no epoch before was better."
    history = [dict(epoch=epoch, accuracy=a, ema_accuracy=b) for epoch, (a, b) in enumerate(zip(accuracies, averaged), 1)]
    learn = SimpleNamespace(history=history, model=nn.Identity(), weight_average=SimpleNamespace(average=SimpleNamespace(module="average")))
    assert newest_is_best(history) == best and better_network(learn) is ("average" if average else learn.model)


def test_several_processes_gather_their_mistakes(monkeypatch):
    from vitdynconv.train import mistakes
    torch.manual_seed(0)
    logits, labels, images = torch.randn(40, 3), torch.randint(3, (40,)), torch.rand(40, 1, 2, 2)
    whole, halves = Tally(), [Tally(), Tally()]
    whole.add(logits, labels, images)
    for number, half in enumerate(halves): half.add(logits[number::2], labels[number::2], images[number::2])
    monkeypatch.setattr(mistakes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mistakes.dist, "get_world_size", lambda: 3)
    def gather(parts, mine): parts[:] = [[half.counts, half.worst] for half in halves] + [[None, None]]  # one has seen no picture
    monkeypatch.setattr(mistakes.dist, "all_gather_object", gather)
    together = mistakes.gathered(halves[0])
    assert torch.equal(together.counts, whole.counts) and all(map(torch.equal, together.worst, whole.worst))
