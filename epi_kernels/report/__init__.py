"""One self-contained HTML page from a run's log: `page` builds pages, `figures` draws, `command` is `epi-kernels report`."""
