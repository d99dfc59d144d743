"""Layer kinds: ops (how a weight acts), stores (how it is kept) and the table of rows that pairs them."""
