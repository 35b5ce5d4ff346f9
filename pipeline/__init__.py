"""The stages, one folder each, and the packages that they are built on.

    store/ <- stage/ <- models/ <- corpus/ teacher/ cache/ student/ train/ tune/ eval/ ...  <- stages.py: the list
                                                      <- workflow/ <- pages/ plan/ report/ law/

A stage declares itself in `declaration.py`, and does its work in `stage.py`: `run(StageContext) -> StageResult`. It
reads the folders of its inputs and writes its own; `workflow` hashes the files and writes the manifest.

In a notebook or a training loop of your own: `import capgap`, which is `pipeline/api.py` and `jobs/api.py`.
"""
