"""From a run file to finished folders: which stages there are, which are current, and how one is carried out.

    RunFile --graph--> instances and their inputs --state--> current | stale | partial | missing, and why
                                                      |
            driver (doit: order, selection) --- one process per instance ---> carry_out
                                                      |
            folder lock, device lease --> stage.run(context) --> files hashed --> manifest.json, last and atomically

The manifests are the only truth: nothing else remembers what was done.
"""
