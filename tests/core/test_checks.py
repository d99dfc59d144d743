"""What a configuration may say: a value of the wrong type is refused where it stands, not taken for another."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "lora", "stabilised": "false"}, "stabilised must be true or false, not 'false'"),
    ({"name": "block-diagonal", "stabilised": 1}, "stabilised must be true or false, not 1"),
    ({"name": "lokr", "decompose_both": "no"}, "decompose_both must be true or false, not 'no'"),
    ({"name": "lora", "alpha": True}, "alpha must be a positive number, not True"),
    ({"name": "lokr", "factor": True}, "factor must be a whole number of at least 1, not True; leave it out"),
    ({"name": "hierarchical", "global_rank": 0}, "global_rank must be a whole number of at least 1, not 0"),
    ({"name": "mixture", "top": 2.0}, "top must be 2 to 8, the number of experts, or left out, not 2.0"),
    ({"name": "mixture", "balance": True}, "balance must be a number of at least 0, not True"),
    ({"name": "adalora", "kept": 20}, "kept 20 is more than init_rank 12; a run writes it"),
    ({"name": "adalora", "beta1": True}, "beta1 must lie between 0 and 1, not True"),
    ({"name": "vera", "widest": -3}, "widest must be a whole number of at least 0, not -3; the layers tell it"),
    ({"name": "vera", "d_initial": True}, "d_initial must be a number other than 0, not True"),
    ({"name": "prompt-tuning", "text": 5}, "text must be words, not 5"),
    ({"name": "prompt-tuning", "ids": [1.5]}, "ids must be a whole number of at least 0, not 1.5"),
    ({"name": "lora", "init": {"name": "eva", "rho": True}}, "rho must be"),
    ({"dropout": "0.1"}, "dropout must be at least 0 and below 1, not '0.1'"),
    ({"dropout": True}, "dropout must be at least 0 and below 1, not True"),
    ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
    ({"seed": 1.5}, "seed must be a whole number of at least 0, not 1.5"),
]
"""Fields of a method by its name, or of a spec, and what is said of them."""
SCRIPT = """
import json, sys
from lorakit.core.spec import AdapterSpec, method_from_json
from lorakit.errors import SpecError
from lorakit.methods.lora import LoRA
for fields in json.loads(sys.argv[1]):
    try:
        print("taken:", method_from_json(fields) if "name" in fields else AdapterSpec(LoRA(4), **fields))
    except SpecError as refused:
        print(str(refused).splitlines()[0])
"""


def test_a_value_of_the_wrong_type_is_refused() -> None:
    # in a process of its own: here every call is held to its annotations, which no user's is
    wrong = json.dumps([fields for fields, _ in WRONG])
    said = subprocess.run([sys.executable, "-c", SCRIPT, wrong], capture_output=True, text=True, check=True).stdout
    for (fields, complaint), line in zip(WRONG, said.splitlines(), strict=True):
        assert complaint in line, (fields, line)
