"""Semantic segmentation: data sets here; mmsegmentation beside them."""
