"Four questions about any token mixer, Table 1, and the design space they span."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    space="KernelSpec describe table1 design_space build",
    proofs="equivalence_table",
)
