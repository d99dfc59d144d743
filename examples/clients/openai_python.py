"""Ask a lorakit server with OpenAI's own Python client: list the models, stream an answer, say how good it was.

    pip install openai
    python examples/clients/openai_python.py http://127.0.0.1:8000 MODEL 'Tell me about a fox.'

The key is read from OPENAI_API_KEY; a server without keys takes any.
"""

from __future__ import annotations

import os
import sys

import openai


def ask(server: str, model: str, question: str) -> str:
    """Stream the answer to the screen as it comes, rate it, and return it."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    print("served:", ", ".join(one.id for one in client.models.list()))
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        temperature=0.7,
        seed=1,
        stream=True,
        extra_body={"lora_scale": 1.0},  # lorakit's own: how strongly the adapter acts
    )
    print(f"{answer.headers['x-lora-adapter']} ({answer.headers['x-lora-digest'][:12]}):", end="", flush=True)
    text, id = "", ""
    for chunk in answer.parse():
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        text, id = text + piece, chunk.id
    print()
    client.post("/feedback", body={"response_id": id, "rating": 1}, cast_to=object)
    return text


if __name__ == "__main__":
    ask(*sys.argv[1:4])
