"""What shows how a run went."""
