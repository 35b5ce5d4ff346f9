"""The generate stage: a model of the run answers prompts, and its tokens are packed as a corpus for a teacher to score.

prompts --> chat template, or text --> token ids --> vLLM, or transformers --> whole answers in rows --> token shards
"""
