"""Measure the bundled base: every figure and sample in its model card comes from this script.

python scripts/measure_base.py --data ../shared/data/tales --base src/lorakit/assets/tales
"""

import argparse
from pathlib import Path

import torch
from pretrain.corpus import make_exercises
from pretrain.probe import exact, held_out, hits, sample, summary
from pretrain.tales import HELD_OUT, read_books
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "Once upon a time",
    "The old woman looked at the prince and said,",
    "In the middle of the forest there stood",
    '"Where are you going?" asked the',
    "When the ship came into the harbour,",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tales"))
    parser.add_argument("--base", type=Path, default=Path("src/lorakit/assets/tales"))
    parser.add_argument("--count", type=int, default=100, help="exercises of each kind")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()
    books = read_books(arguments.data)
    exercises = make_exercises([text for name, texts in books.items() if name not in HELD_OUT for text in texts])
    scores = {name: held_out(model, tokenizer, books[name], 512) for name in HELD_OUT}
    scores["both"] = summary(*(sum(score[key] for score in scores.values()) for key in ("nats", "tokens", "bytes")))
    for name, score in scores.items():
        print(f"{name}: perplexity {score['perplexity']:.2f}, {score['bits_per_byte']:.3f} bits per byte,",
              f"{score['tokens']:.0f} tokens, {score['bytes']:.0f} bytes", flush=True)  # fmt: skip
    for kind in exercises.kinds:
        tried = list(hits(model, tokenizer, exercises, kind, arguments.count))
        tokens = torch.cat(tried).float().mean()
        print(f"{kind}: {exact(tried):.0%} of exercises all right, {tokens:.0%} of copied tokens right", flush=True)
    for seed, prompt in enumerate(PROMPTS):
        print(f"[{seed}] {prompt}{sample(model, tokenizer, prompt, seed)}\n", flush=True)


if __name__ == "__main__":
    main()
