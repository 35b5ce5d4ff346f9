"""The answers stage: the models of a run answer questions of two turns, one model per process.

questions --> chat template --> token ids --> vLLM, or transformers --> answers.jsonl
"""
