"""TensorBoard: what makes the curves of a run readable for somebody who does not know how they were made.

A `Dashboard` writes beside the values that a logger writes: a layout of charts, a description of each, reference lines,
a table of hyperparameters, pictures and pages of text. It works on any `SummaryWriter`, without Lightning.
"""

from importlib.util import find_spec

if find_spec("tensorboard") is None:  # pragma: no cover
    raise ModuleNotFoundError(
        "`xent_metrics.tensorboard` needs TensorBoard; install it with `pip install xent-metrics[lightning]`."
    )

from xent_metrics.tensorboard.dashboard import Dashboard
from xent_metrics.tensorboard.descriptions import describe_tag
from xent_metrics.tensorboard.layout import add_layout, build_layout, merge_layouts, read_layout

__all__ = [
    "Dashboard",
    "add_layout",
    "build_layout",
    "describe_tag",
    "merge_layouts",
    "read_layout",
]
