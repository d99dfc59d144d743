"""lorakit: make a pretrained model yours with a low-rank update."""
