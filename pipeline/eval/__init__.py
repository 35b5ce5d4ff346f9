r"""Measures the teacher and every student on held-out text, one model on the device at a time.

held-out shards --> teacher --> losses, and full logprobs of a few sequences --> nameless file on disk
               \--> student --> losses, calibration, KL, agreement, acceptance <-----'
held-out rows of the cache --^--> KL or cross-entropy with the cache's targets, which needs no teacher
                    (next student ...)                       --> results.json
"""
