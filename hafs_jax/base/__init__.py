"""What all rooms share. Standard library and numpy only.

errors     the exception for a user's mistake, and how it is shown
checksums  of records, which carry their own, and of files, which are hashed before they are used
files      atomic writing and checked reading of small files; checksums
hub        requests to the model hub: bounded silence and retries, errors of one line
log        notes and progress bars
memory     the memory of this process
options    configs: their bounds, checks, JSON and fields by name
flags      command lines: the parser, its help, flags of a config
tensors    arrays of any library as numpy's
places     folders that a finished result replaces
plugins    modules from outside that add to the project
process/   a command as a process among others: locks, signals, children
"""
