r"""Measures the teacher and every student on held-out text, one model on the device at a time.

held-out shards --> teacher --> losses, and full logprobs of a few sequences --> nameless file on disk
               \--> student --> losses, KL, agreement, acceptance  <-----------------'
                    (next student ...)                       --> results.json
"""
