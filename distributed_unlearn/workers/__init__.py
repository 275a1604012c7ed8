"""What crosses between driver and workers, and the driver's side of it."""
