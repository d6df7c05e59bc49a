"""Tokenizers: text, symbols or recordings -> ids or frames, and back. No torch, no Ray."""
