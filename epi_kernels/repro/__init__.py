"""`epi-kernels reproduce`: the tables of EPI (arXiv 2604.14010) and CPI-FT (arXiv 2508.21741), at the size a machine allows.

    preset -> tables name the runs they need -> sweep trains what is missing -> manifests -> tables, plots, one page

A run is described in full by a strict config and known by its hash (`runs`), so none is ever made twice and every
number has a manifest it came from (`store`). Tables only read manifests.
"""
