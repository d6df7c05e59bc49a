"""Special ids: the first ids of every vocabulary. Torch-free, so that tokenizers load fast."""

PAD, BOS, EOS, UNK = 0, 1, 2, 3
