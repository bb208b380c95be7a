"""Detection: data sets here; mmdet and torchvision beside them."""
