"""What a person starts: the command line, run files (`runs/`), scripts for clusters (`slurm/`, `ray/`, `k8s/`, `sky/`).

capgap run FILE      walk the stage graph          capgap status FILE   what is current, what is not, and why
capgap STAGE FILE    one stage                     capgap verify DIR    check every digest below a folder
capgap plan FILE     what a run will cost
"""
