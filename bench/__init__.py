"""Benchmarks: they measure; what they measure is judged against targets, tests do not time."""
