"""Initial values for a pair of factors, one file each; the folder is the registry."""
