"""Which configuration of the optimizer lets a model train on a card of so many gigabytes, and what a step would take."""
