"""The student's first weights: fresh ones of a given shape, or those of a given model, checked against the corpus."""
