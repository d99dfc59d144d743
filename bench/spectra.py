"""Is the spectrum of an update cheap enough to look at every adapter, also a large one?

spectrum  the singular values of a 4096 x 4096 update of rank 16 from its factors, and from the matrix, in one process
adapter   `lorakit inspect` on an adapter of a 7B's shape, rank 16 on all linear layers: seconds and the most memory of
          the whole command
Writes docs/results/spectra.json.
Run: python bench/spectra.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import peak_bytes, record

from lorakit import AdapterSpec, AdapterState, LoRA, save
from lorakit.core.site import Site
from lorakit.core.state import Update
from lorakit.spectral.svd import singular_values

WIDTH, RANK, INNER, LAYERS, TURNS = 4096, 16, 11008, 32, 9
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def update(path: str, out: int, in_: int) -> Update:
    """Return a random LoRA."""
    tensors = {"down": torch.randn(RANK, in_) / in_**0.5, "up": torch.randn(out, RANK)}
    return Update(Site(path, out, in_), LoRA(RANK, float(RANK)), tensors)


def spectrum() -> dict[str, Any]:
    """Time both ways to the singular values of one update, the dense one once, and hold them against each other."""
    one = update("layer", WIDTH, WIDTH)
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        fast = singular_values(one)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    dense = torch.linalg.svdvals(one.tensors["up"] @ one.tensors["down"])
    took = time.perf_counter() - began
    assert torch.allclose(fast, dense[:RANK].double(), rtol=1e-4), "the two ways differ"
    middle = statistics.median(seconds)
    return {"factors_seconds": round(middle, 5), "dense_seconds": round(took, 2), "ratio": round(took / middle)}


def adapter() -> dict[str, Any]:
    """Run the command on a 7B's adapter; return its seconds and the most memory it held."""
    torch.manual_seed(0)
    updates = tuple(
        update(f"model.layers.{layer}.{name}", *shape) for layer in range(LAYERS) for name, shape in SHAPES.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        save(AdapterState(AdapterSpec(LoRA(RANK, float(RANK))), updates), folder)
        said = Path(folder) / "said.json"
        began, most = time.perf_counter(), 0
        with said.open("w") as out:
            process = subprocess.Popen([sys.executable, "-m", "lorakit", "inspect", folder, "--json"], stdout=out)
            while process.poll() is None:
                most = max(most, peak_bytes(process.pid))
                time.sleep(0.02)
        seconds = time.perf_counter() - began
        assert process.returncode == 0
        assert len(json.loads(said.read_text())["modules"]) == len(updates)
        held = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {"updates": len(updates), "file_mb": round(held / 1e6), "seconds": round(seconds, 1),
            "peak_mb": round(most / 1e6)}  # fmt: skip


def main() -> None:
    found = {"spectrum": spectrum()}
    print(found["spectrum"], flush=True)
    found["adapter"] = adapter()
    print(found["adapter"], flush=True)
    record("spectra", (__doc__ or "").splitlines()[0], ("torch",), rank=RANK, threads=torch.get_num_threads(), **found)


if __name__ == "__main__":
    main()
