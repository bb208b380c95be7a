"""Accuracy and predictions of classifiers: the ``validate`` and ``predict`` commands."""
