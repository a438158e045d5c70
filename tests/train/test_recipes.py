"""Recipes as a user has them: the paper's table, overrides, files."""
import csv
import dataclasses
import io
import json
import pickle

import pytest
from hypothesis import given, settings, strategies as st

from vitdynconv.train.recipes import RECIPES, Recipe, table4, table4_column

# Table 4 of the paper (appendix A); the second Swin value is Swin-B's
TABLE4 = '''setting,deit_s,swin_t,swin_b
epochs,300,300,300
batch_size,1024,1024,1024
opt,adamw,adamw,adamw
lr,0.001,0.001,0.001
lr_schedule,cosine,cosine,cosine
weight_decay,0.05,0.05,0.05
warmup_epochs,20,20,20
label_smoothing,0.1,0.1,0.1
drop,0,0,0
drop_path,0.1,0.2,0.5
clip_grad,5.0,5.0,5.0
ema,yes,no,no
rand_augment,rand-m9-mstd0.5-inc1,rand-m9-mstd0.5-inc1,rand-m9-mstd0.5-inc1
mixup,0.8,0.8,0.8
cutmix,1.0,1.0,1.0
random_erasing,0.25,0.25,0.25
repeated_aug,3,0,0'''


@pytest.mark.parametrize('name, column', [('deit_s', 'deit_s'), ('deit_b', 'deit_s'), ('swin_t', 'swin_t'), ('swin_b', 'swin_b')])
def test_recipes_are_table_4(name, column):
    rows = {row['setting']: row[column] for row in csv.DictReader(io.StringIO(TABLE4))}
    recipe = RECIPES[name]
    assert recipe.override(**rows) == recipe, recipe.differences(recipe.override(**rows))
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
    ("'model_args={\"depth\": 6, \"embed_dim\": 96}'", 'model_args', dict(depth=6, embed_dim=96))])
def test_words_become_values(words, field, value):
    recipe = Recipe().override(words)
    assert getattr(recipe, field) == value and (value is None or type(getattr(recipe, field)) is type(value))
    assert set(Recipe().differences(recipe)) <= {field}


@pytest.mark.parametrize('words, message', [
    ('epoch=3', 'did you mean epochs'), ('weightdecay=0', 'did you mean weight_decay'), ('zzz=1', 'choose from name, model'),
    ('epochs=0', "epochs=0 is not valid: give int, at least 1"), ('epochs=1e2', "epochs='1e2'"), ('lr=fast', "lr='fast' is not valid: give float, above 0"),
    ('lr=inf', 'lr=inf'), ('amp=fp8', "one of '', 'bf16', 'fp16'"), ('kernel=wide', "one of 'pair', 'depthwise'"), ('ema=maybe', 'give bool'),
    ('epochs', 'write field=value'), ('epochs=10', 'warmup_epochs=20 does not end before epochs=10'), ('batch_size=7', 'mixed in pairs'),
    ('grad_accum=3', 'no 3 equal parts'), ('mixup_prob=1.5', 'from 0 to 1'), ('drop_path=1', 'from 0 to 0.99'), ('num_classes=none', 'num_classes='),
    ('model_args=[1]', 'give dict'), ("'model_args={\"img_size\": 32}'", 'set the field input_size'), ("'model_args={\"class_token\": false}'", 'set the field class_token'),
    ('epochs=2', 'add --warmup_epochs 0.13, or warmup_epochs=0.13 in Python')])
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
