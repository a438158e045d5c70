"Models of timm as dynamic-convolution networks and back; importing this enters the `vdc_*` names into timm's registry."
from .cost import count, table3
from .registry import create_model, paper_model
from .surgery import convert, to_timm

__all__ = ["convert", "count", "create_model", "paper_model", "table3", "to_timm"]
