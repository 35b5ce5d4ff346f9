"""Instruction tuning: makes a chat model from a trained student and conversations.

conversations --chat template--> rows of whole conversations, whose answers are learnt     (or a chat teacher's cache)
student, role marks added --train.fit--> all weights, or adapters --> a Hugging Face folder with its chat template
"""
