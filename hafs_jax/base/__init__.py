"""The common ground of all rooms: errors, files, options, places, memory, log. Standard library and numpy only."""
