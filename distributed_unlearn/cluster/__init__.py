"""Driver and workers: the only importer of ray."""
