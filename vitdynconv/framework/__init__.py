"Four questions about any token mixer, Table 1, the design space they span, and the proofs."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    spec="KernelSpec generators kernel_makers generator_weights",
    description="describe table1",
    space="design_space why_not build against_definition",
    proofs="equivalence_table",
    rows="convnext_models selection_models",
)
