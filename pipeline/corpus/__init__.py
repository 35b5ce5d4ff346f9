"""The corpus stage: it turns text into packed sequences of tokens.

sources (files, records, builtin) --documents--> split by digest --> tokenizer (given, or trained on the teacher's
and student's text; its chat template for conversations) --> documents joined by the end token, cut into rows of L + 1
--> shards of `teacher`, `student`, `heldout`
"""
