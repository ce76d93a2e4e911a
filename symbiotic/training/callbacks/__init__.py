"""Everything in the training loop that isn't "next batch, step, schedule": one callback a file."""
