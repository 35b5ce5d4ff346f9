"""The align stage: a finished cache and another tokenizer make a cache that a student of that tokenizer learns from.

cache's tokens --bytes--> text --the other tokenizer--> the student's tokens, packed anew
     |                                                          |
     +---- borders of both, logprobs of the teacher's tokens ---+--> chunks, and the teacher's logprob of each
"""
