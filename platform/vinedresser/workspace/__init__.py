"""Workspace: atomic commits, locks, leases and stop requests."""
