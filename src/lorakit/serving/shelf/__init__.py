"""The adapters of a server: kept by content, called by names, in memory while they are used.

registry.py    what stands before an engine: a name in, a loaded adapter out
residents.py   memory, the least used first    names.py      names, aliases, A/B tests: pointers
store.py       folders by their digest         manifest.py   what a folder says of itself
golden.py      prompts with known answers      turnstile.py  one process at a time
typed.py       JSON of known types
"""
