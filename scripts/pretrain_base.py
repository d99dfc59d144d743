"""Pretrain the bundled base `lorakit/tales`: a small Llama with its own tokenizer, from public-domain tales.

    python scripts/pretrain_base.py --data ../shared/data/tales --minutes 70 --out src/lorakit/assets/tales

Muon moves the matrices, AdamW the embedding and the norms, on fp32 masters of a bf16 model. The learning rate warms up,
stays, and decays to zero over the last third (WSD), by wall clock with --minutes or by count with --steps, which makes
a run repeatable. Checkpoints of the constant phase let a decay start from any of them (--resume). See pretrain/.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pretrain.corpus import Corpus, Mix, make_exercises
from pretrain.probe import copying, held_out, sample
from pretrain.tales import HELD_OUT, read_books
from pretrain.vocabulary import train_tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """The sizes and rates of the recipe; the command line can change each."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 8
    inner: int = 512
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    length: int = 256  # of training rows until the decay, which trains at the full context
    batch_tokens: int = 6144
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay: float = 0.33
    share: float = 0.1  # of rows that are exercises
    copy_weight: float = 4.0  # of a copied token in the loss,
    intensify: int = 621  # from this step, when echoes join the exercises
    seed: int = 1


def build(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build the model in fp32: normal initial weights, residual outputs scaled down by the depth."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * settings.layers) ** -0.5)
    return model


class Optimizer:
    """Muon and AdamW on fp32 masters; the bf16 model only computes."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.pairs = [(weight, weight.detach().float().clone().requires_grad_()) for weight in model.parameters()]
        names = [name for name, _ in model.named_parameters()]
        matrices = [m for n, (_, m) in zip(names, self.pairs, strict=True) if m.ndim == 2 and "embed" not in n]
        embedding = [m for n, (_, m) in zip(names, self.pairs, strict=True) if "embed" in n]
        norms = [m for _, m in self.pairs if m.ndim == 1]
        muon = torch.optim.Muon(
            matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        groups = [{"params": embedding, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}]
        self.all = (muon, torch.optim.AdamW(groups, lr=settings.adam_lr, betas=(0.9, 0.95), fused=True))
        self.peaks = (settings.muon_lr, settings.adam_lr)

    def step(self, scale: float) -> float:
        """Move the masters at `scale` times the peak rates, copy them into the model, return the gradient norm."""
        for weight, master in self.pairs:
            master.grad = weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_([master for _, master in self.pairs], 1.0)
        for optimizer, peak in zip(self.all, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
        with torch.no_grad():
            for weight, master in self.pairs:
                weight.copy_(master)
        return float(norm)

    def state(self) -> dict[str, object]:
        """All that a resumed run needs."""
        return {"masters": [m.detach() for _, m in self.pairs], "optimizers": [o.state_dict() for o in self.all]}

    @torch.no_grad()
    def load(self, state: dict[str, list]) -> None:
        """The inverse of `state`."""
        for (weight, master), saved in zip(self.pairs, state["masters"], strict=True):
            master.copy_(saved)
            weight.copy_(saved)
        for optimizer, saved in zip(self.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the Hugging Face directory in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=120,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    arguments, settings = parse()
    torch._dynamo.config.recompile_limit = 64
    books = read_books(arguments.data)
    train = [text for name, texts in books.items() if name not in HELD_OUT for text in texts]
    unseen = [text for name in HELD_OUT for text in books[name]]
    tokenizer = train_tokenizer(train, settings.vocabulary, settings.context)
    exercises = make_exercises(train)
    mix = Mix(settings.share, settings.copy_weight, settings.intensify)
    corpus = Corpus(tokenizer, train, exercises, mix, settings.seed)
    model = build(settings, tokenizer).to(torch.bfloat16)
    optimizer = Optimizer(model, settings)
    say = Log(arguments.runs / "log.jsonl")
    say(event="start", parameters=model.num_parameters(), tokens_per_epoch=corpus.tokens, settings=vars(settings),
        documents=len(train), held_out_documents=len(unseen), words=len(exercises.words),
        sentences=len(exercises.sentences), passages=len(exercises.passages))  # fmt: skip

    for layer in model.model.layers:  # compiled layer by layer: as fast as the whole, and ready in seconds
        layer.compile(dynamic=False)

    def loss_of(ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    step, before = 0, 0.0
    if arguments.resume:
        saved = torch.load(arguments.resume, weights_only=True)
        optimizer.load(saved)
        step, before = saved["step"], saved["progress"]
        for done in range(step):  # replay the draws, so that the data goes on where it stopped
            corpus.batch(done, settings.batch_tokens // settings.length, settings.length)
    first, start, noted, seen, losses = step, time.monotonic(), time.monotonic(), 0, []
    probed = checkpointed = start
    while True:
        spent = time.monotonic() - start
        gone = (step - first) / arguments.steps if arguments.steps else spent / 60 / arguments.minutes
        progress = before + (1 - before) * gone
        if progress >= 1:
            break
        decaying = progress > 1 - settings.decay
        length = settings.context if decaying else settings.length
        ids, labels, weights = corpus.batch(step, settings.batch_tokens // length, length)
        loss = loss_of(ids, labels, weights)
        loss.backward()
        scale = min((step + 1) / settings.warmup, (1 - progress) / settings.decay, 1.0)
        norm = optimizer.step(scale)
        losses.append(loss.detach())
        step, seen = step + 1, seen + ids.numel()
        now = time.monotonic()
        if step % 20 == 0:
            say(event="step", step=step, progress=round(progress, 4), loss=round(float(torch.stack(losses).mean()), 4),
                norm=round(norm, 3), scale=round(scale, 4), tokens_per_second=round(seen / (now - noted)),
                epoch=corpus.epoch, minutes=round((now - start) / 60, 2))  # fmt: skip
            noted, seen, losses = now, 0, []
        if now - checkpointed > 300:
            checkpointed = now
            torch.save({**optimizer.state(), "step": step, "progress": progress}, arguments.runs / f"step-{step}.pt")
        if now - probed > arguments.probe * 60:
            probe(model, tokenizer, unseen, exercises, settings, say, step)
            probed = time.monotonic()
            noted += probed - now  # a probe is no training time
    say(event="end", step=step, epoch=corpus.epoch, tale_tokens=corpus.tale_tokens,
        exercise_tokens=corpus.exercise_tokens)  # fmt: skip
    torch.save({**optimizer.state(), "step": step, "progress": 1.0}, arguments.runs / "last.pt")
    export(model, tokenizer, arguments.out)
    probe(model, tokenizer, unseen, exercises, settings, say, step)


@torch.compiler.set_stance("force_eager")
def probe(model, tokenizer, unseen, exercises, settings, say, step) -> None:  # type: ignore[no-untyped-def]
    """Print the held-out loss on a slice, the copy rates and one sample."""
    model.eval()
    scores = held_out(model, tokenizer, unseen[::6], settings.length, limit=8000)
    text = sample(model, tokenizer, "Once upon a time", seed=step, tokens=60)
    say(event="probe", step=step, held_out=scores, copying=copying(model, tokenizer, exercises, 16), sample=text)
    model.train()


class Log:
    """Print each event as one JSON line and append it to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, **event: object) -> None:
        line = json.dumps(event, ensure_ascii=False)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def parse() -> tuple[argparse.Namespace, Settings]:
    """Read the command line; every field of Settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tales"))
    parser.add_argument("--out", type=Path, default=Path("runs/tales/export"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tales"))
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--steps", type=int, default=0, help="stop by count instead of by wall clock")
    parser.add_argument("--probe", type=float, default=8.0, help="minutes between probes")
    parser.add_argument("--resume", type=Path, help="a checkpoint of the constant phase to go on from")
    defaults = Settings()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    return arguments, Settings(**{name: getattr(arguments, name) for name in vars(defaults)})


if __name__ == "__main__":
    main()
