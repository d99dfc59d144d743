"""Training: the recipe, the Trainer, evaluation and the event log."""
