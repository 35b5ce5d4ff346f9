"""Benchmarks: the tasks of lm-eval on the teacher and on every trained student, with one process for each model.

    benchmarks.tasks --presets--> asked tasks --tasks--> lm-eval's tasks with their data
                                                            |
    a model --backends--> lm-eval's hf or vllm  --measure--+--> work/results/TASK.json --> benchmark.json

The user's own tasks are read as data unless their code is trusted; see `own_tasks.py`.
"""
