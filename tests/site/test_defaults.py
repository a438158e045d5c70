"A default stands once, of two functions of which one hands a setting to the other; and long signatures have a reason."
import ast
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "vitdynconv"
TRIVIAL = {"None", "True", "False", "0", "1", "0.0", "1.0", "''", "()", "{}"}
START = {("activation", "'softmax'"), ("kernel", "'pair'")}   # where the paper starts: what "not given" means everywhere
# a command shows its defaults before torch is imported: the class it fills may have them, too; `test_bench` compares
COMMANDS = {("vdc_bench", "Setting")}


class Parameter(NamedTuple):
    name: str
    default: str | None


def parameters(function):
    "Of a function, without `self` and `cls`, those by name only at the end."
    a = function.args
    by_place = a.posonlyargs + a.args
    defaults = [None] * (len(by_place) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    found = [Parameter(p.arg, d) for p, d in zip(by_place, defaults) if p.arg not in ("self", "cls")]
    return found + [Parameter(p.arg, d and ast.unparse(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults)]


def fields(cls):
    "Of a dataclass."
    return [Parameter(x.target.id, x.value and ast.unparse(x.value)) for x in cls.body if isinstance(x, ast.AnnAssign)]


def definitions(trees):
    "Name -> function or class; names that stand for two things are left out."
    nodes = [n for tree in trees for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names = [node.name for node in nodes]
    return {node.name: node for node in nodes if names.count(node.name) == 1}


def asked_for(name, known):
    "The parameters of a function, or of a class: its own, its fields', or those of the first base that has some."
    node = known.get(name)
    if node is None: return []
    if isinstance(node, ast.FunctionDef): return parameters(node)
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    own = parameters(made[0]) if made else fields(node)
    return own or next(filter(None, (asked_for(ast.unparse(base), known) for base in node.bases)), [])


def callee(call, bases, known):
    "The parameters of what is called, or none where it is not one of the package's."
    if isinstance(call.func, ast.Name): return asked_for(call.func.id, known)
    if ast.unparse(call.func) != "super().__init__": return []
    return next(filter(None, (asked_for(base, known) for base in bases)), [])


def handed_on(call, wanted):
    "Parameter of what is called -> the variable that is its argument."
    pairs = list(zip(wanted, call.args)) if not any(isinstance(a, ast.Starred) for a in call.args) else []
    given = {p.name: a.id for p, a in pairs if isinstance(a, ast.Name)}
    return given | {k.arg: k.value.id for k in call.keywords if k.arg and isinstance(k.value, ast.Name)}


def is_said(default):
    "Is it a value, written out? A name such as MARGIN, or `Recipe.weight_decay`, says where the one value stands."
    return default is not None and default not in TRIVIAL and not default.replace(".", "").isidentifier()


def repeated(trees):
    "(function, parameter, default, what is called) where both have the default."
    known, found = definitions(trees), []
    for tree in trees:
        functions = [(node, []) for node in tree.body if isinstance(node, ast.FunctionDef)]
        for cls in tree.body:
            if not isinstance(cls, ast.ClassDef): continue
            bases = [ast.unparse(base) for base in cls.bases]
            functions += [(node, bases) for node in cls.body if isinstance(node, ast.FunctionDef)]
        for function, bases in functions:
            own = {p.name: p.default for p in parameters(function) if is_said(p.default)}
            for call in ast.walk(function):
                if not isinstance(call, ast.Call): continue
                wanted = callee(call, bases, known)
                defaults = dict(wanted)
                for name, variable in handed_on(call, wanted).items():
                    if variable not in own or defaults.get(name) != own[variable]: continue
                    if (function.name, ast.unparse(call.func)) not in COMMANDS and (name, own[variable]) not in START:
                        found.append(f"{function.name}({variable}={own[variable]}) -> {ast.unparse(call.func)}({name}=)")
    return found


def test_a_default_stands_once():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    found = repeated(trees)
    assert not found, "\n".join(found)


def test_a_repeated_default_is_found():
    code = "def inner(x, size=7): pass\ndef outer(x, size={}): return inner(x, size)\nSIZE = 7"
    assert repeated([ast.parse(code.format("7"))]) == ["outer(size=7) -> inner(size=)"]
    assert not repeated([ast.parse(code.format("8"))]) and not repeated([ast.parse(code.format("SIZE"))])
    code = "class Base:\n def __init__(self, size=7): pass\nclass Own(Base):\n def __init__(self, size=7): super().__init__(size=size)"
    assert repeated([ast.parse(code)]) == ["__init__(size=7) -> super().__init__(size=)"]


def test_bench_has_the_defaults_of_its_setting():
    import inspect

    from vitdynconv.bench import vdc_bench
    from vitdynconv.timing import Setting

    asked = inspect.signature(vdc_bench).parameters
    assert all(asked[name].default == getattr(Setting, name) for name in ("device", "batch", "workers", "amp"))


OTHERS = {  # classes whose arguments are timm's or torch's, because they stand where those stand
    "DynamicConvAttention", "DepthwiseSelfAttention", "PyramidTransformer"}


def test_long_signatures_have_a_reason():
    "More than twelve arguments: the options of a command, timm's in its own place, or pointers and sizes of a Triton kernel."
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name not in OTHERS)]:
            for function in node.body:
                if not isinstance(function, ast.FunctionDef) or len(parameters(function)) <= 12: continue
                marks = [ast.unparse(mark) for mark in function.decorator_list]
                if not any(mark.startswith(("command", "triton.")) for mark in marks): found.append(f"{path.stem}.{function.name}")
    assert not found, found
