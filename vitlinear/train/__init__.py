"""What ``vitlinear train``, ``validate`` and ``predict`` are made of, on timm's own pieces."""
