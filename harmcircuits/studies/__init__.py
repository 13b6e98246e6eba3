"""Experiments over everything else: models, the main study, controls, curves, claims."""
