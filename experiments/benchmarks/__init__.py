"""Benchmarks: one question per script, ratios instead of absolute times."""
