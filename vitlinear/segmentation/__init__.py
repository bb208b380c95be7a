"""Semantic segmentation: data sets and mmseg.

A config of mmseg that names this module in its ``custom_imports`` can use ``vitlinear.Backbone``,
``vitlinear.SegDataPreProcessor`` and ``vitlinear.LayerDecayOptimWrapperConstructor``, which
mmengine finds by their scope (`vitlinear.registry`). Importing it imports nothing of OpenMMLab's.
"""
