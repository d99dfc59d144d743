"""Know before you train: what will be trained and what it will cost, as arithmetic on shapes that touches no weight."""
