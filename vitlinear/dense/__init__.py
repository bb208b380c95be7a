"""Maps of several scales and padded batches, which detection and segmentation share."""
