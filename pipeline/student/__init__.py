"""Makes the student's first weights: fresh ones of a given shape, those of a given model, or the teacher's, pruned."""
