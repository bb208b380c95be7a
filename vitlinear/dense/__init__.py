"""What detection and segmentation share: maps of several scales, padded batches."""
