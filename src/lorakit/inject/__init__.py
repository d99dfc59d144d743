"""Putting adapters into a live model and taking them out: sites, attach, activate, alive, merge."""
