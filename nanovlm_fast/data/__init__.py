"""From files to packed batches: sources -> images and text -> the packed stream."""
