"""Health: preflight checks, and the rules that watch a run."""
