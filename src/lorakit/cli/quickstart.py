"""`lorakit quickstart`: in about a minute, a base learns a task it cannot do, and the merged model is proved equal.

Everything is the ordinary way: rows in a file, a recipe, `train`, a PEFT adapter, a merge. The task is data/fables.py;
the score is the share of unseen records whose facts are all in the sentence.
"""

from __future__ import annotations

import json as jsonlib
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.merge import gap, logits_of, merge_proved, write_model
from lorakit.cli.screen import Screen, duration, printable, screen, size, table
from lorakit.cli.train import train_shown
from lorakit.errors import MergeError, RecipeError
from lorakit.training.folder import write, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.data.fables import Fable
    from lorakit.training.recipe import Recipe

MARK = "quickstart.json"
ROWS, HELD_OUT, STRANGERS = 2400, 200, 100
TRAIN = {"epochs": 1, "lr": 5e-3, "batch_size": 16}
ADAPTER = {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"}
ANSWER = 40  # tokens; the longest reference has 30
PROVEN = 16  # held-out records that the merge is checked on before it is written, at every token
EQUAL = 1e-4  # of a logit, in fp32; measured: 5.0e-5, 5.9e-5, 4.4e-5 (seeds 0 to 2)


@dataclass(frozen=True)
class Task:
    """The records: to learn from, new combinations of known values, and heroes never heard of."""

    train: list[Fable]
    held_out: list[Fable]
    strangers: list[Fable]


@dataclass(frozen=True)
class Score:
    """How well one model does: shares of 1, and the perplexity of a completion's token on the held-out records."""

    perplexity: float
    told: float
    told_of_strangers: float
    answers: tuple[str, ...]


def quickstart(
    output: Annotated[str, typer.Option(help="Where to write; an earlier quickstart there is replaced.")] = (
        "runs/quickstart"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The seed of the records, the adapter and the order of the rows.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Teach the bundled model a new task in two minutes."""
    with screen(json) as out:
        from lorakit.data.fables import fables

        task = Task(
            fables("train", ROWS, seed), fables("held-out", HELD_OUT, seed), fables("strangers", STRANGERS, seed)
        )
        with writing(Path(output)):
            recipe = write_recipe(claim(Path(output)), task, seed)
        out.result(run_quickstart(recipe, task, out))


def claim(output: Path) -> Path:
    """Make the folder new: an earlier quickstart is removed, anything else is refused.

    Raises:
        RecipeError: the folder holds something that no quickstart wrote.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / MARK).is_file():
            raise RecipeError(f"{output} was not made by a quickstart, so it is left alone; name another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("{}\n", encoding="utf-8")  # the mark comes first: a run cut short can be replaced
    return output


def write_recipe(output: Path, task: Task, seed: int, **changes: Any) -> Recipe:
    """Write the rows, and return the recipe that trains on them; `changes` replace its sections."""
    from lorakit.training.recipe import make_recipe

    (output / "data").mkdir()
    for name, told in {"train": task.train, "held-out": task.held_out, "strangers": task.strangers}.items():
        lines = "".join(jsonlib.dumps(fable.row) + "\n" for fable in told)
        (output / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "model": "lorakit/tales",
        "data": {"train": str(output / "data" / "train.jsonl"), "format": "prompt+completion", "separator": ""},
        "adapter": ADAPTER,
        "train": {**TRAIN, "seed": seed, "dtype": "fp32"},
        "output": str(output),
    }
    return make_recipe({**values, **changes})


def run_quickstart(recipe: Recipe, task: Task, out: Screen) -> dict[str, Any]:
    """Score the base, train, score the adapted model, merge, prove; return what --json prints."""
    from lorakit.inject.attach import attach
    from lorakit.persist import load
    from lorakit.training.base import load_base, resolve

    output = Path(recipe.output)
    _introduce(task, out)
    out.note("scoring the base ...")
    model, tokenizer = load_base(recipe.model, dtype=recipe.train.dtype, device=recipe.train.device)
    before = measure(model, tokenizer, recipe, task)
    again = f"start again with: lorakit quickstart --output {shlex.quote(str(output))} --seed {recipe.train.seed}"
    run = train_shown(recipe, out, resume=False, hint=again, beside=("data", MARK))
    out.note("scoring the adapted model ...")
    bare = logits_of(model, _ids(tokenizer, task.held_out[:PROVEN]))
    attach(model, load(run.adapter_dir))
    after = measure(model, tokenizer, recipe, task)
    out.note("merging, and comparing ...")
    difference = merge_and_prove(model, tokenizer, task, bare, after, output / "merged")
    result = {
        "train_seconds": run.seconds,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "score_before": before.told,
        "score_after": after.told,
        "score_strangers_before": before.told_of_strangers,
        "score_strangers_after": after.told_of_strangers,
        "adapter_bytes": _bytes(Path(run.adapter_dir)),
        "base_bytes": _bytes(Path(resolve(recipe.model))),
        "merge_max_abs_diff": difference,
        "adapter_dir": run.adapter_dir,
        "merged_dir": str(output / "merged"),
        "trainable_parameters": run.trainable_parameters,
        "steps": run.steps,
        "seed": recipe.train.seed,
    }
    write(output / MARK, jsonlib.dumps(result, indent=2) + "\n")
    _conclude(result, task, before, after, out)
    return result


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, task: Task) -> Score:
    """Return a model's scores on the held-out records."""
    from lorakit.data.fables import score
    from lorakit.training.evaluate import evaluate

    rows = Path(recipe.output) / "data" / "held-out.jsonl"
    perplexity = evaluate(model, tokenizer, str(rows), recipe.data).perplexity
    assert perplexity is not None
    known, strange = (_answers(model, tokenizer, told) for told in (task.held_out, task.strangers))
    return Score(perplexity, score(known, task.held_out), score(strange, task.strangers), tuple(known))


def merge_and_prove(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, bare: list[Any], adapted: Score, place: Path
) -> float:
    """Merge in place, write, load what was written, and return its largest logit difference from the adapted model.

    The logits are those of every token of every held-out prompt; the answers must be equal to the letter.

    Raises:
        MergeError: the written model's logits or answers are not the adapted model's.
    """
    from lorakit.persist.atomic import atomic_directory
    from lorakit.training.base import load_base

    ids = _ids(tokenizer, task.held_out)
    before = logits_of(model, ids)
    merge_proved(model, ids[:PROVEN], bare)
    with atomic_directory(place) as draft:
        write_model(model, tokenizer, draft)
    merged, _ = load_base(str(place), dtype="fp32", device=model.device.type)
    difference = gap(before, logits_of(merged, ids))
    if not difference < EQUAL:
        raise MergeError(f"the merged model's logits differ from the adapted model's by {difference:.3g}; report this")
    answers = _answers(merged, tokenizer, task.held_out)
    unequal = sum(a != b for a, b in zip(answers, adapted.answers, strict=True))
    if unequal:
        raise MergeError(f"{unequal} of {len(answers)} answers of the merged model are others; report this")
    return difference


def _ids(tokenizer: PreTrainedTokenizerBase, told: Sequence[Fable]) -> list[list[int]]:
    from lorakit.data import FORMATS, render_prompt

    return [render_prompt(fable.prompt, tokenizer, FORMATS["prompt+completion"], "") for fable in told]


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, told: Sequence[Fable]) -> list[str]:
    from lorakit.training.generate import generate

    made = generate(model, tokenizer, _ids(tokenizer, told), max_new_tokens=ANSWER, batch_size=64)
    return [answer.strip() for answer in made]


def _bytes(folder: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _introduce(task: Task, out: Screen) -> None:
    first = task.train[0]
    out.note(
        "the task: a record of facts becomes a sentence that tells them all",
        f"  {first.prompt}",
        f"  ->{first.row['completion']}",
        f"{len(task.train):,} records to learn from; {len(task.held_out)} held out, which combine known values as the",
        f"learned ones never do; {len(task.strangers)} more of heroes whose names were never seen",
        "",
    )


def _conclude(result: dict[str, Any], task: Task, before: Score, after: Score, out: Screen) -> None:
    """Show three records before and after, the measures, and where to go from here."""
    shown = [
        (f.prompt, _short(b), _short(a))
        for f, b, a in zip(task.held_out[:3], before.answers, after.answers, strict=False)
    ]
    out.say("")
    out.show(table("three held-out records", "prompt", "before", "after", rows=shown))
    out.say("")
    measures = [
        ("perplexity of a token", f"{before.perplexity:.1f}", f"{after.perplexity:.3f}"),
        ("all facts told", f"{before.told:.1%}", f"{after.told:.1%}"),
        ("... of heroes never seen", f"{before.told_of_strangers:.1%}", f"{after.told_of_strangers:.1%}"),
    ]
    out.show(table("", f"{len(task.held_out)} held-out records", "before", "after", rows=measures, numbers=(1, 2)))
    out.say("")
    adapter, base = result["adapter_bytes"], result["base_bytes"]
    folder = Path(result["merged_dir"]).parent
    named, recipe, strangers = (
        shlex.quote(str(place)) for place in (folder, folder / "recipe.yaml", folder / "data/strangers.jsonl")
    )
    out.say(
        f"trained {result['trainable_parameters']:,} parameters in {duration(result['train_seconds'])}",
        f"adapter {size(adapter)} in {result['adapter_dir']}, base {size(base)}: {adapter / base:.0%}",
        f"merged into {result['merged_dir']}: its {len(task.held_out)} answers are the adapted model's, "
        f"the logits differ by at most {result['merge_max_abs_diff']:.1e}",
        "",
        "next:",
        f"  lorakit generate {named} --prompt 'hero: Zora | kind: crow | loves: old books | tale:'",
        f"  lorakit evaluate {named} --data {strangers}",
        f"  lorakit train {recipe} --set adapter.rank=4 --output runs/rank-4",
    )


def _short(answer: str, most: int = 120) -> str:
    """Return an answer for a table; a base that repeats itself would fill the screen."""
    words = printable(" ".join(answer.split()))
    return words if len(words) <= most else f"{words[:most]} ..."
