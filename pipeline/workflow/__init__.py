"""From a run file to finished folders: what is current, what would be replaced, and how a stage is carried out.

    RunFile --graph--> instances and their inputs --state--> current | stale | partial | missing, and why
                                                      |
        preflight: can all stages to come end well?   |  remake: would anything costly be replaced?
                                                      |
                   driver: in order, one process per instance ---> carry_out
                                                      |
            folder lock, device lease --> stage.run(context) --> files hashed --> manifest.json, last and atomically

The manifests are the only record of what was done. Which stages exist, and what each one reads, follows from their
declarations (`pipeline/stages.py`); this package names no stage.
"""
