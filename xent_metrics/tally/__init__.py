"""From losses to exact sums."""
