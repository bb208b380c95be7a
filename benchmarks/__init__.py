"""Benchmarks and their results. A package, or another of this name would hide it."""
