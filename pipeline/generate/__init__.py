"""Models of a run write text in answer to prompts: their very tokens, packed as a corpus, for a teacher to score.

prompts --> chat template, or text --> token ids --> vLLM, or transformers --> whole answers in rows --> token shards
"""
