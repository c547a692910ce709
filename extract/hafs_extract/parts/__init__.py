"""A split's rows in parts: each a function of text and config alone, whoever makes it.

plan       which batches are which part
files      a part on disk: its rows by bucket, its norms, its journal entry; what pass 2 reads of all parts
jobs       what workers are told
making     a part from the model: what each worker does
engine     the flags that choose who makes the parts
makers     who makes them: this process, processes of this machine, or a Ray cluster
pool       which worker makes which part, and what happens when one dies
processes  workers on this machine, and `worker`, which each of them runs
on_ray     workers on a Ray cluster
"""
