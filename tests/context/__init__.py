"""Tests of what a model reads beside its input."""
