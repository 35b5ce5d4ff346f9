"""What every stage is built on: its declaration, its context, its folder, its device and its progress.

    declaration.py   how a stage declares itself         context.py     what a stage is handed, and hands back
    instances.py     students, trainings, final models   sources.py     files outside the run
    folder.py        a stage folder, begun to finished   finish.py      the manifest that ends a stage
    command.py       the command that the user typed     manifests.py   read manifests, and check their seals
    identity.py      digests of settings and files       versions.py    versions of the packages used
    device.py        choice of the device                gpus.py, lease.py: names of GPUs, and who holds a device
    ranks.py         several processes of one training   orphans.py, interrupts.py: how processes end
    heartbeat.py     who is at work, and how far         progress.py, events.py, scalars.py: what a stage logs

The stages import this package, and `workflow` imports the stages.
"""
