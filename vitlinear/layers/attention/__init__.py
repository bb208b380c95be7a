"""Attention modules, and the encodings of position that stand beside them."""
