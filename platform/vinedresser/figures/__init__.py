"""Figures: pictures of runs, corpora and attention, apart from judgement."""
