"""Tests, by the rooms that they are of. A package, or another of its name would hide it."""
