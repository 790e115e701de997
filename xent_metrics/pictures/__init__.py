"""Pictures of validations, PNG files as bytes, and a page of HTML, which others write. They need matplotlib."""

from xent_metrics.pictures.validation import draw_validation

__all__ = ["draw_validation"]
