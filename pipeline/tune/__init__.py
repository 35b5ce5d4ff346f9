"""Instruction tuning: a trained student and conversations into a chat model.

conversations --chat template--> rows of whole conversations of which answers are learnt     (or a chat teacher's cache)
student, role marks added --train.fit--> all weights, or adapters --> a Hugging Face folder with its chat template
"""
