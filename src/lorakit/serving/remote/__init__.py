"""Engines that run elsewhere, behind the contract of ours.

vllm.py       a vLLM server, its adapters kept as they should be      vllm_wire.py  what is said to it
ray.py        replicas of our engine on a cluster                     relay.py      queue, deadline, one end: for both
servable.py   why vLLM would refuse an adapter's folder
"""
