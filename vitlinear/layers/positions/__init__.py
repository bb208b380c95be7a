"""Encodings of position that stand apart from attention."""
