"""How fast does one base serve many adapters, against itself, PEFT, transformers and vLLM on the same processor?

Two random models, s256 (5M parameters) and m768 (49M), with 16 adapters of rank 8 on every linear layer, as files of
PEFT. Ratios are of runs taken in turn; each figure is the median of the rounds and their range, above 1 where lorakit
is faster. Each side runs in a process of its own, which sleeps while the others run: OpenMP counts the threads of a
process, and two sides in one would slow each other down. vLLM's is given its Python: it needs a torch of its own.

    decode        a decode step of 16 sequences on the base alone over one with 1, 2, 4 or 16 adapters
    peft          16 prompts of 16 to 96 tokens, 64 (m768: 32) new ones, one adapter each: PEFT's mixed batch over ours
    generate      the same prompts on the base alone: transformers' static generate over ours
    continuous    the same: transformers' continuous batching over ours
    queue         64 requests of 8 to 64 new tokens on 16 slots: static batches in their order over ours
    pace          64 requests of 64 new tokens on 16 slots, 16 adapters mixed: tokens a second
    load          a 3 MB adapter loaded by an idle engine and beside 16 running sequences, milliseconds
    vllm          as peft, in vLLM with 16 adapters

Run: python bench/serving.py [--models s256,m768] [--parts decode,peft,...] [--rounds N] [--threads N] [--vllm PYTHON]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("OMP_PROC_BIND", "close")  # no side's threads wander; nobody else needs the cores
os.environ.setdefault("OMP_PLACES", "cores")

import torch
from peft import PeftModel
from record import RESULTS, record
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit import attach, detach, load, save, state
from lorakit.core.spec import AdapterSpec
from lorakit.inject.attach import adapters_named
from lorakit.methods.lora import LoRA
from lorakit.serving.batching.decoder import Decoder, Piece
from lorakit.serving.batching.engine import SlotEngine
from lorakit.serving.batching.place import Choice
from lorakit.serving.requests import End, Event, Request, Sampling
from lorakit.serving.shelf.store import Store

MODELS = {
    "s256": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688, "num_attention_heads": 4},
    "m768": {"hidden_size": 768, "num_hidden_layers": 6, "intermediate_size": 2048, "num_attention_heads": 12},
}
NEW = {"s256": 64, "m768": 32}
VOCABULARY, ROOM, ADAPTERS, RANK = 4096, 512, 16, 8
PAUSE = 0.5
"""Seconds between two runs: the threads of the one before look for work for a while, some for 0.2 s."""
PACKAGES = ("torch", "transformers", "peft")


def build(name: str, root: Path) -> Path:
    """Write a random model, a tokenizer of its size and its adapters; return the folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[name], vocab_size=VOCABULARY, max_position_embeddings=ROOM)).eval()
    folder = root / name
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    for number in range(ADAPTERS):
        attach(model, AdapterSpec(LoRA(RANK, alpha=16.0)), "made")
        with torch.no_grad():
            for adapter in adapters_named(model, "made"):
                for values in adapter.parameters():
                    values.normal_(0, 0.02)
        save(state(model, "made"), folder / f"adapter-{number}")
        detach(model, "made")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1")


def prompts(count: int = 16, seed: int = 0) -> list[list[int]]:
    """Return prompts of 16 to 96 tokens."""
    rng = random.Random(seed)
    return [rng.choices(range(2, VOCABULARY), k=rng.randint(16, 96)) for _ in range(count)]


def base(folder: Path) -> Any:
    """Return the model."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class Counter:
    """Counts tokens and ends of one load, and tells the times between the tokens of each request."""

    def __init__(self, requests: int) -> None:
        self.left, self.done = requests, threading.Event()
        self.times: dict[str, list[float]] = {}

    def sink(self, name: str) -> Callable[[Event], None]:
        """Return the sink of one request."""
        times = self.times.setdefault(name, [])

        def take(event: Event) -> None:
            if isinstance(event, End):
                assert event.reason in ("length", "cancelled"), event
                self.left -= 1
                if not self.left:
                    self.done.set()
            else:
                times.append(time.perf_counter())

        return take


def run(engine: SlotEngine, asked: list[Request]) -> tuple[float, dict[str, list[float]]]:
    """Return the seconds until every request has its answer, and the times of its tokens."""
    counter, began = Counter(len(asked)), time.perf_counter()
    for request in asked:
        engine.submit(request, counter.sink(request.id))
    counter.done.wait()
    return time.perf_counter() - began, counter.times


def requests(texts: list[list[int]], new: list[int], adapters: list[str | None]) -> list[Request]:
    """Return a request a prompt."""
    return [
        Request(tuple(ids), adapter, sampling=Sampling(max_tokens=count, ignore_eos=True))
        for ids, count, adapter in zip(texts, new, adapters, strict=True)
    ]


def static(model: Any, texts: list[list[int]], new: int, names: list[str] | None = None) -> float:
    """Return the seconds transformers' generate takes for a batch, padded on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    given: dict[str, Any] = {} if names is None else {"adapter_names": names}
    began = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                              do_sample=False, pad_token_id=0, **given)  # fmt: skip
    assert made.shape[1] == width + new
    return time.perf_counter() - began


def continuous(model: Any, texts: list[list[int]], new: int) -> float:
    """Return the seconds transformers' continuous batching takes, its cache made no larger than it must be."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=512, page_size=32)
    began = time.perf_counter()
    made = model.generate_batch(inputs=texts, generation_config=settings, continuous_batching_config=sizes,
                                progress_bar=False)  # fmt: skip
    assert all(len(one.generated_tokens) == new for one in made.values())
    return time.perf_counter() - began


def engine(folder: Path, adapters: int = ADAPTERS) -> SlotEngine:
    """Return our engine with adapters loaded."""
    made = SlotEngine(base(folder), slots=16)
    for number in range(adapters):
        made.load(str(number), folder / f"adapter-{number}")
    return made


def ratios(rounds: int, cases: dict[str, Callable[[], float]], over: str) -> dict[str, Any]:
    """Run the cases in turn; return the seconds of each, and the median and range of each over `over`."""
    for run_once in cases.values():
        run_once()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            times[name].append(cases[name]())
    found: dict[str, Any] = {}
    for name, mine in times.items():
        each = sorted(a / b for a, b in zip(mine, times[over], strict=True))
        found[name] = {"seconds": round(statistics.median(mine), 5), "ratio": round(statistics.median(each), 3),
                       "lowest": round(each[0], 3), "highest": round(each[-1], 3)}  # fmt: skip
    return found


def decode(folder: Path, rounds: int) -> dict[str, Any]:
    """A decode step with adapters over one without, from the middle of a sequence of 128 tokens on."""
    decoder = Decoder(base(folder), slots=16)
    ready = [decoder.prepare(str(i), load(folder / f"adapter-{i}")) for i in range(ADAPTERS)]
    for one in ready:
        decoder.bank.hold(one)
    decoder.step([], [Piece(i, 0, [2 + i] * 64, None, True) for i in range(16)])

    def steps(adapters: int) -> Callable[[], float]:
        chosen = [Choice(ready[i % adapters]) if adapters else None for i in range(16)]

        def some() -> float:
            began = time.perf_counter()
            for at in range(64, 80):
                decoder.step([(7, at, choice) for choice in chosen])
            return (time.perf_counter() - began) / 16

        return some

    cases = {f"{n} adapters": steps(n) for n in (0, 1, 2, 4, 16)}
    found = ratios(rounds, cases, "0 adapters")
    decoder.close()
    return {name: {**one, "of base": round(1 / one["ratio"], 3)} for name, one in found.items()}


def _with_adapters(folder: Path) -> Callable[[], float]:
    ours, names = engine(folder), [str(i) for i in range(16)]
    return lambda: run(ours, requests(prompts(), [NEW[folder.name]] * 16, list(names)))[0]


def _base_alone(folder: Path, packed: bool = True) -> Callable[[], float]:
    ours = SlotEngine(base(folder), slots=16, packed=packed)
    return lambda: run(ours, requests(prompts(), [NEW[folder.name]] * 16, [None] * 16))[0]


def _peft(folder: Path) -> Callable[[], float]:
    names = [str(i) for i in range(16)]
    theirs = PeftModel.from_pretrained(base(folder), folder / "adapter-0", adapter_name="0").eval()
    for name in names[1:]:
        theirs.load_adapter(folder / f"adapter-{name}", adapter_name=name)
    return lambda: static(theirs, prompts(), NEW[folder.name], names)


def _generate(folder: Path) -> Callable[[], float]:
    theirs = base(folder)
    return lambda: static(theirs, prompts(), NEW[folder.name])


def _continuous(folder: Path) -> Callable[[], float]:
    theirs = base(folder)
    return lambda: continuous(theirs, prompts(), NEW[folder.name])


def _waiting() -> tuple[list[list[int]], list[int]]:
    """Return 64 prompts and how many tokens each asks for."""
    rng = random.Random(2)
    return (texts := prompts(64, 1)), [rng.randint(8, 64) for _ in texts]


def _queue(folder: Path, adapters: int) -> Callable[[], float]:
    ours, (texts, new) = engine(folder, adapters), _waiting()
    names = [str(i % adapters) if adapters else None for i in range(64)]
    return lambda: run(ours, requests(texts, new, names))[0]


def _static_batches(folder: Path) -> Callable[[], float]:
    theirs, (texts, new) = base(folder), _waiting()
    return lambda: sum(static(theirs, texts[i : i + 16], max(new[i : i + 16])) for i in range(0, 64, 16))


SIDES: dict[str, Callable[[Path], Callable[[], float]]] = {
    "lorakit, 16 adapters": _with_adapters,
    "lorakit, base": _base_alone,
    "lorakit, unpacked": lambda folder: _base_alone(folder, packed=False),
    "lorakit, queue": lambda folder: _queue(folder, 0),
    "lorakit, queue, 16 adapters": lambda folder: _queue(folder, ADAPTERS),
    "peft": _peft,
    "generate": _generate,
    "continuous batching": _continuous,
    "static batches": _static_batches,
}
"""What runs once, and says its seconds, in a process of its own."""


def answer(once: Callable[[], float]) -> None:
    """Run once for each line that comes, and say the seconds."""
    for _ in sys.stdin:
        print("took", once(), flush=True)


class Side:
    """A process that runs one side when it is told to; it may use every core, whatever this process is bound to."""

    def __init__(self, command: list[str]) -> None:
        def free() -> None:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))

        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=free)  # fmt: skip

    def once(self) -> float:
        """Return the seconds of one run."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        time.sleep(PAUSE)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("took"):
                return float(line.split()[1])
        raise SystemExit(f"it ended and said nothing: {' '.join(self.command)[:200]}")

    def close(self) -> None:
        """End it and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compare(
    folder: Path, rounds: int, names: dict[str, str], others: Mapping[str, list[str]] = MappingProxyType({})
) -> dict[str, Any]:
    """Run sides in turn, each under its name; the first is what the others are compared with.

    Args:
        folder: of the model.
        rounds: how often each runs.
        names: of the figures, and of the sides.
        others: commands of sides that are not in `SIDES`, by the sides' names.
    """
    here = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--folder", str(folder), "--side"]
    sides = {name: Side(others.get(side, [*here, side])) for name, side in names.items()}
    try:
        return ratios(rounds, {name: side.once for name, side in sides.items()}, next(iter(names)))
    finally:
        for side in sides.values():
            side.close()


def peft(folder: Path, rounds: int) -> dict[str, Any]:
    """16 prompts with 16 adapters: PEFT's mixed batch over ours."""
    return compare(folder, rounds, {"lorakit": "lorakit, 16 adapters", "peft": "peft"})


def generate(folder: Path, rounds: int) -> dict[str, Any]:
    """The base alone: transformers' static generate over ours, and ours without packed weights."""
    names = {"lorakit": "lorakit, base", "lorakit, unpacked": "lorakit, unpacked", "generate": "generate"}
    return compare(folder, rounds, names)


def batching(folder: Path, rounds: int) -> dict[str, Any]:
    """The base alone: transformers' continuous batching over ours."""
    return compare(folder, rounds, {"lorakit": "lorakit, base", "continuous batching": "continuous batching"})


def queue(folder: Path, rounds: int) -> dict[str, Any]:
    """64 requests of different lengths: transformers in batches of 16 as they came, over ours on 16 slots."""
    names = {"lorakit": "lorakit, queue", "lorakit, 16 adapters": "lorakit, queue, 16 adapters",
             "static batches": "static batches"}  # fmt: skip
    return compare(folder, rounds, names)


@contextmanager
def served_alike() -> Iterator[None]:
    """Run as `lorakit serve` does: one thread less, which leaves a core to HTTP and to loads, and none of them bound.

    Bound as the other parts are, an engine and a load would both be on this thread's core, where they began.
    """
    threads, bound = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(max(1, threads - 1))
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, bound)


def pace(folder: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second with prompts of 16 to 96 tokens, which are not counted."""
    texts = prompts(64, 3)
    names: list[str | None] = [str(i % ADAPTERS) for i in range(64)]
    with served_alike():
        ours = engine(folder)
        each = sorted(64 * 64 / run(ours, requests(texts, [64] * 64, names))[0] for _ in range(rounds))
        ours.close()
    return {"tokens a second": round(statistics.median(each)), "lowest": round(each[0]), "highest": round(each[-1])}


def loading(folder: Path, rounds: int) -> dict[str, Any]:
    """How long an adapter of a store takes, its checksums included, on an idle engine and beside 16 sequences."""
    with served_alike():
        return _loading(folder, rounds)


def _loading(folder: Path, rounds: int) -> dict[str, Any]:
    ours = engine(folder, 15)
    store = Store(folder / "store")
    kept = store.add(folder / "adapter-15")
    idle, took, beside, before = list[float](), list[float](), list[float](), list[float]()

    def load_once() -> tuple[float, float]:
        began = time.perf_counter()
        store.verify(kept.digest)
        ours.load("new", store.get(kept.digest))
        ended = time.perf_counter()
        ours.unload("new")
        return began, ended

    for _ in range(8 * rounds):
        began, ended = load_once()
        idle.append(1e3 * (ended - began))
    for _ in range(rounds):
        texts = prompts()
        counter = Counter(16)
        for request in requests(texts, [300] * 16, [str(i % 15) for i in range(16)]):
            ours.submit(request, counter.sink(request.id))
        while any(len(times) < 40 for times in counter.times.values()):
            time.sleep(0.01)
        for _ in range(8):
            began, ended = load_once()
            took.append(1e3 * (ended - began))
            time.sleep(0.05)
            for times in counter.times.values():
                gaps = [(b, 1e3 * (b - a)) for a, b in pairwise(times[2:])]
                beside += [gap for at, gap in gaps if began <= at <= ended + gap / 1e3]
                before += [gap for at, gap in gaps if at < began][-4:]
        for request in list(counter.times):
            ours.cancel(request)
        while ours.stats().running:
            time.sleep(0.01)
    ours.close()
    return {
        "megabytes": round(kept.bytes / 1e6, 2),
        "loads": len(took),
        "milliseconds, idle": {"p50": _share(idle, 0.5), "p95": _share(idle, 0.95)},
        "milliseconds": {"p50": _share(took, 0.5), "p95": _share(took, 0.95)},
        "between tokens, ms": {"p50": _share(before, 0.5), "p95": _share(before, 0.95)},
        "between tokens during a load, ms": {"p50": _share(beside, 0.5), "p95": _share(beside, 0.95)},
    }


def _share(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 2)


VLLM = """
import json, os, sys, time
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="0-1", VLLM_LOGGING_LEVEL="ERROR")
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
folder, new, texts, adapters = json.loads(sys.argv[1])
llm = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, enable_lora=bool(adapters), max_loras=16,
          max_lora_rank=8, max_num_seqs=16, enable_prefix_caching=False, disable_log_stats=True)
given = [LoRARequest(str(i), i + 1, f"{folder}/adapter-{i}") for i in range(16)] if adapters else None
ask = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True)
def once():
    began = time.perf_counter()
    made = llm.generate([{"prompt_token_ids": t} for t in texts], ask, lora_request=given, use_tqdm=False)
    assert all(len(one.outputs[0].token_ids) == new for one in made)
    return time.perf_counter() - began
once()
for line in sys.stdin:
    print("took", once(), flush=True)
"""


def vllm(folder: Path, rounds: int, python: str) -> dict[str, Any]:
    """16 prompts with 16 adapters, and the base alone: vLLM's own engine over ours."""
    names = ("lorakit, 16 adapters", "lorakit, base", "vllm, 16 adapters", "vllm, base")
    given = [json.dumps([str(folder), NEW[folder.name], prompts(), many]) for many in (16, 0)]
    others = {name: [python, "-c", VLLM, one] for name, one in zip(names[2:], given, strict=True)}
    return compare(folder, rounds, {name: name for name in names}, others)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": decode, "peft": peft, "generate": generate, "continuous": batching, "queue": queue, "pace": pace,
    "load": loading, "vllm": vllm,
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--models", default=",".join(MODELS))
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--vllm", help="the Python of an environment with vllm-cpu; without, that part is left out")
    options.add_argument("--threads", type=int, help="of every side; recorded beside the parts with all of them")
    options.add_argument("--keep", action="store_true", help="keep what the last run recorded of other parts")
    options.add_argument("--side", choices=SIDES, help="run this one of a comparison, once a line that comes")
    options.add_argument("--folder", type=Path, help="of the model of --side")
    given = options.parse_args()
    file = RESULTS / "serving.json"
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.side is not None:
        answer(SIDES[given.side](given.folder))
        return
    suffix = "" if given.threads is None else f", {given.threads} threads" if given.threads > 1 else ", 1 thread"
    known = json.loads(file.read_text())["results"] if given.keep and file.exists() else {}
    with tempfile.TemporaryDirectory() as root:
        for name in given.models.split(","):
            folder = build(name, Path(root))
            for part in given.parts.split(","):
                if part == "vllm" and given.vllm is None:
                    continue
                extra = (given.vllm,) if part == "vllm" else ()
                found = PARTS[part](folder, given.rounds, *extra)
                print(name, part, json.dumps(found), flush=True)
                known.setdefault(name, {})[part + suffix] = found
                record("serving", (__doc__ or "").splitlines()[0], PACKAGES, threads=os.cpu_count(),
                       rank=RANK, adapters=ADAPTERS, results=known)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
