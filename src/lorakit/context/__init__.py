"""Prompt and prefix tuning: updates that act on what a model reads, not on a layer; the folder is a registry."""
