"""What a model is asked, what it answers, and who judges the answer."""
