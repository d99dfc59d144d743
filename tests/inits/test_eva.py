"""EVA: the directions of the inputs, by hand, against torch's SVD of the inputs themselves, and planted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lorakit import load, save
from lorakit.core.method import Static
from lorakit.core.registry import host_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inits.eva import Eva
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.evidence import gather
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from tests.inits.samples import started
from tests.law.cases import KINDS, Net, jitter
from tests.tolerances import assert_close


def measured(layer: nn.Module, rank: int, *batches: Tensor) -> Tensor:
    """Return A after EVA saw these batches."""
    model, spec = Net(layer), AdapterSpec(LoRA(rank, init_=Eva()), Targets("layer"))
    attach(model, spec, evidence=gather(model, spec, batches))
    return adapters_named(model, "default")[0].get_parameter("down").detach()


def test_one_case_by_hand() -> None:
    # inputs (3, 0) and (0, 1): X^T X = diag(9, 1), so r = 1 keeps the first axis
    model, spec = Net(nn.Linear(2, 2)), AdapterSpec(LoRA(1, init_=Eva()), Targets("layer"))
    evidence = gather(model, spec, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    assert evidence["layer"].tolist() == [[9.0, 0.0], [0.0, 1.0]]
    attach(model, spec, evidence=evidence)
    assert_close(adapters_named(model, "default")[0].get_parameter("down").abs(), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv1d", "conv2d", "conv3d"])
def test_the_rows_of_a_are_orthonormal(kind: str) -> None:
    _, adapter, _, _ = started(kind, "eva")
    groups = adapter.site.groups
    for block in adapter.get_parameter("down").detach().chunk(groups):
        assert_close(block.flatten(1) @ block.flatten(1).T, torch.eye(4 // groups))


def test_they_are_the_right_singular_vectors_of_all_the_inputs_together() -> None:
    spread = torch.diag(torch.arange(12.0, 0, -1))
    batches = [torch.randn(5, 7, 12) @ spread, torch.randn(9, 12) @ spread]
    down = measured(nn.Linear(12, 8), 4, *batches)
    rows = torch.cat([b.reshape(-1, 12) for b in batches])
    right = torch.linalg.svd(rows, full_matrices=False).Vh[:4]
    assert_close((down @ right.T).abs(), torch.eye(4), scale=50.0)  # X^T X squares the conditioning of X


def test_directions_planted_in_the_inputs_are_found() -> None:
    planted = torch.linalg.qr(torch.randn(12, 3)).Q.T
    down = measured(nn.Linear(12, 8), 3, torch.randn(40, 3) @ planted)
    assert_close(down.T @ down, planted.T @ planted, scale=10.0)


def test_a_convolution_s_inputs_are_its_patches_group_by_group() -> None:
    kind = "conv2d, grouped, reflected"
    layer, x = KINDS[kind].layer(), KINDS[kind].inputs()
    spec = AdapterSpec(LoRA(4, init_=Eva()), Targets("layer"))
    moment = gather(Net(layer), spec, [x])["layer"]
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    for i, own in enumerate(padded.chunk(2, dim=1)):
        patches = nn.functional.unfold(own, 3).transpose(1, 2).flatten(0, 1)
        assert_close(moment[i], patches.T @ patches)


@pytest.mark.parametrize("said", ["labels", "attention_mask"])
def test_tokens_that_do_not_count_are_left_out(said: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    model, spec = Reader(), AdapterSpec(LoRA(1, init_=Eva()), Targets("layer"))
    x = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])
    marks = {"labels": torch.tensor([[7, -100]]), "attention_mask": torch.tensor([[1, 0]])}
    batch = {"x": x, said: marks[said]}
    assert gather(model, spec, [batch])["layer"].tolist() == [[9.0, 0.0], [0.0, 0.0]]
    assert gather(model, spec, [{"x": x}])["layer"].tolist() == [[9.0, 0.0], [0.0, 25.0]]


def test_padding_of_an_encoder_does_not_count_though_the_labels_are_the_decoder_s() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    spec = AdapterSpec(LoRA(1, init_=Eva()), Targets([r"re:encoder.*\.q", "EncDecAttention.k", r"re:decoder.*\.wi"]))
    ids, labels = torch.tensor([[3, 4, 5]]), torch.tensor([[7, 8, 9, -100]])
    padded = {"input_ids": torch.tensor([[3, 4, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = [gather(model, spec, [{**batch, "labels": labels}]) for batch in (padded, plain)]
    assert len(found[1]) == 3
    for key, moment in found[1].items():
        assert_close(found[0][key], moment)


class Beside(nn.Module):
    """Three layers side by side, each reading features of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = (part.contiguous() for part in x.split(4, dim=-1))
        y: Tensor = self.one(one) + self.two(two) + self.three(three)
        return y


def with_variances(*of_layers: tuple[float, ...]) -> Tensor:
    """Return rows, as many of either sign, whose second moment is diagonal with these values."""
    flat = torch.tensor(of_layers).sqrt().flatten()
    return torch.cat([torch.diag(flat), -torch.diag(flat)])


SHARES = with_variances((5.0, 5.0, 0.0, 0.0), (7.0, 1.0, 1.0, 1.0), (40.0, 30.0, 20.0, 10.0))
"""What components explain: 0.5 0.5, and 0.7 0.1 0.1 0.1, and 0.4 0.3 0.2 0.1."""


@pytest.mark.parametrize(
    ("rank", "rho", "ranks"),
    [
        (1, 1.0, {"one": 1, "two": 1, "three": 1}),
        (1, 2.0, {"one": 2, "two": 1}),  # 0.7, 0.5, 0.5 of six components, and 0.4 is left out
        (2, 2.0, {"one": 2, "two": 1, "three": 3}),  # 0.7 0.5 0.5 0.4 0.3 0.2
        (2, 1.0, {"one": 2, "two": 2, "three": 2}),
        (2, 1.5, {"one": 2, "two": 1, "three": 3}),
    ],
)
@pytest.mark.parametrize("method", [LoRA(1, 8.0), LoRA(1, 8.0, stabilised=True), DoRA(LoRA(1, 8.0))])
def test_ranks_go_where_they_explain_most(method: Static, rank: int, rho: float, ranks: dict[str, int]) -> None:
    model = Beside()
    lora = replace(method.inner if isinstance(method, DoRA) else method, rank=rank, init_=Eva(rho))  # type: ignore[type-var]
    spec = AdapterSpec(DoRA(lora) if isinstance(method, DoRA) else lora, Targets("*"))  # type: ignore[arg-type]
    before = model(SHARES)
    attach(model, spec, evidence=gather(model, spec, [SHARES]))
    updates = state(model).updates
    assert {u.site.path: u.tensors["down"].shape[0] for u in updates} == ranks
    owns = [u.method.inner if isinstance(u.method, DoRA) else u.method for u in updates]
    assert [own.scale for own in owns] == pytest.approx([lora.scale] * len(owns))  # type: ignore[attr-defined]
    assert torch.equal(model(SHARES), before)


def test_a_grouped_convolution_keeps_its_rank() -> None:
    init, site = Eva(2.0), host_of(nn.Conv2d(12, 8, 3, groups=2)).site("layer", nn.Conv2d(12, 8, 3, groups=2))
    assert list(init.ranks([site], [4], [torch.eye(54).expand(2, 54, 54)])) == [4]


def test_shared_out_ranks_are_saved_and_come_back(tmp_path: Path) -> None:
    model, spec = Beside(), AdapterSpec(LoRA(1, 8.0, init_=Eva(2.0)), Targets("*"))
    attach(model, spec, evidence=gather(model, spec, [SHARES]))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    wanted = model(SHARES)
    for form in ("peft", "native"):
        save(state(model), tmp_path / form, form)
        bare = Beside()
        bare.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
        attach(bare, load(tmp_path / form))
        assert_close(bare(SHARES), wanted)


def test_the_ranks_are_peft_s() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    spread = torch.cat([torch.linspace(3, 1, 4), torch.tensor([5.0, 1, 0.8, 0.6]), torch.tensor([2.0, 1.9, 0.3, 0.2])])
    half = torch.randn(64, 12) * spread
    rows = torch.cat([half, -half])  # centred, so that PEFT's centring changes nothing
    model, spec = Beside(), AdapterSpec(LoRA(2, init_=Eva(2.0)), Targets("*"))
    attach(model, spec, evidence=gather(model, spec, [rows]))
    config = peft.LoraConfig(
        r=2,
        target_modules=["one", "two", "three"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )
    theirs = peft.get_peft_model(Beside(), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs,
        [rows],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        show_progress_bar=False,
    )
    expected = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.shape[0]
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }
    ours = {u.site.path: u.tensors["down"].shape[0] for u in state(model).updates}
    assert ours == expected
    assert len(set(ours.values())) > 1, "the ranks must differ for this to say anything"
