"""The adapters of a server: kept by content, called by names, in memory while they are used.

registry.py    what stands before an engine: a name in, a loaded adapter out
residents.py   memory, the least used first    names.py      names, aliases, A/B tests: pointers
arrival.py     what lies in a new folder       manifest.py   what a folder says of itself
store.py       folders by their digest         typed.py      JSON of known types
golden.py      prompts with known answers      turnstile.py  one process at a time
"""
