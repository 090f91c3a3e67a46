"""When to refresh, which elements form a layer, how many are selected: pure functions of plain values."""
