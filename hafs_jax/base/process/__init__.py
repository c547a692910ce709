"""A command as a process among others. Standard library only.

locks      who may write, read and replace what
signals    SIGINT, SIGTERM and SIGHUP: a command ends with one line, a training with a checkpoint
children   commands that a command starts, which end with it
saving     what the disk refuses of a checkpoint, which Orbax writes
"""
