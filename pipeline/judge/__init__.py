"""A language model judges the answers of a run's models.

answers.jsonl of every model --> items (an answer, or two) --> prompts --> endpoint --> verdicts --> judge.json

    items       what is judged: each answer alone, or each pair in both orders
    prompts     what the judge is sent, and what of its reply counts
    endpoint    one client of OpenAI's form, in whose words and errors no key appears
    asking      many requests at once, each verdict kept as soon as it is there
    summary     means, intervals, wins
"""
