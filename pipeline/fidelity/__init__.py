"""Measures what a cache keeps of its teacher, and which trainings it supports.

manifest, some shards --sample--> blocks --sums of rows--> Fidelity --text--> terminal
the trainer's own checks --supports----------------------------'
the teacher, if one is given --live----------------------------'
"""
