"""A store that is larger than its disk, as windows of rows."""
