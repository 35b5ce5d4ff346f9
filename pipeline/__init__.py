"""The stages, one folder each, and what they share.

    corpus -> teacher -> cache -> student -> train -> eval -> report        (workflow: order, state, lease, manifests)
        \\________ store: shards of sequences and targets ________/

A stage is `run(StageContext) -> StageResult` in `pipeline/<stage>/stage.py`. It reads the folders of its inputs and
writes its own; `workflow` hashes the files and writes the manifest.

In a notebook or a training loop of one's own: `import capgap`, which is `pipeline/api.py` and `jobs/api.py`.
"""
