"""Pictures of validations, as PNG files in bytes; whoever has a logger writes them. They need matplotlib."""

from xent_metrics.pictures.validation import draw_validation

__all__ = ["draw_validation"]
