"""`lorakit merge --stream`: the base's files are merged tensor by tensor, for bases that memory does not hold.

No model is built, so no logits can be compared: each layer is proved for itself while it is merged.
"""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.merge import MARK, loader, parts
from lorakit.cli.screen import Screen, bar, duration, in_options, size
from lorakit.cli.sources import Source

if TYPE_CHECKING:
    from lorakit.core.state import AdapterState

_ADVICE = {
    "merge in memory with untie=True": "leave --stream out and give --untie",
    "merge into the 16-bit base, or in memory with lossy=True": (
        "name the 16-bit base with --base, or leave --stream out and give --lossy"
    ),
    "; merge in memory": "; leave --stream out: merging in memory works",
    "write fp32 instead": "use --dtype fp32",
}
"""What the user of the command does, for what the caller of the function does."""


def merge_stream(found: Source, state: AdapterState, source: str, output: str, dtype: str, out: Screen) -> None:
    """Merge the files of a base tensor by tensor, and say what was done.

    Raises:
        MergeError: what cannot be merged, in the words of the command line.
    """
    import torch

    from lorakit.persist.atomic import atomic_directory
    from lorakit.training.base import task_of
    from lorakit.training.merge_files import merging_files

    began = time.perf_counter()
    out.note(f"merging {source} into the files of {found.base} ...")
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
    with (
        in_options(_ADVICE),
        merging_files(found.base, state, task=task_of(found.labels), labels=found.labels, dtype=kept) as merge,
        atomic_directory(output, clean=True) as draft,
    ):
        with bar(f"merging {found.base}", merge.tensors) as step:
            report = merge.write(draft, lambda name: step())
        seconds = time.perf_counter() - began
        result = {
            "source": source,
            "base": found.base,
            "output": output,
            "stream": True,
            "dtype": "+".join(report.dtypes),
            "layers": report.layers,
            "files": report.files,
            "tensors": report.tensors,
            "max_rel_diff": report.difference,
            "worst_layer": report.worst,
            "update_lost": report.update_lost,
            "seconds": seconds,
        }
        (draft / MARK).write_text(jsonlib.dumps(result, indent=2) + "\n", encoding="utf-8")
    written = sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file())
    lost = f"; rounding took {report.update_lost:.2%} of the update (Frobenius)" if report.update_lost else ""
    out.say(
        f"merged {parts(report.layers, state)} into {found.base}, in {' and '.join(report.dtypes)}",
        "on random inputs a merged layer differs from the adapted one by at most "
        f"{report.difference:.2g} of its largest output{lost}",
        f"wrote {output} ({size(written)}, {report.files} file{'s' * (report.files > 1)} of weights) in "
        f"{duration(seconds)}; it loads with {loader(found)}.from_pretrained",
    )
    out.result({**result, "bytes": written})
