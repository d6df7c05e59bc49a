"""What people launch and schedule."""
