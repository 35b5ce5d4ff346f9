"""What people start: the command line, run files (`runs/`), scripts for clusters (`slurm/`, `ray/`, `k8s/`, `sky/`).

arguments --cli--> registry --> a command --arguments--> its flags, and a run file with the settings given as flags
                                                |
reader: yaml_nodes (lines, bounds) --> flags merged --> one validation --> problems, each with its line or its flag
"""
