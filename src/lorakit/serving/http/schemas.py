"""What may be asked over HTTP: OpenAI's completions and chats, vLLM's and LoRAX's routes, and ours for the owner.

A key that is not known is refused with the nearest one that is, and one of OpenAI's that this server does not have is
refused by its name: an option that was dropped in silence answers another question than was asked. Null means absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorakit.errors import did_you_mean, shown
from lorakit.serving.feedback import MOST_COMMENT
from lorakit.serving.http.refusals import sendable
from lorakit.serving.requests import MOST_LOGPROBS

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_STOPS, MOST_BIASES = 4, 1024
LONGEST_STOP = 256
_WHOLE = 2**31 - 1
Code = Literal["unknown_parameter", "unsupported_parameter", "invalid_value"]

_TOOLS = "models here call no tools"
_STORED = "nothing is stored here"
_VOICE = "models here read and write text alone"
_OPENAI: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _VOICE),
    "best_of": ((1,), "use n, and choose among the answers"),
    "function_call": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "metadata": (({},), _STORED),
    "moderation": ((), "nothing is moderated here"),
    "modalities": ((["text"],), _VOICE),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "prediction": ((), "answers are not predicted here"),
    "prompt_cache_key": (("",), "prompts are not cached here"),
    "prompt_cache_retention": ((), "prompts are not cached here"),
    "reasoning_effort": (("none",), "models here have no levels of reasoning"),
    "response_format": (({"type": "text"},), "answers are free text here"),
    "safety_identifier": (("",), "name the user with user"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), _STORED),
    "suffix": (("",), "models here go on from a prompt and fill no gap"),
    "tool_choice": (("none", "auto"), _TOOLS),
    "tools": (([],), _TOOLS),
    "verbosity": (("medium",), "ask for it in the prompt"),
    "web_search_options": ((), "nothing is searched here"),
}
"""OpenAI's parameters this server does not have: the values that ask for nothing, and why others are refused."""

_LORAX: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "adapter_source": ((), "an adapter is chosen by its name among those served here"),
    "api_token": ((), "nothing is fetched for a request"),
    "merged_adapters": ((), "combine the adapters first, then serve the result"),
    "repetition_penalty": ((1.0, 1), "use frequency_penalty or presence_penalty on /v1/completions"),
    "typical_p": ((1.0, 1), "use top_p"),
    "truncate": ((), "send a shorter prompt"),
    "watermark": ((False,), "answers are not marked here"),
    "decoder_input_details": ((False,), "the prompt's tokens are not told"),
    "best_of": ((1,), "ask several times with other seeds"),
    "return_k_alternatives": ((0,), "use logprobs on /v1/completions"),
    "response_format": ((), "answers are free text here"),
    "schema": ((), "answers are free text here"),
    "apply_chat_template": ((False,), "use /v1/chat/completions"),
}


class Strict(BaseModel):
    """A request: closed to unknown keys, each value of its own type, null the same as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for name, value in values.items():
            if value is None and name in {*cls.model_fields, *cls.refused}:
                continue
            if name in cls.model_fields:
                if _half(value):
                    raise _fault("invalid_value", name, "holds half of a surrogate pair, which is no text")
                kept[name] = value
            elif name not in cls.refused:
                raise _fault("unknown_parameter", name, f"is unknown{did_you_mean(str(name), cls.model_fields)}")
            elif value not in cls.refused[name][0]:
                raise _fault("unsupported_parameter", name, f"is not supported: {cls.refused[name][1]}; leave it out")
        return kept


def _half(value: Any) -> bool:
    """Return whether a text, or one of several, has no UTF-8: in JSON half of a surrogate pair may stand alone."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
    return isinstance(value, list) and any(isinstance(one, str) and _half(one) for one in value)


def _fault(code: Code, name: object, what: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{name} {what}", {"name": sendable(str(name)[:64]), "what": what})


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="after")
    def _plain(self) -> StreamOptions:
        if self.include_obfuscation:
            raise _fault("unsupported_parameter", "include_obfuscation", "is not supported; leave it out")
        return self


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Scale = Annotated[float, Field(ge=-10, le=10)]
Text = Annotated[str, Field(max_length=512)]


class Asked(Strict):
    """What a completion and a chat have in common."""

    refused = _OPENAI
    model: Text
    max_tokens: Annotated[int, Field(ge=1, le=_WHOLE)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_WHOLE)] = 0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    seed: Seed | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MOST_BIASES)] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text = ""
    ignore_eos: bool = False
    adapter_id: Text | None = None
    lora_scale: Scale = 1.0

    @model_validator(mode="before")
    @classmethod
    def _stops(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (stop := values.get("stop")) is not None:
            several = [stop] if isinstance(stop, str) else stop
            _check("stop", isinstance(several, list) and all(isinstance(s, str) for s in several), stop,
                   "a text or a list of texts")  # fmt: skip
            _check("stop", len(several) <= MOST_STOPS, stop, f"at most {MOST_STOPS} texts")
            fits = all(0 < len(s) <= LONGEST_STOP for s in several)
            _check("stop", fits, stop, f"texts of 1 to {LONGEST_STOP} characters")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise _fault("invalid_value", "stream_options", "is for streams alone; set stream, or leave it out")
        if wrong := [key for key in self.logit_bias if not (key.isascii() and key.isdecimal() and len(key) < 10)]:
            raise _fault("invalid_value", "logit_bias", f"has the key {shown(wrong[0])}, expected the id of a token")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple, however many were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Asked):
    """`POST /v1/completions`: go on from a text, several texts, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1, le=_WHOLE)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _prompts(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "prompt" in values:
            prompt = values["prompt"]
            _check("prompt", _is_prompt(prompt), prompt, "a text, a list of texts, token ids, or lists of token ids")
            several = isinstance(prompt, list) and bool(prompt) and not _whole(prompt[0])
            _check("prompt", not several or len(prompt) <= MOST_PROMPTS, prompt, f"at most {MOST_PROMPTS} prompts")
        return values

    @model_validator(mode="after")
    def _echoed(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise _fault("unsupported_parameter", "echo", "has no logprobs of the prompt here; leave one of them out")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    refused = {
        "tool_calls": (([],), _TOOLS),
        "tool_call_id": ((), _TOOLS),
        "function_call": ((), _TOOLS),
        "audio": ((), _VOICE),
        "refusal": ((), "an answer here is text"),
        "annotations": (([],), "an answer here is text"),
        "reasoning_content": (("",), "send the answer alone"),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _written(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            content = values.get("content")
            parts = content if isinstance(content, list) else [{"type": "text"}]
            kinds = [part.get("type") if isinstance(part, Mapping) else part for part in parts]
            if other := [kind for kind in kinds if kind != "text"]:
                raise _fault("unsupported_parameter", "content", f"has a part of type {shown(other[0])}: {_VOICE}")
        return values

    @property
    def text(self) -> str:
        """Return the content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> dict[str, str]:
        """Return the turn as a chat template reads it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text} | ({"name": self.name} if self.name else {})


class ChatRequest(Asked):
    """`POST /v1/chat/completions`: answer the last message."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_WHOLE)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _fault("invalid_value", "top_logprobs", "needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            what = f"is {self.max_completion_tokens} and max_tokens is {self.max_tokens}; give one of them"
            raise _fault("invalid_value", "max_completion_tokens", what)
        return self


class LoadRequest(Strict):
    """vLLM's `POST /v1/load_lora_adapter`."""

    refused = {"is_3d_lora_weight": ((False,), "weights of experts are not served here")}
    lora_name: Text = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadRequest(Strict):
    """vLLM's `POST /v1/unload_lora_adapter`; its `lora_int_id` says nothing here, where names are unique."""

    lora_name: Text = ""
    lora_int_id: int | None = None


class LoraxParameters(Strict):
    """LoRAX's parameters of `POST /generate`."""

    refused = _LORAX
    adapter_id: Text | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=_WHOLE)] = 20
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=_WHOLE)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    return_full_text: bool = False
    details: bool = False
    ignore_eos_token: bool = False


class LoraxRequest(Strict):
    """LoRAX's `POST /generate` and `/generate_stream`."""

    refused = {"stream": ((False,), "use /generate_stream")}
    inputs: str
    parameters: LoraxParameters = LoraxParameters()


class AddRequest(Strict):
    """`PUT /admin/adapters/{name}`: serve the adapter in a folder of the server's machine."""

    path: str
    replace: bool = False
    pin: bool | None = None
    """Whether its name is kept in memory; null leaves that as it is."""


class AliasRequest(Strict):
    """`PUT /admin/aliases/{alias}`: one target, or several with their weights."""

    target: Text | None = None
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}

    @model_validator(mode="after")
    def _one(self) -> AliasRequest:
        if (self.target is None) == (not self.weights):
            raise _fault("invalid_value", "target", "or weights is needed, one of the two")
        return self


class FeedbackRequest(Strict):
    """`POST /v1/feedback`: how good an answer was, from -1 to 1."""

    response_id: Text
    rating: Annotated[float, Field(ge=-1, le=1)]
    comment: Annotated[str, Field(max_length=MOST_COMMENT)] = ""


def _check(name: str, fine: bool, value: Any, expected: str) -> None:
    if not fine:
        raise _fault("invalid_value", name, f"is {shown(value)}, expected {expected}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(one, str) for one in value) or all(_whole(one) for one in value):
        return True
    return all(isinstance(one, list) and all(_whole(token) for token in one) for one in value)
