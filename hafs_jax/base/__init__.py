"""What all rooms share. Standard library and numpy only.

errors     the exception for a user's mistake, and how it is shown
files      atomic writing and checked reading of small files; checksums
log        notes and progress bars
memory     the memory of this process
options    configs: their bounds, JSON and command-line flags
places     folders that are locked, and that a finished result replaces
plugins    modules from outside that add to the project
"""
