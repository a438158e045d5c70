"""Recipes as a user has them: the paper's table, overrides, files."""
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings, strategies as st

from vitdynconv.models.paper import TABLE4
from vitdynconv.train.recipes import RECIPES, Recipe, recipe_options, table4, table4_column
from vitdynconv.train.settings import setting

# what the paper's table calls by another name than the recipe
NAMES = dict(optimizer='opt', dropout='drop', stochastic_depth='drop_path', grad_clip='clip_grad')


@pytest.mark.parametrize('name, column', [('deit_s', 'deit_s'), ('deit_b', 'deit_s'), ('swin_t', 'swin_t'), ('swin_b', 'swin_b')])
def test_recipes_are_table_4(name, column):
    rows = {NAMES.get(row, row): value for row, value in TABLE4[column].items()}
    assert rows.pop('rand_augment') == '9/0.5'
    rows |= dict(rand_augment='rand-m9-mstd0.5-inc1', repeated_aug=3 if rows['repeated_aug'] else 0)
    recipe = RECIPES[name]
    assert recipe.replace(**rows) == recipe, recipe.differences(recipe.replace(**rows))
    from_table = {each.name for each in dataclasses.fields(Recipe) if each.metadata['source'] == 'Table 4'}
    assert from_table == set(rows), 'every field of Table 4, and no other, names it as its source'


def test_tables_for_people():
    recipe = RECIPES['deit_s']
    column = table4_column(recipe)
    assert len(column) == 17 and column['EMA'] == column['Repeated Aug.'] == '✓' and column['Rand Augment'] == '9/0.5'
    lines = table4(recipe, RECIPES['swin_b']).splitlines()
    assert lines[0] == '| Methods | deit_s | swin_b |' and '| Stoch. Depth | 0.1 | 0.5 |' in lines
    shown = recipe._repr_markdown_()
    assert all(f'| `{each.name}` |' in shown for each in dataclasses.fields(recipe)) and shown == recipe.table()


@pytest.mark.parametrize('words, field, value', [
    ('epochs=30', 'epochs', 30), ('lr=5e-4', 'lr', 5e-4), ('lr=1', 'lr', 1.), ('ema=yes', 'ema', True), ('ema=0', 'ema', False),
    ('clip_grad=none', 'clip_grad', None), ('clip_grad=1', 'clip_grad', 1.), ('pos=rel', 'pos', 'rel'), ('pos=none', 'pos', 'none'), ('pos=', 'pos', None),
    ('class_token=no', 'class_token', False), ('class_token=none', 'class_token', None), ('amp=bf16', 'amp', 'bf16'), ('rand_augment=', 'rand_augment', ''),
    ("'model_args={\"patch_size\": 8}'", 'model_args', dict(patch_size=8)), ('num_heads=3', 'num_heads', 3), ('num_heads=[2,4]', 'num_heads', [2, 4]),
    ('num_classes=none', 'num_classes', None)])
def test_words_become_values(words, field, value):
    recipe = Recipe().override(words)
    assert getattr(recipe, field) == value and (value is None or type(getattr(recipe, field)) is type(value))
    assert set(Recipe().differences(recipe)) <= {field} | ({'warmup_epochs'} if field == 'epochs' else set())


@pytest.mark.parametrize('words, message', [
    ('epoch=3', 'did you mean epochs'), ('weightdecay=0', 'did you mean weight_decay'), ('zzz=1', 'choose from name, model'),
    ('epochs=0', "epochs=0 is not valid: give int, at least 1"), ('epochs=1e2', "epochs='1e2'"), ('lr=fast', "lr='fast' is not valid: give float, above 0"),
    ('lr=inf', 'lr=inf'), ('amp=fp8', "one of '', 'bf16', 'fp16'"), ('kernel=wide', "one of 'pair', 'depthwise'"), ('ema=maybe', 'give bool'),
    ('epochs', 'write field=value'), ('epochs=10 warmup_epochs=20', 'warmup_epochs=20 does not end before epochs=10'), ('batch_size=7', 'mixed in pairs'),
    ('grad_accum=3', 'no 3 equal parts'), ('mixup_prob=1.5', 'from 0 to 1'), ('drop_path=1', 'from 0 to 0.99'), ('num_classes=few', 'num_classes='), ('num_heads=[2,0]', 'num_heads='), ('opt=adamx', "opt='adamx'"), ('seed=-1', 'seed=-1'), ('seed=4294967296', 'seed='),
    ('model_args=[1]', 'give dict'), ("'model_args={\"img_size\": 32}'", 'set the field img_size'), ("'model_args={\"class_token\": false}'", 'set the field class_token'), ("'model_args={\"depth\": 3}'", 'set the field depth'),
    ('epochs=2 warmup_epochs=2', 'add --warmup_epochs 0.13, or warmup_epochs=0.13 in Python')])
def test_what_makes_no_sense_is_refused(words, message):
    with pytest.raises(ValueError) as error: Recipe().override(words)
    assert message in str(error.value)


@pytest.mark.parametrize('each', dataclasses.fields(Recipe), ids=lambda each: each.name)
def test_every_field_can_be_set_by_words_and_is_checked(each):
    recipe = RECIPES['digits'].replace(mixup_off_epoch=3)
    value = getattr(recipe, each.name)
    text = '' if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
    assert recipe.override(**{each.name: text}) == recipe
    if each.type not in (str, 'str') or each.metadata['check']:
        with pytest.raises(ValueError, match=each.name): recipe.override(**{each.name: 'nonsense'})


def test_all_complaints_come_at_once():
    with pytest.raises(ValueError) as error: Recipe(epochs=0, lr=-1., amp='x')
    assert all(name in str(error.value) for name in ('epochs=0', 'lr=-1.0', "amp='x'"))


def test_recipes_are_frozen_and_travel():
    recipe = RECIPES['swin_t']
    with pytest.raises(dataclasses.FrozenInstanceError): recipe.epochs = 3
    assert pickle.loads(pickle.dumps(recipe)) == recipe and recipe.replace() == recipe and recipe.replace(epochs=30) != recipe


@pytest.mark.parametrize('name', list(RECIPES))
def test_files_come_back(name, tmp_path):
    file = tmp_path / 'recipe.json'
    RECIPES[name].save(file)
    assert Recipe.load(file) == RECIPES[name] and [path.name for path in tmp_path.iterdir()] == ['recipe.json']
    assert set(json.loads(file.read_text())) == {each.name for each in dataclasses.fields(Recipe)}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries(dict(
    epochs=st.integers(21, 10_000), lr=st.floats(1e-12, 1e3), ema=st.booleans(), clip_grad=st.none() | st.floats(1e-6, 1e6),
    model=st.text(), model_args=st.dictionaries(st.text(), st.integers() | st.booleans() | st.text()), drop_path=st.floats(0, .99))))
def test_any_recipe_survives_its_file(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / 'any.json'
    recipe = Recipe(**values)
    recipe.save(file)
    assert Recipe.load(file) == recipe


@pytest.mark.parametrize('text', ['', '{', '[]', '{"epochs": 0}', '{"speed": 1}', '{"lr": NaN}', '{"ema": 1}', '\x00\xff'])
def test_files_that_hold_no_recipe_are_refused_by_name(text, tmp_path):
    file = tmp_path / 'recipe.json'
    file.write_bytes(text.encode('latin1'))
    with pytest.raises(ValueError, match='recipe.json is no recipe'): Recipe.load(file)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / 'recipe.json'
    RECIPES['digits'].save(file)
    def broken(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.replace', broken)
    with pytest.raises(OSError): RECIPES['swin_t'].save(file)
    assert Recipe.load(file) == RECIPES['digits'] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('name', list(RECIPES))
@pytest.mark.parametrize('epochs', [1, 2, 3, 10, 100])
def test_a_short_run_gets_a_warm_up_that_fits(name, epochs):
    recipe = RECIPES[name].override(epochs=str(epochs))
    shorter = epochs < RECIPES[name].epochs
    assert recipe.warmup_epochs == (min(RECIPES[name].warmup_epochs, epochs / 5) if shorter else RECIPES[name].warmup_epochs)
    assert RECIPES[name].replace(epochs=epochs, warmup_epochs=0.5).warmup_epochs == 0.5, 'what is given stays'


@dataclasses.dataclass(frozen=True)
class Extended(Recipe):
    "A recipe with one more line for a model, for data, for the optimizer and for mixing."
    qkv_bias: bool | None = setting(None, 'bias of queries, keys and values', to='model.qkv_bias')
    eps: float | None = setting(None, "AdamW's epsilon", to='optimizer.eps')
    erasing: float = setting(0.5, 'boxes', to='data.random_erasing')
    correct: bool = setting(True, 'label follows the box', to='mixing.correct_lam')


def test_one_line_makes_option_file_table_and_argument(tmp_path):
    recipe = Extended().override('qkv_bias=no eps=1e-6 correct=off')
    options = {option.name: option for option in recipe_options(Extended)}
    assert options['qkv_bias'].help == 'bias of queries, keys and values' and options['eps'].type is str
    recipe.save(tmp_path/'recipe.json')
    assert Extended.load(tmp_path/'recipe.json') == recipe
    assert '| `qkv_bias` | false | bias of queries, keys and values |' in recipe.table()
    assert recipe.arguments('model')['qkv_bias'] is False and 'qkv_bias' not in Extended().arguments('model')
    assert recipe.arguments('optimizer') == dict(opt='adamw', eps=1e-6) and recipe.arguments('data')['random_erasing'] == 0.5
    assert recipe.arguments('mixing')['correct_lam'] is False
    with pytest.raises(ValueError, match='did you mean qkv_bias'): Extended().override('qkv_bais=no')
    with pytest.raises(ValueError, match='set the field qkv_bias'): Extended(model_args=dict(qkv_bias=False))


def test_one_line_reaches_the_object_that_uses_it():
    from vitdynconv.data import digits_dls
    from vitdynconv.data.imagenet import image_settings
    from vitdynconv.train.learner import create_learner
    from vitdynconv.train.build import recipe_model
    small = {name: getattr(RECIPES['digits'], name) for name in ('model', 'model_args', 'embed_dim', 'depth', 'num_heads', 'img_size', 'in_chans', 'class_token', 'num_classes')}
    recipe = Extended(**small).override('qkv_bias=no eps=1e-6 correct=off')
    model = recipe_model(recipe)
    assert model.blocks[0].attn.qkv.bias is None
    learn = create_learner(model, digits_dls(batch_size=64), recipe)
    learn.create_opt()
    assert {group['eps'] for group in learn.opt.opt.param_groups} == {1e-6} and learn.mixing.mixup.correct_lam is False
    assert image_settings(recipe)['random_erasing'] == 0.5


def test_every_option_of_the_command_is_a_field():
    options = recipe_options()
    assert [option.name for option in options] == [each.name for each in dataclasses.fields(Recipe) if each.name != 'name']
    assert all(option.help and option.default is None for option in options)
    assert 'from 0 to 0.99' in {option.name: option.help for option in options}['drop_path']


@pytest.mark.parametrize('name', list(RECIPES))
def test_a_recipe_that_averages_can_see_the_difference(name):
    "An average that remembers more steps than a run has is the beginning of the run: of a small set, say 500 pictures."
    recipe = RECIPES[name]
    steps = recipe.epochs * (1_281_167 if recipe.num_classes == 1000 else 500) / recipe.batch_size
    if recipe.ema: assert 1 / (1 - recipe.ema_decay) < steps / 3
