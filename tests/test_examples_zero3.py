"""The example of DeepSpeed's ZeRO-3: two processes that each hold a half end where one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lorakit import AdapterSpec, LoRA, attach, load
from lorakit.data import Collator, prepare
from lorakit.training.base import load_base
from tests.conftest import ROOT
from tests.training.samples import pairs, save_base, write_rows

STEPS, ROWS = 4, 8


def alone(base: Path, rows: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the tensors of one process with all rows of a step, without DeepSpeed."""
    model, tokenizer = load_base(str(base))
    handle = attach(model, AdapterSpec(LoRA(8, 16)))
    data, collate = prepare(str(rows), tokenizer, max_length=128).dataset, Collator(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(handle.parameters(), 2e-3)
    drawn, losses, order = torch.Generator().manual_seed(0), [], list[int]()
    for _ in range(STEPS):
        while len(order) < ROWS:
            order += torch.randperm(len(data), generator=drawn).tolist()
        loss = model(**collate([data[i] for i in order[:ROWS]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        order = order[ROWS:]
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, named


@pytest.mark.slow  # DeepSpeed compiles what its processes talk by, the first time for two minutes
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed to divide a model by ZeRO-3")
def test_two_halves_learn_what_one_process_does(tmp_path: Path) -> None:
    base, rows = save_base(tmp_path / "base"), Path(write_rows(tmp_path / "rows.jsonl", pairs(10)))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571"]
    words += [str(ROOT / "examples" / "zero3.py"), str(tmp_path / "adapter"), "--base", str(base), "--data", str(rows)]
    here = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*words, "--steps", str(STEPS)], env=here, capture_output=True, text=True, timeout=540)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    losses, named = alone(base, rows)
    told = [float(loss) for loss in re.findall(r"^step +\d+  loss (.+)$", ended.stdout, re.MULTILINE)]
    assert told == pytest.approx(losses, abs=5.1e-5), "as printed"
    learned = load(tmp_path / "adapter")
    model, _ = load_base(str(base))
    attach(model, learned)
    for name, wanted in named.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=0, atol=2e-6)
    assert learned.base.probes, "what tells this base from another was gathered too"
