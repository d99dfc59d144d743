"""Our own engine: many sequences in one forward, each with its own adapter.

engine.py        requests join and leave between two steps: the thread     fair_queue.py  who is next
decoder.py       one forward, and the proof that the model allows it       sampling.py    the next token
slots.py         keys and values, and the attention that reads them
bank.py          which adapter acts on which token                         place.py       what one layer does with it
preparation.py   from an adapter's files to pairs of factors, or a refusal workers.py     no thread too many
"""
