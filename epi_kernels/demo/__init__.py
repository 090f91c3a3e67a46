"""`epi-kernels demo`: a task learned, then another; what is left of the first, with isolation and without."""
