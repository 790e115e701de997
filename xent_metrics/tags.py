"""Names of the logged values. A tag is `{prefix}{stage}/{name}`, then a suffix or the loader or group that it is of."""

from __future__ import annotations

LOGGED_READINGS = ("cross_entropy", "bits_per_token", "perplexity")
"""What is logged of every stage."""

BITS_PER_BYTE = "bits_per_byte"
"""What is logged of every stage too if the bytes of tokens are known."""

BOUNDED_READINGS = ("cross_entropy", "perplexity")
"""Readings that have an interval, under `{name}_lower` and `{name}_upper`."""

BEST, UNIFORM, UNIGRAM = "best_bits_per_token", "uniform_bits_per_token", "unigram_bits_per_token"
"""The lowest validation so far, and two reference lines; of validations only."""
