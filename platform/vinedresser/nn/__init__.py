"""Parts that trainables are built from."""
