"""MaskedEMAAdamW in the tools people fine-tune with; each module imports its tool and nothing else does."""
