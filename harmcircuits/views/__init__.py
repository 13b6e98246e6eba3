"""What a person looks at, drawn from arrays, scores, masks and rows."""
