"""The common ground of all rooms: errors, files, options, places, memory. Standard library and numpy only."""
