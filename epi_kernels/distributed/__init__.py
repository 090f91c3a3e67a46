"""Parameters over many ranks: what of a DTensor lies here, and reductions in which each element counts once."""
