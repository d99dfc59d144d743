"""The bundled base keeps what its card and the design promise: size, tying, tokens, chat mask, and fluency."""

import math
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "src" / "lorakit" / "assets" / "tales"
HELD_OUT = Path(__file__).parents[2].parent / "shared" / "data" / "tales" / "the-lilac-fairy-book.txt"


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_whole_folder_weighs_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000


def test_weights_are_a_tied_llama_kept_in_bf16(model):
    from safetensors import safe_open

    assert model.config.model_type == "llama"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (safe_open is no mapping)
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_model_and_tokenizer_agree_on_tokens_and_padding_is_not_the_end(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["  two  spaces\n\n", "Ærøskøbing £20-25 “naïve”", "마법사 🦊\t\x00", "<|end|>x", ""])
def test_tokenizer_round_trips_every_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_chat_mask_covers_the_answer_and_its_end_alone(tokenizer):
    chat = [{"role": "user", "content": "Who came?"}, {"role": "assistant", "content": "Mira the fox."}]
    made = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, trained in zip(made["input_ids"], made["assistant_masks"], strict=True) if trained]
    assert tokenizer.decode(made["input_ids"]) == "User: Who came?\nAssistant: Mira the fox.<|end|>"
    assert tokenizer.decode(spoken) == " Mira the fox.<|end|>"
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "User: Who came?\nAssistant:"


@torch.no_grad()
def test_held_out_perplexity_stays_below_its_bound(model, tokenizer):
    if not HELD_OUT.exists():
        pytest.skip("the tales are not beside the repository (../shared/data/tales)")
    text = HELD_OUT.read_text(encoding="utf-8")[200_000:206_000]
    text = " ".join(text.split()).translate(str.maketrans("“”‘’", "\"\"''"))
    ids = torch.tensor(tokenizer(text)["input_ids"][:512])
    loss = model(input_ids=ids[None], labels=ids[None]).loss
    assert math.exp(loss) < 52  # measured 49.6 on this excerpt; the rest is room for other kernels
