"A default stands once: where a function hands a setting on, only one of the two says what it is unless given."
import ast
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "vitdynconv"
TRIVIAL = {"None", "True", "False", "0", "1", "0.0", "1.0", "''", "()", "{}"}


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
    "Name -> parameters of what can be called by it; names that stand for two things are left out."
    found, twice = {}, set()
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef): entry = parameters(node)
            elif isinstance(node, ast.ClassDef): entry = constructor(node) or fields(node)
            else: continue
            if node.name in found: twice.add(node.name)
            found[node.name] = entry
    return {name: entry for name, entry in found.items() if name not in twice}


def constructor(cls):
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__": return parameters(node)
    return []


def callee(call, bases, known):
    "The parameters of what is called, or none where it is not one of the package's."
    if isinstance(call.func, ast.Name): return known.get(call.func.id, [])
    if ast.unparse(call.func) != "super().__init__": return []
    return next((known[base] for base in bases if known.get(base)), [])


def handed_on(call, wanted):
    "Parameter of what is called -> the variable that is its argument."
    pairs = list(zip(wanted, call.args)) if not any(isinstance(a, ast.Starred) for a in call.args) else []
    given = {p.name: a.id for p, a in pairs if isinstance(a, ast.Name)}
    return given | {k.arg: k.value.id for k in call.keywords if k.arg and isinstance(k.value, ast.Name)}


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
            own = {p.name: p.default for p in parameters(function) if p.default and p.default not in TRIVIAL}
            for call in ast.walk(function):
                if not isinstance(call, ast.Call): continue
                wanted = callee(call, bases, known)
                defaults = dict(wanted)
                for name, variable in handed_on(call, wanted).items():
                    if variable in own and defaults.get(name) == own[variable]:
                        found.append(f"{function.name}({variable}={own[variable]}) -> {ast.unparse(call.func)}({name}=)")
    return found


def test_a_default_stands_once():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    found = repeated(trees)
    assert not found, "\n".join(found)
