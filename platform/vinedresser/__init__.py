"""vinedresser: train and prune sequence-to-sequence models, selected on decoded quality."""

__version__ = "0.1.0"
