"""Kinds of corpora: one module each, with the configuration class and the reader."""
