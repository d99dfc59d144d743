"""What an adapter learned, as numbers: pure functions on tensors and on adapter states, which nothing here changes.

svd.py             singular triplets of an update, from its factors where it has them
rank.py            energy, effective ranks, dead and saturated updates
subspace.py        the LoRA paper's subspace similarity, principal angles, distances, chance
amplification.py   what an update amplifies that its weight holds little of
intruder.py        directions of the changed weight that the base has nothing like, and their mitigation
interference.py    what two updates of one weight do to each other when both are active
spectrum.py        one row a module: the singular values and what they say
inspection.py      one row a module: all of that
"""
