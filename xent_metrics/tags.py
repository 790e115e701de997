"""Names of the logged values. A tag is `{prefix}{stage}/{name}`, then a suffix or the loader or group that it is of."""

from __future__ import annotations

from xent_metrics.reading_info import READINGS

LOGGED_READINGS = ("cross_entropy", "bits_per_token", "perplexity")
"""What is logged of every stage."""

BITS_PER_BYTE = "bits_per_byte"
"""What is logged of every stage too if the bytes of tokens are known."""

BOUNDED_READINGS = tuple(name for name in LOGGED_READINGS if f"{name}_lower" in READINGS)
"""Readings that have an interval, under `{name}_lower` and `{name}_upper`."""

BOUNDS = tuple(f"{name}_{end}" for name in BOUNDED_READINGS for end in ("lower", "upper"))
"""The ends of those intervals."""

BEST, UNIFORM, UNIGRAM = "best_bits_per_token", "uniform_bits_per_token", "unigram_bits_per_token"
"""The lowest validation so far, and two reference lines; of validations only."""
