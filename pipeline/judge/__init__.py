"""The judge stage: a language model judges the answers of a run's models.

answers.jsonl of every model --> items (an answer, or two) --> prompts --> endpoint --> verdicts --> judge.json

    items       the items to judge: each answer alone, or each pair of answers in both orders
    prompts     the texts for the judge, and the part of its reply that counts
    endpoint    an OpenAI-compatible client, whose texts and errors never contain the key
    asking      many requests in parallel, whose verdicts are kept as soon as they arrive
    summary     means, intervals, wins
"""
