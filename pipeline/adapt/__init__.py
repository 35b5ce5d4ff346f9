"""A given teacher, adapted: rows for the pieces that it has not, then further training with cross-entropy alone."""
