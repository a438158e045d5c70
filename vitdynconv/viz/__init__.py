"Pictures from live tensors."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    theme="Sheet place shown mark ink_axes",
    curves="Band band draw_curves draw_convergence",
    photo="PhotoMixer photograph steps",
    figures="draw_block draw_pair draw_merge draw_channels draw_selection draw_position",
    systems="draw_systems",
    explorer="explore explore_page",
    trained="explore_heads",
)
