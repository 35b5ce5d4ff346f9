"""The align stage: it turns a finished cache into one from which a student with another tokenizer can learn.

cache's tokens --bytes--> text --student's tokenizer--> the student's tokens, packed anew
     |                                                          |
     +-- token borders of both, logprobs of teacher's tokens ---+--> chunks, and the teacher's logprob of each
"""
