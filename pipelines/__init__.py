"""Pipelines to launch and to schedule."""
