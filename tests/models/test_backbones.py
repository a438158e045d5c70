"Every kind of model that has an adapter, because it has one: conversion and back, names, features, costs, gradients, half precision."
import re

import pytest
import timm
import torch
from torch import nn

from vitdynconv.models import SYSTEMS, convert, count, create_model, to_timm
from vitdynconv.models.adapter import BACKBONES, Backbone, register_backbone
from vitdynconv.models.backbones import backbone_class, backbone_of, find_mixers

KINDS = {cls.bases[0]: cls for cls in BACKBONES if cls.bases}
kinds = pytest.mark.parametrize("base", KINDS)


@pytest.fixture(scope="module")
def models():
    "The first base of each kind, built once."
    torch.manual_seed(0)
    return {base: timm.create_model(base).eval() for base in KINDS}


@kinds
def test_an_adapter_is_found_by_model_and_by_name(base, models):
    assert type(backbone_of(models[base])) is KINDS[base]
    assert issubclass(backbone_class(base), KINDS[base])   # the name alone does not tell a distilled DeiT from another
    blocks = [name for name, _ in models[base].named_modules() if re.search(r"blocks\.\d+$", name)]
    paths = list(find_mixers(models[base]))
    assert blocks and len(paths) == len(blocks) and all(path.startswith(f"{block}.") for path, block in zip(paths, blocks))   # one in each, in order


@kinds
def test_all_bases_and_bodies_have_names(base):
    for name in KINDS[base].bases: assert timm.is_model(f"vdc_{name}")
    for name in KINDS[base].bodies:
        for system in SYSTEMS: assert timm.is_model(f"vdc_{system}_{name}")


@kinds
@pytest.mark.parametrize("settings", [dict(activation="scaling_relu"), dict(kernel="depthwise"), dict(activation="ln", pos="rel")],
                         ids=lambda settings: "-".join(map(str, settings.values())))
def test_converted_models_run_and_learn(base, settings, models):
    new = convert(models[base], **settings)
    size = models[base].pretrained_cfg["input_size"]
    x = torch.randn(1, *size)
    loss = new.eval()(x).float().square().sum()   # in training, drop path leaves out whole blocks
    loss.backward()
    mixers = find_mixers(new)
    for path in mixers:
        grads = [p.grad for p in new.get_submodule(path).parameters() if p.grad is not None]
        assert grads and all(g.isfinite().all() for g in grads), path
        assert any(g.any() for g in grads), path
    assert new.eval().bfloat16()(x.bfloat16()).isfinite().all()
    assert {w.fate for w in new.conversion.weights} <= {"kept", "new", "dropped"} and new.conversion.settings["kernel"] in ("pair", "depthwise")
    total = count(new.float()).total
    assert total.params == sum(p.numel() for p in new.parameters()) and total.macs > total.params   # a weight is used at several positions


@kinds
def test_what_was_converted_goes_back_or_says_why_not(base, models):
    new = convert(models[base])
    if KINDS[base].layer:   # a layer of maps that is no attention
        with pytest.raises(ValueError, match=rf"{KINDS[base].layer} is a DynamicConvAttention"): to_timm(new)
        return
    back = to_timm(new)
    assert type(back) is type(models[base])
    assert back.state_dict().keys() == models[base].state_dict().keys()


@kinds
def test_features_come_at_every_stage(base):
    maps = create_model(base, "scaling", features_only=True)(torch.randn(1, *timm.get_pretrained_cfg(base).input_size))
    assert len(maps) >= 3 and all(m.ndim == 4 for m in maps)


def test_an_adapter_must_name_its_class():
    class Nameless(Backbone): pass
    with pytest.raises(ValueError, match="Nameless has no `theirs`"): register_backbone(Nameless)
    assert Nameless not in BACKBONES


def test_a_subclass_stands_in_front_of_its_parent():
    for i, cls in enumerate(BACKBONES):
        assert not any(issubclass(later, cls) for later in BACKBONES[i + 1:]), cls
    class Leaf(backbone_class("convnext_atto")): theirs = nn.Identity
    try:
        register_backbone(Leaf)
        assert BACKBONES.index(Leaf) < BACKBONES.index(backbone_class("convnext_atto"))
    finally: BACKBONES.remove(Leaf)
