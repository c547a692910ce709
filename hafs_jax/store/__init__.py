"""The activation store: its format, its reader, and making one of any array. Standard library and numpy only.

`manifest` owns the format and `reader` opens a store. `arrays` makes stores of any array (with `npy` and
`descriptions`). Extraction from text shares `shuffle` and `shards` with it. `verify` checks a whole store.
"""
