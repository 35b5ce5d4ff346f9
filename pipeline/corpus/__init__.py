"""Text into packed sequences.

sources (files, records, builtin) --documents--> split by digest --> tokenizer (given, or trained on the teacher's
and student's text; its chat template for conversations) --> documents joined by the end token, cut into L + 1
--> shards of `teacher`, `student`, `heldout`
"""
