"""Is this machine set up right? Facts are collected in child processes, and judged apart from that.

What is broken here becomes a finding, never a traceback: nothing that could be broken is imported into this process.
"""
