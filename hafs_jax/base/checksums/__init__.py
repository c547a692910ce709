"""Checksums: of records, which carry their own, and of files, which are hashed before they are used."""
