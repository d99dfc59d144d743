"""The tests mirror src/lorakit, path by path; helpers beside this file are imported as `tests.<name>`."""
