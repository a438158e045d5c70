"Recipes, Learners, runs that survive, evaluation."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    recipes="RECIPES Recipe",
    learner="create_learner",
    prediction="load_run predict LoadedRun Prediction",
)
