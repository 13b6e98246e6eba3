"""What a person looks at: pages, figures, tables, circuitsvis; drawn from arrays, scores, masks and rows."""
