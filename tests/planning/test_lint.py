"""What other tools refuse, held to the files that are written and to what those tools' sources say.

The bases are shapes on the meta device. Where lorakit itself writes PEFT's files, what it refuses to write is the
measure.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from lorakit.core.layerwise import PROFILES
from lorakit.core.method import Method
from lorakit.core.site import Skeleton
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.targets import parameters_named, resolve
from lorakit.errors import AdapterFileError, SpecError
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import attach, state
from lorakit.inject.sites import sites
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.methods.vera import VeRA
from lorakit.persist.peft import to_peft
from lorakit.planning.lint import TOOLS, Finding, lint
from tests.law import cases
from tests.parity import test_peft_format as bases

LLAMA = sites(LlamaConfig(num_hidden_layers=4, hidden_size=640, intermediate_size=1280, num_attention_heads=4))
GPT2 = sites(GPT2Config(n_layer=2, n_embd=64, n_head=4))


def found(
    method: Method | None, *targets: str, base: Skeleton = LLAMA, tied: bool = False, trained: Any = (), **spec: Any
) -> dict[str, list[Finding]]:
    """Return the findings by tool."""
    made = AdapterSpec(method, Targets(targets or ("all-linear",), layers=spec.pop("layers", None)), **spec)
    all_ = lint(made, resolve(made, base), tied=tied, heads=base.heads, trained=trained, depths=base.depths)
    return {tool: [finding for finding in all_ if finding.tool == tool] for tool in TOOLS}


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_the_default_adapter_is_taken_by_all() -> None:
    assert not any(found(LoRA()).values())


@pytest.mark.parametrize(("rank", "choice"), [(17, 32), (64, 64), (257, 320), (512, 512)])
def test_vllm_wants_to_be_told_of_a_rank_above_16(rank: int, choice: int) -> None:
    finding = one(found(LoRA(rank))["vLLM"])
    assert finding.remedy == f"start the server with --max-lora-rank {choice}"
    assert f"rank {rank} at model.layers.0.self_attn.q_proj" in finding.what


def test_vllm_has_no_rank_above_512() -> None:
    finding = one(found(LoRA(513))["vLLM"])
    assert "ends at 512" in finding.why
    assert "--as-lora --rank" in finding.remedy


def test_a_rank_above_128_is_slow_in_text_generation_inference() -> None:
    assert not found(LoRA(128))["Text Generation Inference"]
    assert "128" in one(found(LoRA(129))["Text Generation Inference"]).why


def test_dora_is_read_by_peft_alone() -> None:
    by_tool = found(DoRA())
    assert not by_tool["PEFT"]
    assert [one(by_tool[tool]).what for tool in TOOLS[1:]] == ["DoRA"] * 3
    assert "magnitudes" in one(by_tool["llama.cpp"]).why
    assert "--as-lora --rank R" in one(by_tool["vLLM"]).remedy


def test_the_remedy_fits_the_method() -> None:
    equal, near, neither = (
        one(found(m, "q_proj")["PEFT"]) for m in (Hierarchical(), DoRA(IA3("input")), Mixture(experts=2, rank=2))
    )
    assert "the plain LoRA that it equals" in equal.remedy
    assert "the nearest plain LoRA" in near.remedy
    assert "nothing can be merged" in neither.remedy
    assert "use it with lorakit" in one(found(Houlsby())["vLLM"]).remedy
    assert one(found(VeRA())["vLLM"]).what == "vera (PEFT's VERA)"
    assert one(found(BlockDiagonal(side="up"))["llama.cpp"]).what == "block-diagonal (PEFT's use_bdlora)"


def test_what_is_trained_whole_is_left_out_by_every_server() -> None:
    names = ("model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight")
    norms = [*parameters_named(("norms",), names, LLAMA)["norms"]]
    assert len(norms) == 2
    by_tool = found(LoRA(), trained=norms, train=("norms",))
    assert "modules_to_save is refused" in one(by_tool["vLLM"]).why
    assert "says nothing" in one(by_tool["Text Generation Inference"]).why
    assert not by_tool["PEFT"]
    assert not by_tool["llama.cpp"]  # which keeps norms that are named so
    assert one(found(LoRA(), trained=["lm_head.weight"], train=("lm_head",))["llama.cpp"]).what.endswith("lm_head")
    assert found(LoRA(), train=("norms",))["llama.cpp"]  # names that are not known may be any
    biases = ["transformer.h.0.ln_1.bias"]
    assert found(LoRA(), base=GPT2, trained=biases, train=("biases",))["llama.cpp"]


def test_parts_of_the_base_alone_are_no_adapter() -> None:
    by_tool = found(None, train=("*",))
    assert one(by_tool["PEFT"]).what == "no layer is adapted"
    assert sum(map(len, by_tool.values())) == 1


def test_tied_embeddings_are_pointed_out_where_they_are_adapted() -> None:
    assert not any(found(LoRA(), tied=True).values())
    head, table = (found(LoRA(), "all-linear", name, tied=True) for name in ("lm_head", "embed_tokens"))
    assert "--untie" in one(head["PEFT"]).remedy
    assert "--untie" in one(table["PEFT"]).remedy
    assert "the base has none of its own" in one(head["llama.cpp"]).why
    assert not table["llama.cpp"]
    apart = found(LoRA(), "all-linear", "lm_head")
    assert not apart["PEFT"]
    assert not apart["llama.cpp"]


def test_vllm_takes_embeddings_and_heads_of_some_models_only() -> None:
    for name in ("lm_head", "embed_tokens"):
        finding = one(found(LoRA(), "q_proj", name)["vLLM"])
        assert "embedding_modules" in finding.why
        assert name in finding.what


def test_llama_cpp_divides_alpha_by_the_rank_whatever_the_file_says() -> None:
    finding = one(found(LoRA(16, 8.0, stabilised=True))["llama.cpp"])
    assert "would have scale 0.5, not 2" in finding.why  # 8 / 16, and 8 / sqrt(16)
    assert "--as-lora" in finding.remedy
    assert not found(LoRA(1, 2.0, stabilised=True))["llama.cpp"]  # where both are one
    assert not found(LoRA(16, 8.0, stabilised=True))["vLLM"]


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_preset_of_ranks_keeps_its_scale_in_vllm_and_loses_it_in_llama_cpp(stabilised: bool) -> None:
    method = LoRA(16, 32.0, stabilised)
    by_tool = found(method, overrides=PROFILES["low"].overrides(method, 4))
    assert not by_tool["vLLM"]
    assert "differ between layers" in one(by_tool["llama.cpp"]).what
    assert "--as-lora" not in one(by_tool["llama.cpp"]).remedy  # which would write one alpha for each rank as well
    assert [f.what for f in by_tool["Text Generation Inference"]] == [
        "several ranks of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ]


def test_one_alpha_over_several_ranks_is_right_in_llama_cpp_and_wrong_in_vllm() -> None:
    by_tool = found(LoRA(16, 32.0), overrides=[Override.of("down_proj", rank=8)])
    assert not by_tool["llama.cpp"]
    finding = one(by_tool["vLLM"])
    assert finding.what == "scale 4 at model.layers.0.mlp.down_proj and 3 more beside 2"
    assert "alpha_pattern" in finding.why
    assert [f.what for f in by_tool["Text Generation Inference"]] == [finding.what]  # each name has one rank


def test_ranks_that_are_padded_to_one_can_be_stacked() -> None:
    for rank, mixed in ((8, False), (9, True)):
        method = LoRA(4, 8.0)
        override = Override.of("*", layers="0", rank=rank, alpha=2.0 * rank)
        assert bool(found(method, overrides=[override])["Text Generation Inference"]) is mixed


def test_text_generation_inference_leaves_out_what_is_not_in_every_block() -> None:
    finding = one(found(LoRA(), "q_proj", "v_proj", layers="2-3")["Text Generation Inference"])
    assert finding.what == "q_proj, v_proj in some blocks"
    assert one(found(LoRA(), "c_attn", base=GPT2)["Text Generation Inference"]).what == "layers named c_attn"


@pytest.mark.parametrize(
    ("method", "target", "said"),
    [
        (LoRA(10), "c_attn[q,v]", "rank 20 at transformer.h.0.attn.c_attn, its 2 slices of rows together"),
        (LoRA(6, init_=Pissa()), "c_attn", None),  # twice 6 is 12
        (LoRA(9, init_=Pissa()), "attn.c_proj", None),  # twice 9 is more than 16 x 16 can have
        (
            LoRA(9, init_=Pissa()),
            "c_attn[q,v]",
            "rank 32 at transformer.h.0.attn.c_attn, its 2 slices of rows together",
        ),
    ],
)
def test_the_rank_is_that_of_the_file(method: Method, target: str, said: str | None) -> None:
    model = bases.gpt2()
    spec = AdapterSpec(method, Targets(target))
    findings = [f for f in lint(spec, resolve(spec, sites(model)), tied=False) if f.tool == "vLLM"]
    attach(model, spec)
    _, tensors = to_peft(state(model))
    highest = max(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    assert bool(findings) is (highest > 16)
    assert said is None or findings[0].what.startswith(said)
    assert said is None or f"rank {highest} " in findings[0].what


def test_starts_that_are_subtracted_are_written_at_scale_1() -> None:
    by_tool = found(LoRA(4, 32.0, init_=Pissa()), overrides=[Override.of("down_proj", rank=8)])  # trained at 8 and 4
    assert not by_tool["vLLM"]
    assert "would have scale 0.5, not 1" in one(by_tool["llama.cpp"]).why  # 8 / 16
    assert not any(found(LoRA(4, 32.0, init_=Pissa())).values())


def _refused(spec: AdapterSpec, model: Any) -> bool:
    attach(model, spec)
    try:
        to_peft(state(model))
    except AdapterFileError:
        return True
    return False


@pytest.mark.parametrize(("kind", "name"), cases.PAIRS)
def test_peft_has_no_form_exactly_where_no_file_is_written(kind: str, name: str) -> None:
    model = cases.Net(cases.KINDS[kind].layer())
    skeleton = sites(model)
    spec = AdapterSpec(cases.METHODS[name], Targets("layer"))
    findings = [f for f in lint(spec, resolve(spec, skeleton), tied=False) if f.tool == "PEFT"]
    assert bool(findings) is _refused(spec, model)


def _on_rows(name: str) -> bool:
    try:
        resolve(
            AdapterSpec(cases.METHODS[name], Targets("layer[0:6]")), sites(cases.Net(cases.KINDS["linear"].layer()))
        )
    except SpecError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in cases.METHODS if _on_rows(name)])
def test_peft_has_no_form_for_rows_exactly_where_no_file_is_written(name: str) -> None:
    model = cases.Net(cases.KINDS["linear"].layer())
    spec = AdapterSpec(cases.METHODS[name], Targets("layer[0:6]"))
    findings = [f for f in lint(spec, resolve(spec, sites(model)), tied=False) if f.tool == "PEFT"]
    assert bool(findings) is _refused(spec, model)


@pytest.mark.parametrize("inner", [LoRA(4, 8.0), LoRA(4, 8.0, init_=Pissa())])
def test_peft_has_no_place_for_the_start_of_an_inner_pair(inner: LoRA) -> None:
    model = bases.llama()
    spec = AdapterSpec(DoRA(inner), Targets("q_proj"))
    findings = [f for f in lint(spec, resolve(spec, sites(model)), tied=False) if f.tool == "PEFT"]
    assert bool(findings) is _refused(spec, model)


OVERRIDES = [
    (VeRA(rank=8), {"rank": 4}),
    (VeRA(rank=8), {"d_initial": 0.2}),
    (LoRA(4, 8.0), {"rank": 2}),
    (LoRA(4, 8.0), {"stabilised": True}),
    (IA3(), {"side": "input"}),
    (BlockDiagonal(4, 8.0, side="up"), {"blocks": 4}),
    (BlockDiagonal(4, 8.0, side="up"), {"rank": 8}),
]


@pytest.mark.parametrize(("method", "fields"), OVERRIDES)
def test_peft_has_one_value_for_all_exactly_where_no_file_is_written(method: Method, fields: dict[str, Any]) -> None:
    model = bases.llama()
    spec = AdapterSpec(method, Targets(("q_proj", "v_proj")), overrides=(Override.of("v_proj", **fields),))
    findings = [f for f in lint(spec, resolve(spec, sites(model)), tied=False) if f.tool == "PEFT"]
    assert bool(findings) is _refused(spec, model)


def test_every_finding_says_what_to_do_and_who_says_so() -> None:
    method = LoRA(200, 8.0, stabilised=True)
    overrides = [Override.of("*", layers="0", rank=8)]
    by_tool = found(method, "all-linear", "lm_head", tied=True, overrides=overrides, train=("norms",))
    all_ = [finding for findings in by_tool.values() for finding in findings]
    assert [len(by_tool[tool]) for tool in TOOLS] == [1, 4, 3, 4]
    assert all(f.what and f.why and f.remedy and f.source for f in all_)
    assert any("beside 0.566" in f.what for f in by_tool["vLLM"])  # 8 / sqrt(200)
