"""The core: what needs torch alone."""
