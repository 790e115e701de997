"""From what a model returns to one loss per target."""
