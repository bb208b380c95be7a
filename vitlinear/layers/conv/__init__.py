"""Convolutions: stems, depthwise ones, and those whose kernel the tokens decide."""
