"""The models of a run answer questions of two turns, one model a process.

questions --> chat template --> token ids --> vLLM, or transformers --> answers.jsonl
"""
