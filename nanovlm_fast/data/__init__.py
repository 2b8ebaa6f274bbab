"""Data: from the records of a data set to packed batches on the host. See README.md."""
