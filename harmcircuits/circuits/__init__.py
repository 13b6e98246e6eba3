"""Numbers only, no model is run: scores, masks, selection, overlap, location, ground truth."""
