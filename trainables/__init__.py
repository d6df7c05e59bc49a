"""The model zoo: one file per architecture, with its configuration."""
