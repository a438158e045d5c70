"""Can the tests see a wrong library? Each mutant is one deliberate mistake; some test must fail for it.

    python tests/mutants.py               all of them, in a copy of the library: a table and the score
    python tests/mutants.py mathematics   those whose area or title contains the word
    python tests/mutants.py --control     the same tests without any mistake: each must pass, or its kills say nothing

A mutant is a file, a text that occurs in it once, what takes its place, and the tests to run. A mutant that
survives is a test to be written.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    "One deliberate mistake."
    area: str   # mathematics, framework, training, data, counting, surgery or road
    title: str  # what is wrong
    file: str   # in vitdynconv/
    old: str    # a text that occurs once in the file
    new: str    # what takes its place
    tests: str  # a file in tests/, and after a blank an expression for pytest's -k


ACT, SOFTMAX, POINT = "layers/families/activation.py", "layers/families/softmax.py", "layers/families/pointwise.py"
NORM, LATER = "layers/families/layernorm.py", "layers/families/later.py"
MIXER, TAKEN, ATT, DEPTH = "layers/mixer.py", "layers/takeover.py", "layers/attention.py", "layers/depthwise.py"
POS, RULE, SEL = "layers/position.py", "layers/selections/rule.py", "layers/selection.py"
WINDOW, MIXTURE = "layers/selections/window.py", "layers/selections/projected.py"
NEAR, TOPK = "layers/selections/neighborhood.py", "layers/selections/topk.py"
DCONV, DYN = "layers/dconv.py", "layers/dynconv.py"
ACTIVATIONS = "layers/test_reference_activations.py test_activations"
WINDOWS, SPACE = "layers/test_reference_mixers.py window", "layers/test_reference_space.py softmax"
TABLES = "layers/test_reference_attention.py table_to_bias"
CONVS = "layers/test_reference_convs.py"
CONVNEXT, PYRAMID, ANY_MAP = "models/adapters/convnext.py", "models/pyramid.py", "models/test_models.py kept_on_any_map"

MUTANTS = [
    Mutant("mathematics", "masked variance without its n", NORM, ".square().sum(-1, keepdim=True) / n", ".square().sum(-1, keepdim=True)", ACTIVATIONS),
    Mutant("mathematics", "number of all kernels for that of the selected", ACT, "return logits.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)", "return logits.shape[-1]", ACTIVATIONS),
    Mutant("mathematics", "ReLU6 cut at 5.9", LATER, "staticmethod(F.relu6)", "staticmethod(lambda s: s.clamp(0, 5.9))", ACTIVATIONS),
    Mutant("mathematics", "softplus drops its tail", LATER, "F.softplus(s, threshold=40)", "F.softplus(s)", "layers/test_reference_attention.py options and softplus"),
    Mutant("mathematics", "sparsemax sums to two", LATER, "ordered.cumsum(-1) - 1", "ordered.cumsum(-1) - 2", ACTIVATIONS),
    Mutant("mathematics", "mean over all kernels", DEPTH, "count = mask.sum(-1, keepdim=True).clamp(min=1)", "count = mask.shape[-1]", "layers/test_reference_attention.py depthwise"),
    Mutant("mathematics", "mean over all kernels, fast", "fast/relative_position.py", "count = mask.sum(-1, keepdim=True).clamp(min=1)", "count = mask.shape[-1]", "layers/test_reference_attention.py depthwise"),
    Mutant("mathematics", "table read at j - i", POS, "table[index.flatten()]", "table[index.T.flatten()]", TABLES),
    Mutant("mathematics", "height and width of the table swapped", POS, "gen_relative_position_index(grid_size, ", "gen_relative_position_index(grid_size[::-1], ", TABLES),
    Mutant("mathematics", "class token with a bias", POS, "(num_prefix_tokens, 0, num_prefix_tokens, 0))", "(num_prefix_tokens, 0, num_prefix_tokens, 0), value=.1)", TABLES),
    Mutant("mathematics", "causal mask transposed", MIXER, "device=x.device).tril()", "device=x.device).triu()", "layers/test_reference_mixers.py test_mixers"),
    Mutant("mathematics", "windows the slow axis of the batch", MIXER, "mask.repeat(batch // mask.shape[0], 1, 1)", "mask.repeat_interleave(batch // mask.shape[0], 0)", "layers/test_reference_mixers.py test_mixers"),
    Mutant("mathematics", "windows shifted the other way", WINDOW, "x.roll((-sh, -sw), (1, 2))", "x.roll((sh, sw), (1, 2))", WINDOWS),
    Mutant("mathematics", "bias of windows transposed", WINDOW, "bias[:, slot[:h * w, None], slot]", "bias.mT[:, slot[:h * w, None], slot]", WINDOWS),
    Mutant("mathematics", "top-k keeps the worst", TOPK, "descending=True, stable=True", "descending=False, stable=True", SPACE),
    Mutant("mathematics", "router by maximum", DCONV, "self.router(x.flatten(2).mean(2))", "self.router(x.flatten(2).amax(2))", CONVS),
    Mutant("mathematics", "router without ReLU", DCONV, "hidden), nn.ReLU(), nn.Linear(hidden", "hidden), nn.Identity(), nn.Linear(hidden", CONVS),
    Mutant("mathematics", "temperature multiplies", DCONV, "(scores * MILLION / self.temperature_millionths)", "(scores * self.temperature_millionths / MILLION)", CONVS),
    Mutant("mathematics", "bias of the bank not mixed", DCONV, "None if self.bias is None else p @ self.bias\n", "None if self.bias is None else self.bias.mean(0).expand(len(x), -1)\n", CONVS),
    Mutant("mathematics", "stride by mean pooling", DYN, "[self.ndim - 1](1, self.stride)", "[self.ndim - 1](self.stride, self.stride, ceil_mode=True)", CONVS),
    Mutant("mathematics", "statistics of LayerNorm in half precision", NORM, "s = at_least_float32(logits)\n        s = F.layer_norm", "s = logits\n        s = F.layer_norm", "layers/test_reference_activations.py half_precision"),
    Mutant("mathematics", "statistics of LayerNorm in half precision, fast", "fast/closed_form.py", "q, k, v = in_float32(q, k, v)\n    k, inverse_deviation", "k, inverse_deviation", "layers/test_reference_attention.py half_precision"),
    Mutant("mathematics", "merged product in half precision", "fast/closed_form.py", "q, k, v = in_float32(q, k, v)\n    summary", "summary", "layers/test_fast.py half_precision"),
    Mutant("mathematics", "fused softmax trains in half precision", "fast/dispatch.py", "if q.device.type == 'cpu' and trains(q, k, v): q, k, v = in_float32(q, k, v)", "pass", "layers/test_fast.py half_precision_is_no_worse and softmax"),
    Mutant("mathematics", "Fourier transform of positions in half precision", "fast/relative_position.py", "    v, table = in_float32(v, table)\n", "", "layers/test_fast.py depthwise_of_half"),
    Mutant("mathematics", "is_causal ignored", MIXER, "if is_causal: return None,", "if False: return None,", "layers/test_reference_mixers.py test_mixers"),
    Mutant("mathematics", "softmax over nothing is uniform", SOFTMAX, "masked_fill(empty, 0)).masked_fill(empty, 0)", "masked_fill(empty, 0))", ACTIVATIONS),
    Mutant("mathematics", "projection of another grid", MIXTURE, "return p if self.live_grid in (None, self.grid_size) else self.resized(p, self.live_grid)", "return p", "layers/test_attention.py mixtures_of_another_grid"),
    Mutant("mathematics", "per-kernel weights through float32", POS, "(grid.float() if half else grid)", "grid.float()", "layers/test_conv.py own_precision"),
    Mutant("framework", "every activation 'softmax'", "framework/description.py", "return getattr(own, 'name', own)", "return 'softmax'", "layers/test_framework.py activation_and_position"),
    Mutant("framework", "neighborhoods are windows", "framework/probe.py", "return any((s & mine).any() and not torch.equal(s, mine) for s in same_size)", "return False", "layers/test_framework.py foreign_modules"),
    Mutant("framework", "proofs without gradients", "framework/reference.py", "Difference(largest([outputs]), largest([slopes]))", "Difference(largest([outputs]), 0.)", "layers/test_framework.py gradient"),
    Mutant("framework", "NaN is no difference", "tools/testing.py", "if any(map(math.isnan, gaps)): return math.inf", "gaps = [gap for gap in gaps if gap == gap]", "layers/test_framework.py nan_is"),
    Mutant("framework", "vdc_equiv always green", "framework/commands.py", "if not max(row['outputs'], row['gradients']) < tol]", "if False]", "layers/test_framework.py command_fails"),
    Mutant("training", "rate not scaled by the batch", "train/learner.py", "lr=recipe.lr * recipe.batch_size / recipe.lr_batch_size", "lr=recipe.lr", "train/test_learner.py rate_grows"),
    Mutant("training", "step counter zero after resuming", "train/learner.py", "self.train_iter = self.first_epoch * len(self.dls.train)", "self.train_iter = 0", "train/test_checkpoint.py steps_are_counted"),
    Mutant("training", "gradient scaler not restored", "train/checkpoint.py", "if state['scaler'] and scaler: scaler.load_state_dict(state['scaler'])", "pass", "train/test_checkpoint.py scaler"),
    Mutant("training", "the worst checkpoints kept", "train/checkpoint.py", "heapq.nlargest(k, history", "heapq.nsmallest(k, history", "train/test_checkpoint.py best"),
    Mutant("training", "smoothing without its own share", "train/callbacks.py", "on = 1. - mixup.label_smoothing + off", "on = 1. - mixup.label_smoothing", "train/test_learner.py smooth"),
    Mutant("training", "rate changed in the middle of a step", "train/callbacks.py", "if learn.iter % self.accumulate: return", "pass", "train/test_learner.py rate_moves_only"),
    Mutant("training", "everything decays", "train/learner.py", "own_decay = weight_decay if pulled else 0.", "own_decay = weight_decay", "train/test_learner.py decay"),
    Mutant("training", "last step divided by the batches of a whole one", "train/callbacks.py", "self.loss_grad / self.share", "self.loss_grad / self.n", "train/test_learner.py batches_of_the_step"),
    Mutant("training", "cosine that ends at zero", "train/callbacks.py", "SchedCos(lr, end)", "SchedCos(lr, 0.)", "train/test_learner.py cosine_ends"),
    Mutant("training", "averages of buffers", "train/callbacks.py", "exclude_buffers=True", "exclude_buffers=False", "train/test_learner.py copy_buffers"),
    Mutant("training", "biases of a bank decay", "train/learner.py", "if parameter.ndim < 2 or name.rpartition('.')[2] == 'bias': return False", "if parameter.ndim < 2: return False", "train/test_learner.py biases_of"),
    Mutant("training", "depths counted from the head", "train/learner.py", "for key in sorted(groups)]", "for key in sorted(groups, reverse=True)]", "train/test_learner.py freeze"),
    Mutant("data", "digits normalised with held-out statistics", "data/digits.py", "    pixels = train[0]\n", "    pixels = valid[0]\n", "train/test_loader.py digits or statistics"),
    Mutant("data", "training set with held-out digits", "data/digits.py", "return digit_loaders((x[train], y[train])", "return digit_loaders((x, y)", "train/test_loader.py digits or held"),
    Mutant("data", "standard deviation for mean", "data/digits.py", "stats = dict(mean=pixels.mean((0, 2, 3)).tolist()", "stats = dict(mean=pixels.std((0, 2, 3)).tolist()", "train/test_loader.py digits or statistics"),
    Mutant("data", "crop_pct ignored in evaluation", "data/images.py", "create_transform(crop_pct=settings['crop_pct'], **common)", "create_transform(**common)", "train/test_images.py crop"),
    Mutant("data", "the same photographs in both splits", "data/digits.py", "int(span[0] * width):int(span[1] * width)", ":", "train/test_loader.py photograph"),
    Mutant("data", "16 bits clipped to 8", "data/images.py", "(values * (255 / top)).round()", "values.clip(0, 255)", "train/test_images.py deep_pictures"),
    Mutant("data", "orientation ignored", "data/images.py", "if turned: picture = ImageOps.exif_transpose(picture)", "pass", "train/test_images.py upright"),
    Mutant("data", "hidden folders are classes", "data/folders.py", "return name.startswith('.') or name in HIDDEN", "return name in HIDDEN", "train/test_folders.py hidden"),
    Mutant("data", "channels of model and pictures not compared", "data/imagenet.py", "if in_chans is not None and in_chans != found:", "if False:", "train/test_images.py grey_loaders"),
    Mutant("data", "unreadable pictures count as evaluated", "data/images.py", "return self.n - int(self.dataset.unreadable[self.draws()[1]].sum())", "return self.n", "train/test_images.py not_counted"),
    Mutant("counting", "LayerNorm charged four times", "models/cost.py", "Rule(partial(norm_macs, each=layernorm, weight=weight))", "Rule(partial(norm_macs, each=layernorm - 1, weight=weight))", "models/test_cost.py"),
    Mutant("counting", "linear layers without bias", "models/formulas.py", "return Cost(n * a * b, a * b + bias * b, n * b)", "return Cost(n * a * b, a * b, n * b)", "models/test_cost.py"),
    Mutant("surgery", "tables of channels interleaved", TAKEN, "table.copy_(resized.repeat_interleave(times, 1))", "table.copy_(resized.repeat(1, times))", "layers/test_reference_mixers.py each_of_its_channels"),
    Mutant("surgery", "q_norm not carried over", ATT, "ours = cls(**timm_settings(attn)", "attn.q_norm = nn.Identity()\n    ours = cls(**timm_settings(attn)", "layers/test_reference_mixers.py carried"),
    Mutant("surgery", "hooks lost", "models/adapter.py", "hooks = ' and '.join(hooks_of(mixer))", "hooks = ''", "models/test_weights.py hooks_on"),
    Mutant("surgery", "mixers have no graph", "tools/compat.py", "if not proxies: return nn.Module", "return nn.Module", "models/test_models.py list_of_leaves"),
    Mutant("surgery", "shared parameters untied", "models/surgery.py", "tie_again(new, tied_names(model), moved)", "pass", "models/test_weights.py shares"),
    Mutant("surgery", "shared blocks keep their windows", "models/adapters/swin.py", "if other is old: set_module(self.model, path, block)", "if path + '.attn' == place.path: set_module(self.model, path, block)", "models/test_weights.py shared_blocks"),
    Mutant("surgery", "channels of the stem averaged twice", "models/fitting.py", "weight.sum(1, keepdim=True).expand", "weight.mean(1, keepdim=True).expand", "models/test_weights.py other_channels"),
    Mutant("surgery", "per-kernel weights resized by the nearest", POS, "mode='bicubic', antialias=True, align_corners=False)\n    return torch.cat", "mode='nearest')\n    return torch.cat", "layers/test_reference_mixers.py ramp"),
    Mutant("road", "a border on the other side", "data/tensors.py", "else -((size - n) // 2)", "else (n - size) // 2", "train/test_same_picture.py clothes_of"),
    Mutant("road", "a crop rounded down", "train/build.py", "while math.floor(size / share) < own: share", "while False: share", "train/test_same_picture.py clothes_of"),
    Mutant("road", "files prepared as the recipe says, not the run", "train/evaluate.py", "*place, rank, world, device, images)", "*place, rank, world, device)", "train/test_same_picture.py evaluation_on_files"),
    Mutant("road", "plan without gradients", "train/plan.py", "return self.weights + self.gradients + self.moments", "return self.weights + self.moments", "train/test_plan.py"),
    Mutant("road", "plan for one process where several share", "train/plan.py", "parts = gpus if recipe.shard else 1", "parts = 1", "train/test_plan.py"),
    Mutant("road", "plan counts attention's matrix", "train/plan.py", "if func is not F.scaled_dot_product_attention: return", "if True: return", "train/test_plan.py keeps_no_matrix"),
    Mutant("road", "plan without the backward pass", "train/plan.py", "model(images).sum().backward()", "model(images).sum()", "train/test_plan.py real_one"),
    Mutant("road", "SIGTERM ends a run without a word", "train/ending.py", "before = signal.signal(signal.SIGTERM, stop)", "before = signal.getsignal(signal.SIGTERM)", "commands/test_signals.py SIGTERM"),
    Mutant("road", "half-written files are left", "tools/files.py", "if unfinished.parent.is_dir(): unfinished.unlink(missing_ok=True)", "pass", "commands/test_signals.py SIGINT"),
    Mutant("road", "two results in one file", "tools/cli.py", "        self.check_files(values)", "        pass", "commands/test_practitioner.py csv"),
    Mutant("road", "a plan without attention's bias", "train/plan.py", "ctx.save_for_backward(q, k, v, bias, result", "ctx.save_for_backward(q, k, v, None, result", "train/test_plan.py keeps_no_matrix"),
    Mutant("road", "auto goes on with another recipe", "train/run.py", "other = wanted.differences(recipe)", "other = {}", "commands/test_practitioner.py ignored"),
    Mutant("road", "matrix of guesses transposed", "train/mistakes.py", "labels * classes + guesses", "guesses * classes + labels", "train/test_plan.py mistakes"),
    Mutant("road", "the best guesses shown", "train/mistakes.py", "batch[0].topk(min(WORST, len(batch[0]))).indices", "batch[0].topk(min(WORST, len(batch[0])), largest=False).indices", "train/test_plan.py mistakes"),
    Mutant("road", "class names backwards", "train/prediction.py", "return LoadedRun(model, transform_of(recipe, record), list(classes)", "return LoadedRun(model, transform_of(recipe, record), list(classes)[::-1]", "commands/test_practitioner.py enough_to_predict"),
    Mutant("road", "grey pictures not made grey", "train/prediction.py", "if len(self.mean) == 1: pixels = to_grey(pixels)", "if len(self.mean) == 1: pixels = pixels[:1]", "train/test_same_picture.py folders"),
    Mutant("road", "export not compared", "train/export.py", "if not largest <= LOGIT_TOLERANCE", "if False and not largest <= LOGIT_TOLERANCE", "commands/test_practitioner.py differs_is_not"),
    Mutant("road", "export without the names of its classes", "train/export.py", "config = dict(label_names=run.classes, ", "config = dict(", "commands/test_practitioner.py same_logits or names_its_classes"),
    Mutant("road", "sizes not in the fingerprint", "data/fingerprint.py", "{name.partition(\"/\")[2]}\\t{size}", "{name.partition(\"/\")[2]}\\t", "commands/test_practitioner.py fingerprint"),
    Mutant("road", "a run in its own data", "train/folder.py", "if tree and folder", "if False and folder", "commands/test_practitioner.py users_type"),
    Mutant("road", "a folder with one's own files begun afresh", "train/folder.py", "or not all(name.startswith(START_FILES) for name in names)", "or False", "commands/test_practitioner.py begun"),
    Mutant("road", "folders of pictures written into", "tools/files.py", "and not (is_own and is_own(path))", "and False", "commands/test_practitioner.py somebody"),
    Mutant("road", "option given twice", "tools/cli.py", "if flags.count(flag) > 1:", "if False:", "commands/test_practitioner.py users_type"),
    Mutant("mathematics", "masked means add up in half precision", DEPTH, "(mask.to(wide.dtype) / count @ wide)", "(mask.to(k.dtype) @ k / count)", "layers/test_fast.py masked_means"),
    Mutant("mathematics", "masked positions of as many rows as kernels", "fast/relative_position.py", "k.new_zeros(*k.shape[:2], mask.shape[1], k.shape[3])", "torch.zeros_like(k)", "layers/test_strided.py padding_selects and StridedDepthwise"),
    Mutant("mathematics", "a table in place of the bias of the call", "layers/strided.py", "rows if bias is None else bias + rows", "rows", "layers/test_strided.py numbers_added"),
    Mutant("mathematics", "a neighborhood as wide as the map", NEAR, "largest_odd(min(self.grid_size) - 1)", "largest_odd(min(self.grid_size))", "layers/test_selection.py smaller_than_the_map"),
    Mutant("mathematics", "a block asks its rule without calling it", "layers/kxk.py", "return rule(q, k, v)", "return rule.forward(q, k, v)", "layers/test_kxk.py hooks"),
    Mutant("mathematics", "a block's rule stays on its first map", "layers/kxk.py", "rule.live_grid = None if rule.grid_size == grid else grid", "rule.live_grid = None", "layers/test_kxk.py moves_its_rule"),
    Mutant("surgery", "a stage of a dense ConvNeXt one position smaller", CONVNEXT, "if isinstance(conv, PADDED_AS_NEEDED) or conv.padding == 'same':", "if conv.padding == 'same':", ANY_MAP),
    Mutant("surgery", "padding of a stem ignored", CONVNEXT, "(n + 2 * p - span - 1) // s + 1", "(n - span - 1) // s + 1", ANY_MAP),
    Mutant("surgery", "a static kernel padded for the turned map", CONVNEXT, "(columns, columns, rows, rows)", "(rows, rows, columns, columns)", ANY_MAP),
    Mutant("surgery", "taps of a dilated kernel side by side", CONVNEXT, "conv.weight[:, 0], conv.dilation", "conv.weight[:, 0], (1, 1)", ANY_MAP),
    Mutant("surgery", "all blocks of a stage drop alike", PYRAMID, "drop_path=rate, **common) for rate in", "drop_path=rates[0], **common) for rate in", "models/test_beyond.py drop_path_grows"),
    Mutant("surgery", "the last map of a pyramid never normed", PYRAMID, "self.norm(x) if norm and i == len(self.stages) - 1 else x", "x", "models/test_beyond.py on_the_way"),
    Mutant("surgery", "a pyramid that never stops early", PYRAMID, "range(last + 1 if stop_early else len(self.stages))", "range(len(self.stages))", "models/test_beyond.py on_the_way"),
    Mutant("surgery", "norms held with another deviation", "models/mixers.py", "unbiased=False", "unbiased=True", "models/test_beyond.py what_is_held"),
    Mutant("surgery", "kept kernels counted with the bias", "models/kept.py", "activation(logits, mask=mask) if added else weights", "weights", "models/test_beyond.py by_counting"),
    Mutant("counting", "taps of D-DW-Conv for nothing", "models/cost.py", "    return numel(outputs[0])\n\n# %% ../../nbs/models/11_cost.ipynb #6c8e3d07", "    return 0\n\n# %% ../../nbs/models/11_cost.ipynb #6c8e3d07", "models/test_beyond.py convnext_by_formula and ddwconv"),
    Mutant("data", "names of shards not in the fingerprint", "data/fingerprint.py", "digest(f'{name}\\t{length}'", "digest(f'{length}'", "train/test_shards.py stream_knows"),
    Mutant("data", "names in an archive not in the fingerprint", "data/fingerprint.py", "append(str(reader.filename(index)))", "append('')", "train/test_folders.py every_kind_know"),
    Mutant("data", "fingerprint of all tensors for each class", "data/fingerprint.py", "mine = pixels[labels == number].contiguous()", "mine = pixels", "train/test_folders.py every_kind_know"),
    Mutant("data", "the order of classes not compared", "data/fingerprint.py", "if old != new and set(old) == set(new): said", "if False: said", "train/test_folders.py every_kind_know"),
    Mutant("road", "plan holds tables in float32 under --amp", "train/plan.py", "per_image * share, once * share", "per_image * share, once", "train/test_plan.py every_part"),
    Mutant("road", "short steps of several GPUs one after the other", "train/plan.py", "steps * SHORTEST * gpus.count", "steps * SHORTEST", "train/test_plan.py time_is"),
    Mutant("road", "a checkpoint half written blocks the retry", "train/folder.py", "'last.ckpt', '.last.ckpt.tmp', 'events", "'last.ckpt', 'events", "commands/test_signals.py never_blocks and last"),
]


def missing(root=ROOT):
    "The titles of mutants whose text does not occur exactly once, so that they could not be made."
    found = []
    for mutant in MUTANTS:
        text = (root / "vitdynconv" / mutant.file).read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            found.append(mutant.title)
    return found


def make_copy(folder, mutant=None):
    "The library and its tests in `folder`, with one mistake or none."
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("vitdynconv", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pytest.ini"):
        shutil.copy(ROOT / name, folder)
    if mutant is None: return
    path = folder / "vitdynconv" / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")


def run_tests(folder, tests):
    "Run tests in the copy, in a fork that has the heavy imports already; pytest's exit code."
    file, _, words = tests.partition(" ")
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)  # for the tests that start a process of their own
        import pytest

        words = ["-k", words] if words else []
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{file}", *words])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


OUTCOMES = {0: "SURVIVED", 1: "killed", 2: "killed", 5: "NO TEST"}


def try_mutant(tests, mutant=None):
    "The outcome of some tests with one mistake or none, and the test that failed first."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        make_copy(copy, mutant)
        outcome = OUTCOMES.get(run_tests(copy, tests), "ERROR")
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", (copy / "log").read_text(encoding="utf-8"), re.M)
    return outcome, failed[1] if failed else ""


def control(chosen):
    "Every selection of tests without a mistake; the number of those that do not pass."
    wrong = 0
    for tests in sorted({mutant.tests for mutant in chosen}):
        outcome, failed = try_mutant(tests)
        wrong += outcome != "SURVIVED"
        print(f"{'passed' if outcome == 'SURVIVED' else outcome:9}{tests}  {failed}", flush=True)
    return wrong


def main(words):
    import fastai.vision.all  # noqa: F401  what every test imports, once for all forks
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    without = "--control" in words
    words = [word for word in words if word != "--control"]
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.area} {m.title}" for word in words)]
    if without: return control(chosen)
    killed = 0
    for mutant in chosen:
        start = time.time()
        outcome, failed = try_mutant(mutant.tests, mutant)
        killed += outcome == "killed"
        print(f"{outcome:9}{mutant.area:12}{mutant.title:50}{time.time() - start:5.0f} s  {failed}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return len(chosen) - killed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
