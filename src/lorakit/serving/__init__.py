"""Serving: one base in memory, many adapters on it, chosen per request.

requests.py   what goes into an engine and what comes out: the contract of every backend
"""
