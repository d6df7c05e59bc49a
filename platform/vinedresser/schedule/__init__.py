"""Schedules: when a pipeline is due, one run at a time, a record per slot."""
