"""What a sweep varies: one file per study, plain data."""
