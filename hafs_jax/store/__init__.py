"""The activation store on disk: its format, reading it, making it. Standard library and numpy only.

    manifest      the format: files, records, names, dtypes; reading and writing the manifest
    reader        opens a store, and reads its rows in batches
    verify        checks a whole store: checksums, contents, statistics
    shuffle       the global shuffle in bounded memory
    shards        writes the shuffled rows and sums up their statistics
    arrays        makes a store of any array (`hafs import`)
    npy           the arrays and npy files that a user gives for that
    stream        activations from an iterator, which are not stored
    holding       locks: readers of a store, and who replaces it
    given         what a user gives as data in Python
    descriptions  which split and document each of their rows belongs to

`hafs_extract` makes stores of text with `shuffle` and `shards`.
"""
