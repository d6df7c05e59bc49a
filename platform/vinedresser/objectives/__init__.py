"""Terms of the objective, one module per term; `config.terms` finds them by name."""
