"""What a merge of files holds at most: a layer, and by far not one of the files, however many there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit.core.spec import AdapterSpec
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.lora import LoRA
from lorakit.persist import save
from tests.law.cases import jitter

STATUS = Path("/proc/self/status")
MERGE = """
import sys
from pathlib import Path
from lorakit.persist import load
from lorakit.training.merge_files import merging_files

base, adapter, output = sys.argv[1:]
with merging_files(base, load(adapter)) as job:
    if output:
        Path(output).mkdir()
        job.write(Path(output))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
"""
"""VmHWM and not ru_maxrss: the latter remembers the process that started this one."""


def peak(base: Path, adapter: Path, output: str) -> int:
    """Return the most that a process held which merges, or which only opens the same files and checks them."""
    command = [sys.executable, "-c", MERGE, str(base), str(adapter), output]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, env=env).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the peak of a process is read from Linux's /proc")
def test_a_merge_of_files_holds_less_than_half_of_one_of_them(tmp_path: Path) -> None:
    """Beside the adapter there is one layer: its weight, the sum and an update, 12 MB each, and a little to compare.

    That is 40 MB, of which the check of the base has held one tensor already; measured 27. A file is 114 MB here, so a
    merge that held one whole, as safetensors' writer does, would hold more than that, and the model is 238.
    """
    config = LlamaConfig(
        vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="115MB")
    attach(model, AdapterSpec(LoRA(8)))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    save(state(model), tmp_path / "adapter", "native")
    files = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    assert len(files) >= 3
    assert max(files) > 100e6
    assert torch.get_default_dtype() == torch.float32
    control = peak(tmp_path / "base", tmp_path / "adapter", "")
    held = peak(tmp_path / "base", tmp_path / "adapter", str(tmp_path / "merged")) - control
    assert held < max(files) / 2
    assert sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")) == sum(files)
