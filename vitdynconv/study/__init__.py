"The study: what is trained, the runs, the measures, the command. Names are imported when they are first used."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    plan="PLANS ROW ROWS Job Plan StudyRow",
    runs="run_study study_model train_row",
    measures="Finding draw_verdicts measure_runs verdict",
    predictions="findings holm judge",
    weights="train_weights",
    beyond="NETWORKS OPEN_QUESTIONS answer read_networks train_networks",
    command="vdc_study",
)
