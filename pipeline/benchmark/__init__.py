"""Benchmarks: the tasks of lm-eval on the teacher and on every trained student, a model in each process.

    benchmarks.tasks --presets--> asked tasks --tasks--> lm-eval's tasks with their data
                                                            |
    a model --backends--> lm-eval's hf or vllm  --measure--+--> work/results/TASK.json --> benchmark.json

Own tasks are read as data unless their code is trusted: `own_tasks`.
"""
