"""Search spaces of sweeps: one file per study, plain data."""
