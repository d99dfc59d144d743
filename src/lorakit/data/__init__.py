"""From rows to batches: readers -> formats -> masking -> prepare -> packing, with a preview of what is trained.

readers.py         files, folders, hub datasets -> rows that know their line
formats.py         which format are they, and is every value what it must be
masking.py         a row -> segments, trained or not -> ids and labels; the prompt for inference, the same way
prepare.py         all of it, with every loss counted          classification.py   the same for labelled rows
packing.py         several examples a row, their prompts shared where they are the same, and the collator
branches.py        the attention mask of shared prompts    isolation.py   measured: do examples in a row see each other
preview.py         one example as coloured text                report.py           what became of the rows
special.py         special tokens in the user's own text, counted
"""

from lorakit.data.classification import prepare_classification
from lorakit.data.formats import FORMATS, Format, detect, read_rows
from lorakit.data.isolation import packing_is_isolated, refuse_leaky_packing, why_not_shared
from lorakit.data.masking import IGNORE, render_prompt
from lorakit.data.packing import Collator, PackRule
from lorakit.data.prepare import prepare
from lorakit.data.preview import preview
from lorakit.data.report import DataReport, Prepared

__all__ = [
    "FORMATS",
    "IGNORE",
    "Collator",
    "DataReport",
    "Format",
    "PackRule",
    "Prepared",
    "detect",
    "packing_is_isolated",
    "prepare",
    "prepare_classification",
    "preview",
    "read_rows",
    "refuse_leaky_packing",
    "render_prompt",
    "why_not_shared",
]
