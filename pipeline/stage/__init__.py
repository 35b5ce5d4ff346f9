"""What a stage is, what it is handed, and what it works with.

    declaration.py   a stage declares itself             context.py     what it is handed, and hands back
    instances.py     students, trainings, final models   sources.py     files outside the run
    folder.py        begun, worked on, finished          manifests.py   read them, and hold them against their seal
    identity.py      digests of settings and files       versions.py    of what takes part
    device.py        which device; gpus.py, lease.py: who has it
    ranks.py         several processes at one training   orphans.py, interrupts.py: how processes end
    heartbeat.py     who is at work, and how far; progress.py, events.py, scalars.py: what it logs

The stages stand on this room; `workflow` stands on the stages.
"""
