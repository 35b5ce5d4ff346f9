"""What a person starts: the command line, run files (`runs/`), and scripts for clusters (`slurm/`, `ray/`, `k8s/`).

capgap run FILE      walk the stage graph          capgap status FILE   what is current, what is not, and why
capgap STAGE FILE    one stage                     capgap verify DIR    check every digest below a folder
"""
