"""The teacher stage: it checks or adapts a given model, or trains a small one on text that the student never sees."""
