"What the tests of the data share."
import random
import tarfile

import numpy as np
import torch

from vitdynconv.data import imagenet_dls


def tree_dls(root, **changes):
    "Loaders of the small tree of JPEG files, or of something else with ten classes."
    return imagenet_dls(root, **dict(dict(batch_size=20, input_size=32, workers=0, num_classes=10), **changes))


def epoch(loader, number=0):
    "All batches of one epoch."
    loader.set_epoch(number)
    return list(loader)


def same(a, b):
    "Are two epochs equal to the last bit?"
    return len(a) == len(b) and all(all(map(torch.equal, x, y)) for x, y in zip(a, b))


def states():
    "What the global random generators are about to give."
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def tar_of(files, to):
    "A tar of files, name -> path."
    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, 'w') as tar:
        for name, path in files.items(): tar.add(path, name)
    return to
