"""What `extract` publishes to the rooms downstream: the activation-store format and what every format shares.

This package needs only the standard library and numpy, so that any room (and any reader of a store) can
import it. `store` owns the activation-store format, `arrays` makes stores of any array (with `npy`, `descriptions` and,
shared with the extraction from text, `shuffle`, `shards` and `places`), `files` atomic writing, `config` the dataclass
<-> JSON <-> command-line mapping, `errors` the one exception that means "the user can mend this".
"""
