"""Serving: one base in memory, many adapters on it, chosen per request.

requests.py   what goes into an engine and what comes out: the contract of every backend
batching/     our own engine                 remote/       vLLM and Ray behind the same contract
shelf/        adapters by content, names, memory
service.py    text in, text out              answer.py     one answer on its way
prompts.py    conversations to tokens        text.py       tokens to text that is certain
templates.py  somebody else's chat template, within limits
feed.py       from the engine's thread to the event loop
http/         OpenAI's, vLLM's and LoRAX's routes           schemas.py   what they take
keys.py       who may ask                    metrics.py    counters        feedback.py   ratings
load.py       a load on any server           capacity.py   how many machines a load takes
"""
