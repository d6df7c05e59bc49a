"""Figures of runs, corpora and attention; judgement is in health."""
