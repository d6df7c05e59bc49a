"""The model zoo: one file per architecture, its configuration beside it."""
