"""Detection: data sets, mmdet and torchvision.

A config of mmdet that names this module in its ``custom_imports`` can use ``vitlinear.Backbone``,
``vitlinear.DetDataPreprocessor`` and ``vitlinear.LayerDecayOptimWrapperConstructor``, which
mmengine finds by their scope (`vitlinear.registry`). Importing it imports nothing of OpenMMLab's.
"""
