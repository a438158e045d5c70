"Vision Transformers as ConvNets with dynamic convolutions. Names are imported when they are first used."
__version__ = "0.1.0"

from importlib import import_module


def lazy_names(package, **modules):
    """`__getattr__`, `__dir__` and `__all__` for a package that offers `modules`' names (one string each) without
    importing them."""
    home = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name):
        if name not in home: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name].replace('__', '.')}"), name)

    return __getattr__, lambda: sorted(home), list(home)


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    models="create_model convert to_timm count",
    framework="describe",
    train="create_learner RECIPES load_run predict",
)
