"""What a person starts: the command line, and the run files shipped with it (`runs/`).

capgap run FILE      walk the stage graph          capgap status FILE   what is current, what is not, and why
capgap STAGE FILE    one stage                     capgap verify DIR    check every digest below a folder
"""
