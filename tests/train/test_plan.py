"What `vdc_train --plan` counts, held to what a real step keeps; and the tally of mistakes, held to scikit-learn's."
import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F

from vitdynconv.models.registry import create_model
from vitdynconv.train.mistakes import WORST, Tally
from vitdynconv.train.plan import Gpus, PlannedImages, StepMemory, moment_bytes, run_cost, saved_bytes, share_of, step_memory
from vitdynconv.train.recipes import RECIPES

SMALL = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
NETWORKS = {
    "softmax": dict(), "softmax, relative position": dict(pos="rel"), "ln_relu": dict(activation="ln_relu"), "depthwise": dict(kernel="depthwise", activation="scaling"),
}


def kept_by_a_real_step(model, images):
    "The memory of tensors that are saved for the backward pass, on the CPU, by the addresses of their memory."
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept, alive = {}, []
    def keep(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor): logits = model(images)
    assert logits.requires_grad
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_of_a_step_is_that_of_a_real_one(name):
    make = lambda: create_model("deit_tiny_patch16_224", img_size=64, **SMALL, **NETWORKS[name]).train()
    with torch.device("meta"): planned = saved_bytes(make(), torch.empty(4, 3, 64, 64))
    assert planned == pytest.approx(kept_by_a_real_step(make(), torch.zeros(4, 3, 64, 64)), rel=0.05)


def test_every_part_of_a_step_is_counted():
    recipe = RECIPES["digits"].replace(ema=True, model_args={})
    with torch.device("meta"): model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, class_token=False, global_pool="avg", **SMALL)
    memory = step_memory(model, recipe)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory.weights == memory.gradients == memory.average == weights and memory.moments == pytest.approx(2 * weights, rel=1e-3)
    assert memory.per_image == saved_bytes(model.train(), torch.empty(6, 1, 16, 16, device="meta")) / 6
    assert step_memory(model, recipe.replace(amp="bf16")).per_image == pytest.approx(memory.per_image * 2 / 3)
    assert step_memory(model, recipe.replace(ema=False)).average == 0
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
