"""The parts of the recipe behind the bundled base `lorakit/tales`; `scripts/pretrain_base.py` puts them together."""
