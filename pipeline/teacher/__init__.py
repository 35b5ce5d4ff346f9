"""The teacher: a given model that is checked, or a small one trained on text that the student never sees."""
