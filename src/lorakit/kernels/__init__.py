"""Fast twins of plain formulas, each held equal to its plain twin."""
