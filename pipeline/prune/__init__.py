"""Pruning: a smaller model of the teacher's own weights.

teacher --calibrate--> Scores --choose(target shape)--> Kept --cut--> student --measure--> prune.json
"""
