"""The only code that puts hooks on a live model."""
