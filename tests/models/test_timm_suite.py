"""timm's own test-suite over our names: every `vdc_*` of the smallest sizes, through `tests/test_models.py` of timm's source distribution.

timm's wheel has no tests; its source distribution does, and it is needed in the version that is installed. It is looked for in $TIMM_SDIST
(the archive, or the folder it unpacks to) and in `.timm/` at the root of the repository. On CI it is fetched from the package index;
elsewhere, where it is missing, these tests skip and say how to fetch it:

    pip download --no-deps --no-binary timm timm==VERSION -d .timm

An ordinary run takes a few names, `pytest -m slow` every system on the smallest body of each kind (a minute). There the tests that look at no size
(gradients, pruning at every block, intermediate features) meet narrow networks of few blocks: same classes, same code, a tenth of the arithmetic. What an
ordinary run has seen whole is not repeated. The script below runs everything over every name up to `small`, each at its own size: most of an hour on one core.

How our names come in: timm parametrizes by `list_models(patterns)`, and that call is answered with ours. A name `vdc_[system_]BASE` is in the list
if BASE is. So each network meets the tests, the exclusions and the kind of layout that timm itself chose for its body. Tests that name
one of our bases (`test_swin_family_*`, ...) get ours by `create_model`.

timm's file changes the process (JIT executor, layer configuration), so it runs in a process of its own. As a script this file prints a
table: `python tests/models/test_timm_suite.py [AREA ...] [-k PATTERN] [-v]`."""
import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AREAS = {  # area -> timm's tests
    'default_cfgs': ['test_model_default_cfgs'],
    'non_std': ['test_model_default_cfgs_non_std'],
    'forward': ['test_model_forward'],                      # with and without checkpointing
    'backward': ['test_model_backward'],
    'features': ['test_model_forward_features'],
    'intermediates': ['test_model_forward_intermediates', 'test_model_forward_intermediates_features'],
    'fx': ['test_model_forward_fx', 'test_model_backward_fx'],
    'prune': ['test_prune_intermediate_layers_contract'],
    'swin_family': ['test_swin_family_reinit_after_to_empty', 'test_swin_family_set_input_size', 'test_swin_family_window_padding',
                    'test_swin_family_dynamic_mask_trace', 'test_swin_family_compile_resize_guards'],
    'checkpoints': ['test_headless_checkpoint_reload', 'test_relpos_non_square_checkpoint_reload', 'test_relpos_non_square_set_input_size'],
}
QUICK = {  # area -> names of an ordinary run
    'default_cfgs': 'vdc_(swin_tiny|linformer_swin_tiny|dconv_convnext_atto)', 'non_std': 'vdc_(deit_tiny|ddwconv_deit_tiny|linformer_deit_tiny)',
    'swin_family': 'swin_tiny', 'checkpoints': 'swin_tiny'}
SMALLEST = '(deit|swin)_tiny|convnext_atto'   # every system on the smallest body of each kind: marked slow. `small` is for the script
SLOW = [area for area in AREAS if area not in ('swin_family', 'checkpoints')]   # those two are whole in an ordinary run
NARROW = {  # kind of body -> arguments of a narrow network, for the slow run's tests that look at no size
    'deit_tiny': dict(embed_dim=48, depth=3), 'convnext_atto': dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128)),
    'swin_tiny': dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))}
SIZELESS = [test for area in ('backward', 'intermediates', 'prune') for test in AREAS[area]] + ['test_model_backward_fx']


def source() -> Path | None:
    "The folder of timm's tests, in the installed version; None if there is none."
    import timm
    release = f'timm-{timm.__version__}'
    given = os.environ.get('TIMM_SDIST')
    for place in [Path(given)] if given else [ROOT / '.timm']:
        for folder in place, place / release:
            if (folder / 'tests/test_models.py').is_file(): return folder
        archive = place if place.name == f'{release}.tar.gz' else place / f'{release}.tar.gz'
        if archive.is_file(): return unpacked(archive, release)
    return None


def unpacked(archive: Path, release: str) -> Path:
    "The folder that an archive unpacks to, in the system's temporary folder."
    folder = Path(tempfile.gettempdir()) / f'vitdynconv-tests-{os.getuid()}'
    if not (folder / release / 'tests/test_models.py').is_file():
        with tarfile.open(archive) as tar: tar.extractall(folder, filter='data')
    return folder / release


def fetched() -> Path | None:
    "The same, fetched from the package index where CI runs."
    import timm
    folder = source()
    if folder is None and os.environ.get('CI') == 'true':
        command = ['pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', f'timm=={timm.__version__}', '-d', ROOT / '.timm']
        subprocess.run([sys.executable, '-m', *command], check=True, timeout=300)
        folder = source()
    return folder


def missing() -> str:
    "Why the tests skip."
    import timm
    return f"timm {timm.__version__}'s source distribution is not here; fetch it with: pip download --no-deps --no-binary timm timm=={timm.__version__} -d .timm"


@functools.cache
def our_names() -> dict[str, str]:
    "Our name -> timm's name of the body, of the smallest sizes."
    import timm
    from vitdynconv.models import SYSTEMS
    names = {}
    for name in timm.list_models('vdc_*'):
        base = name.removeprefix('vdc_')
        system = base.partition('_')[0]
        if system in SYSTEMS: base = base.removeprefix(f'{system}_')
        if re.search('_(atto|tiny|small)(_|$)', base): names[name] = base
    return names


class OurNames:
    "A plugin of pytest: timm's file is imported with our `list_models`, and meets a `create_model` that prefers ours; only the tests asked for are kept."
    def __init__(self, tests, only=None, narrow=False):
        self.tests, self.only, self.narrow, self.results = tests, only, narrow, {}
        self.running = None   # timm's test

    def pytest_configure(self, config):
        import timm
        import vitdynconv.models.registry
        names, self.theirs = our_names(), timm.list_models

        def list_models(*args, **kwargs):
            found = set()
            for listed in self.theirs(*args, **kwargs):
                base, _, tag = listed.partition('.')
                for name in names:
                    if names[name] != base: continue
                    found.add(f'{name}.{tag}' if tag and timm.is_model_pretrained(f'{name}.{tag}') else name)
            if self.narrow: found = {tagged.partition('.')[0]: tagged for tagged in sorted(found)}.values()   # tags differ in their weights' address
            return sorted(found)
        timm.list_models = list_models

    def pytest_collection_modifyitems(self, config, items):
        import timm
        timm.list_models, names = self.theirs, our_names()
        for module in {item.module for item in items}:   # the tests' own name, not timm's: ours are built from timm's models
            module.create_model = self.create_model

        def is_ours(item):
            name = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
            mine = isinstance(name, str) and (name.partition('.')[0] in names or f'vdc_{name}' in names)
            return mine and item.originalname in self.tests and (not self.only or re.search(self.only, item.name))
        kept = [item for item in items if is_ours(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def create_model(self, name, *args, **kwargs):
        "Ours where there is one, and narrow where this run's test allows."
        import timm
        if f'vdc_{name}' in our_names(): name = f'vdc_{name}'
        narrow = [few for body, few in NARROW.items() if body in name and self.narrow and self.running in SIZELESS]
        return timm.create_model(name, *args, **kwargs, **(narrow[0] if narrow else {}))

    def pytest_runtest_setup(self, item): self.running = item.originalname

    def pytest_runtest_logreport(self, report):
        if report.when != 'call' and report.outcome == 'passed': return
        crash = getattr(report.longrepr, 'reprcrash', None)
        why = crash.message if crash else report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or ''
        self.results[report.nodeid.rpartition('::')[2]] = report.outcome, ' '.join(str(why).split())[:600], round(report.duration, 1)


def run(tests: list[str], folder: Path, only: str | None = None, narrow: bool = False) -> dict:
    "Run some of timm's tests over our names, in a process of its own. Test -> (outcome, why, seconds)."
    with tempfile.TemporaryDirectory() as out:
        answer = Path(out) / 'results.json'
        env = os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
        command = [sys.executable, __file__, '--child', str(folder), str(answer), json.dumps(tests), only or '', 'narrow' if narrow else '']
        child = subprocess.run(command, env=env, capture_output=True, text=True, encoding='utf-8')
        if not answer.is_file(): raise RuntimeError(f"timm's tests did not run:\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}")
        return json.loads(answer.read_text(encoding='utf-8'))


def in_child(folder: str, answer: str, tests: str, only: str, narrow: str) -> None:
    "The process of its own."
    plugin = OurNames(json.loads(tests), only, bool(narrow))
    options = ['-q', '-c', f'{folder}/pyproject.toml', '--rootdir', folder, '--import-mode=importlib', '-p', 'no:cacheprovider', '-W', 'ignore', '--tb=short']
    code = pytest.main([f'{folder}/tests/test_models.py', *options], plugins=[plugin])
    if code in (0, 1, 5): Path(answer).write_text(json.dumps(plugin.results), encoding='utf-8')   # passed, some failed, none there; anything else is a broken run


@functools.cache
def results(slow: bool) -> dict:
    "What the tests of all areas said, run once, in one process."
    folder = fetched()
    if folder is None: pytest.skip(missing())
    areas = SLOW if slow else QUICK
    only = '|'.join(rf"({'|'.join(AREAS[area])})\[.*({SMALLEST if slow else QUICK[area]})" for area in areas)
    return run([test for area in areas for test in AREAS[area]], folder, only, narrow=slow)


def check(area: str, slow: bool) -> None:
    found = {name: result for name, result in results(slow).items() if name.partition('[')[0] in AREAS[area]}
    failed = {name: why for name, (outcome, why, _) in found.items() if outcome == 'failed'}
    assert any(outcome == 'passed' for outcome, *_ in found.values()), 'no test ran'
    assert not failed, '\n'.join(f'{name}: {why}' for name, why in failed.items())


@pytest.mark.parametrize('area', QUICK)
def test_timms_own_tests_pass_over_a_few(area): check(area, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize('area', SLOW)
def test_timms_own_suite_passes_over_the_smallest(area): check(area, slow=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('areas', nargs='*', help=f'some of {", ".join(AREAS)}; all unless given')
    parser.add_argument('-k', help='only tests whose name, with the model in brackets, matches this regular expression')
    parser.add_argument('-v', action='store_true', help='the first lines of each failure')
    args = parser.parse_args()
    folder = source()
    if folder is None: sys.exit(missing())
    for area in args.areas:
        if area not in AREAS: parser.error(f'unknown area {area}; choose among {", ".join(AREAS)}')
    print(f'{"area":<16}{"passed":>7}{"failed":>7}{"skipped":>8}{"seconds":>9}')
    for area in args.areas or AREAS:
        results = run(AREAS[area], folder, args.k)
        counts = collections.Counter(outcome for outcome, *_ in results.values())
        seconds = sum(taken for *_, taken in results.values())
        print(f'{area:<16}{counts["passed"]:>7}{counts["failed"]:>7}{counts["skipped"]:>8}{seconds:>9.0f}', flush=True)
        for name, (outcome, why, _) in results.items():
            if args.v and outcome != 'passed': print(f'    {outcome} {name}: {why[:200]}')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: in_child(*sys.argv[2:])
    else: main()
